-- name: quotas
-- purpose: How many neurons each fraction selects, of how many.
-- param: fractions - fractions to select, each in (0, 1]
-- param: within - 'model' or 'layer'
-- grain: one row per (task, metric, site, stratum, fraction); stratum null = the whole model
with

populations as (
    select
        task,
        metric,
        site,
        case $within when 'layer' then layer end as stratum,
        count(*) as population
    from computed_scores
    group by all
)

-- 0.29 * 100 is 28.999999999999996 in floating point: what is a whole number on paper must not
-- lose a neuron.
select
    p.task,
    p.metric,
    p.site,
    p.stratum,
    f.fraction,
    p.population,
    floor(f.fraction * p.population + 1e-9)::bigint as quota
from populations as p
cross join (select unnest($fractions)::double as fraction) as f
