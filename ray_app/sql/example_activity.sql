-- name: example_activity
-- purpose: How active the neurons of each layer are.
-- grain: one row per (site, layer)
select site, layer, count(*) as rows, avg(abs) as mean_abs, avg(freq) as share_positive
from neuron_stats
group by site, layer
order by site, layer
