-- name: service_runs
-- purpose: All runs with what their view says, the newest first.
-- grain: one row per run
select *
from runs
order by created desc, run
