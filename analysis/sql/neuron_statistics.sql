-- name: neuron_statistics
-- purpose: What one neuron did in each task.
-- param: run - id of the run
-- param: site - its site
-- param: layer - its layer
-- param: neuron - its index
-- grain: one row per task
select
    task,
    head,
    n,
    mean,
    std,
    abs,
    freq,
    min,
    max
from neuron_stats
where
    run = $run
    and site = $site
    and layer = $layer
    and neuron = $neuron
order by task
