-- name: report_persistence
-- purpose: Which share of all selected neurons lies in each layer, in both runs.
-- param: analysis - id of the drift
-- param: metric - one of its metrics
-- grain: one row per (site, fraction, layer)
select
    site,
    fraction,
    layer,
    selected_a,
    selected_b,
    correlation,
    p_value,
    same_neurons,
    same_by_chance
from persistence
where analysis = $analysis and metric = $metric and layer is not null
order by site desc, fraction, layer
