-- name: example_layers
-- purpose: In which layers the selected neurons of each task lie.
-- grain: one row per (task, layer)
select task, layer, count(*) as neurons
from selections
where site = 'mlp' and metric = 'abs' and fraction = (select min(fraction) from selections)
group by task, layer
order by task, layer
