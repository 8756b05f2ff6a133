-- name: service_tasks
-- purpose: The tasks of one run, and how many of their shards are committed.
-- param: run - id of the run
-- grain: one row per task
select *, committed_shards as num_committed
from tasks
where run = $run
order by task
