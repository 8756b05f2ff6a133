-- name: status_analyses
-- purpose: The finished analyses and their size.
-- grain: one row per analysis
select
    analysis,
    parameters::varchar as parameters,
    num_rows as rows,
    round(bytes / 1e6, 1) as megabytes
from analyses
order by analysis
