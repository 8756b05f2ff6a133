-- name: example_specific
-- purpose: Which neurons are the most specific to a task.
-- grain: one row per neuron
select run, task, site, layer, neuron, round(score, 2) as score
from selections
where metric = 'abs' and fraction = (select min(fraction) from selections)
order by score desc
limit 20
