-- name: persistence_rows
-- purpose: Over the whole model, how alike two runs are in what tasks share, by site and fraction.
-- param: analysis - id of the drift
-- param: metric - importance metric
-- grain: one row per (site, fraction)
select
    site,
    fraction,
    num_tasks,
    correlation,
    p_value,
    num_permutations,
    same_neurons,
    same_neurons_spread,
    same_by_chance,
    lift
from persistence
where analysis = $analysis and metric = $metric and layer is null
order by site, fraction
