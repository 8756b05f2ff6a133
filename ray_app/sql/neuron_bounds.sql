-- name: neuron_bounds
-- purpose: Mean, least and largest activation of every neuron in one task.
-- param: run - id of the run
-- param: task - name of the task
-- grain: one row per (site, layer); lists in the order of neurons
select
    site,
    layer,
    list(mean order by neuron) as means,
    list("min" order by neuron) as lowest,
    list("max" order by neuron) as highest
from neuron_stats
where run = $run and task = $task
group by site, layer
order by site, layer
