-- name: captured_tasks
-- purpose: The tasks that a run has statistics of.
-- param: run - id of the run
-- grain: one row
select list(distinct task) as names
from stats
where run = $run
