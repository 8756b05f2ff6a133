-- name: drift_by_task
-- purpose: The drift of each task over the whole model, with all fractions side by side.
-- param: analysis - id of the drift
-- param: metric - one of its metrics
-- grain: one row per (task, site)
select
    task,
    site,
    any_value(correlation) as correlation,
    any_value(error_median) as error_median,
    any_value(error_p90) as error_p90,
    list(fraction order by fraction) as fractions,
    list(share_of_a order by fraction) as shares,
    list(lift order by fraction) as lifts,
    any_value(same_inputs) as same_inputs,
    any_value(loss_a) as loss_a,
    any_value(loss_difference) as loss_difference,
    any_value(top1_difference) as top1_difference
from drift
where analysis = $analysis and metric = $metric and layer is null
group by task, site
order by task, site desc
