-- name: held_by_layer
-- purpose: Sizes of a layer's experts and how many selected neurons each holds.
-- grain: one row per (experts, run, task, metric, fraction, layer)
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
    list(size order by expert) as sizes,
    list(held order by expert) as held
from computed_expert_counts
group by all
order by experts, run, metric, fraction, task, layer
