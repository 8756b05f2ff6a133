-- name: top_neurons
-- purpose: The most task-specific neurons of each task.
-- param: analysis - id of the analysis
-- param: metric - importance metric
-- param: fraction - fraction of the neurons that was selected
-- param: count - number of neurons of each task and site
-- grain: one row per (task, site, rank)
select
    s.task,
    s.site,
    s.rank,
    s.layer,
    s.neuron,
    s.score,
    i.importance
from selections as s
join importance as i using (analysis, task, metric, site, layer, neuron)
where
    s.analysis = $analysis
    and s.metric = $metric
    and s.fraction = $fraction
    and s.rank <= $count
order by s.task, s.site, s.rank, s.layer
