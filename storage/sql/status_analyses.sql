-- name: status_analyses
-- purpose: The finished analyses and what they measured.
-- grain: one row per analysis
select
    analysis,
    run,
    array_to_string((parameters -> '$.metrics')::varchar[], ' ') as metrics
from analyses
order by created, analysis
