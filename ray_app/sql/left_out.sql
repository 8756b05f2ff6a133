-- name: left_out
-- purpose: Samples of a task that the capture set aside.
-- param: run - id of the run
-- param: task - name of the task
-- grain: one row per sample
select sample
from quarantine
where run = $run and task = $task
order by sample
