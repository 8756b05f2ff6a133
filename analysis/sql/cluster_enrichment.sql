-- name: cluster_enrichment
-- purpose: Whether an expert holds more neurons of a task's selection than chance gives it.
-- grain: one row per (experts, run, task, metric, fraction, layer, expert)
select
    experts,
    experts_run,
    method,
    run,
    task,
    metric,
    site,
    fraction,
    layer,
    expert,
    size,
    held,
    num_selected * size / population as expected,
    held / (num_selected * size / population) as lift,
    hypergeometric_tail(held, population, num_selected, size) as p_value
from computed_expert_counts
order by experts, run, metric, fraction, task, layer, expert
