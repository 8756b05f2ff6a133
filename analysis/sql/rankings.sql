-- name: rankings
-- purpose: All neurons in the order of their scores, where all were ranked.
-- grain: one row per (task, metric, site, stratum); stratum null = the whole model
select
    task,
    metric,
    site,
    stratum,
    list(layer order by rank) as layers,
    list(neuron order by rank) as neurons
from computed_ranks
group by all
order by task, metric, site, stratum
