-- name: drift_pairs
-- purpose: The importance of each neuron in both runs, for the tasks of both.
-- grain: one row per (task, metric, site, layer, neuron)
select
    task,
    metric,
    site,
    layer,
    neuron,
    a.importance as a,
    b.importance as b
from computed_importance as a
join computed_importance_b as b using (task, metric, site, layer, neuron)
