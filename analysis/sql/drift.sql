-- name: drift
-- purpose: How far two runs over the same tasks differ.
-- param: run_a - id of the first run
-- param: run_b - id of the second run
-- param: within - 'model' or 'layer'
-- grain: one row per (metric, site, fraction, layer or whole model, task)
with

fractions as (
    select distinct fraction from computed_quotas
)

select
    $run_a as run_a,
    $run_b as run_b,
    e.task,
    e.metric,
    e.site,
    $within as within,
    f.fraction,
    e.layer,
    e.population,
    r.correlation,
    e.error_median,
    e.error_p90,
    s.size_a,
    s.size_b,
    s.shared,
    s.shared / nullif(s.size_a, 0) as share_of_a,
    s.shared / nullif(s.size_a + s.size_b - s.shared, 0) as jaccard,
    s.expected,
    s.shared / nullif(s.expected, 0) as lift,
    s.p_value,
    a.num_samples = b.num_samples and a.digest = b.digest as same_inputs,
    a.loss as loss_a,
    b.loss as loss_b,
    b.loss - a.loss as loss_difference,
    a.top1 as top1_a,
    b.top1 as top1_b,
    b.top1 - a.top1 as top1_difference
from computed_drift_errors as e
cross join fractions as f
join computed_drift_correlations as r
    on e.task = r.task
    and e.metric = r.metric
    and e.site = r.site
    and e.layer is not distinct from r.layer
left join computed_drift_shared as s
    on e.task = s.task
    and e.metric = s.metric
    and e.site = s.site
    and f.fraction = s.fraction
    and e.layer is not distinct from s.layer
join computed_drift_tasks as a on e.task = a.task
join computed_drift_tasks_b as b on e.task = b.task
order by e.metric, e.site, f.fraction, e.layer nulls first, e.task
