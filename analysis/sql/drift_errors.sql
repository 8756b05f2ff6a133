-- name: drift_errors
-- purpose: Median and 90th percentile of the relative difference of importance in the two runs.
-- grain: one row per (task, metric, site, layer or whole model)
with

-- Relative to the larger of the two: the same whichever run comes first, and defined for neurons
-- that one of the runs never uses.
errors as (
    select
        task,
        metric,
        site,
        layer,
        case when a = b then 0 else abs(a - b) / greatest(abs(a), abs(b)) end as error
    from computed_drift_pairs
)

select
    task,
    metric,
    site,
    layer,
    count(*) as population,
    quantile_cont(error, 0.5) as error_median,
    quantile_cont(error, 0.9) as error_p90
from errors
group by task, metric, site, grouping sets ((layer), ())
