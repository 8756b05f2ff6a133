-- name: used_sources
-- purpose: Documents that a run's capture used.
-- param: run - id of the run
-- grain: one row per (task, source)
select distinct task, source
from samples
where run = $run
order by task, source
