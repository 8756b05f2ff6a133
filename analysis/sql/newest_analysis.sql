-- name: newest_analysis
-- purpose: The last analysis of a run, or the one that is named, with its parameters.
-- param: run - id of the run
-- param: analysis - id of the analysis; null for the last one
-- grain: at most one row
select
    analysis,
    parameters ->> '$.reference' as reference,
    parameters ->> '$.within' as within,
    (parameters -> '$.metrics')::varchar[] as metrics,
    (parameters -> '$.fractions')::double[] as fractions,
    (parameters -> '$.sites')::varchar[] as sites
from analyses
where
    run = $run
    and list_contains(tables, 'overlap')
    and ($analysis::varchar is null or analysis = $analysis)
order by created desc, analysis
limit 1
