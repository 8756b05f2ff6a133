-- name: drift_by_layer
-- purpose: The layers of each site whose importances correlate least, on average over tasks.
-- param: analysis - id of the drift
-- param: metric - one of its metrics
-- param: count - most layers of each site
-- grain: one row per (site, layer)
with

smallest as (
    select min(fraction) as fraction from drift where analysis = $analysis
),

layers as (
    select
        d.site,
        d.layer,
        avg(d.correlation) as correlation,
        avg(d.error_median) as error_median,
        avg(d.error_p90) as error_p90,
        sum(d.shared) / nullif(sum(d.size_a), 0) as share_of_a,
        sum(d.shared) / nullif(sum(d.expected), 0) as lift
    from drift as d
    join smallest as s on d.fraction = s.fraction
    where d.analysis = $analysis and d.metric = $metric and d.layer is not null
    group by d.site, d.layer
)

select *
from layers
qualify row_number() over (partition by site order by correlation nulls last, layer) <= $count
order by site desc, correlation nulls last, layer
