-- name: drift_strata
-- purpose: The importances of both runs, layer by layer, for what is computed in NumPy.
-- grain: one row per (task, metric, site, layer)
select
    task,
    metric,
    site,
    layer,
    -- In one list, so that the two of a neuron stay together.
    list({'a': a, 'b': b}) as pairs
from computed_drift_pairs
group by task, metric, site, layer
order by task, metric, site, layer
