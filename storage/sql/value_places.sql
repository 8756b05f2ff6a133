-- name: value_places
-- purpose: The samples and positions that the raw values of a task are of.
-- param: run - id of the run
-- param: task - name of the task
-- grain: one row per block, in order
select block, sample, position
from value_positions
where run = $run and task = $task
order by block
