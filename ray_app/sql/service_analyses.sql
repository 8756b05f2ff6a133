-- name: service_analyses
-- purpose: The analyses, the newest first; their kind is their id without the digest.
-- param: run - only those of this run; null for all
-- param: analysis - only the one of this id; null for all
-- grain: one row per analysis
select
    analysis,
    left(analysis, length(analysis) - 9) as kind,
    run,
    created,
    parameters,
    tables
from analyses
where
    ($run::varchar is null or run = $run)
    and ($analysis::varchar is null or analysis = $analysis)
order by created desc, analysis
