-- name: status_analyses
-- purpose: The finished analyses and their size.
-- grain: one row per analysis
select
    analysis,
    run,
    created,
    array_to_string((parameters -> '$.metrics')::varchar[], ' ') as metrics,
    num_rows as rows,
    round(bytes / 1e6, 1) as megabytes
from analyses
order by analysis
