-- name: status_tasks
-- purpose: How far each task of each run is.
-- grain: one row per (run, task)
select
    run,
    task,
    is_reference as reference,
    num_documents as documents,
    num_samples as samples,
    num_tokens as tokens,
    committed_shards || ' of ' || num_shards as shards
from tasks
order by run, task
