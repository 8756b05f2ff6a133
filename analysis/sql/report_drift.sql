-- name: report_drift
-- purpose: How far two runs differ, over the whole model and in each layer.
-- param: analysis - id of the drift
-- param: metric - one of its metrics
-- grain: one row per (site, fraction, layer or whole model, task)
select
    site,
    fraction,
    layer,
    task,
    correlation,
    error_median,
    error_p90,
    share_of_a,
    lift,
    loss_difference,
    top1_difference
from drift
where analysis = $analysis and metric = $metric
order by site desc, fraction, layer nulls first, task
