-- name: status_tasks
-- purpose: How far each task of each run is.
-- grain: one row per (run, task)
select
    run,
    task || if(is_reference, ' (reference)', '') as task,
    num_samples as samples,
    num_tokens as tokens,
    committed_shards || ' of ' || num_shards as shards
from tasks
order by run, task
