-- name: shard_extrema
-- purpose: The smallest and largest activation of every neuron in one shard.
-- param: run - id of the run
-- param: task - name of the task
-- param: shard - index of the shard
-- grain: one row per (site, layer), neurons in order
select
    site,
    layer,
    list(min order by neuron) as lowest,
    list(max order by neuron) as highest
from stats
where run = $run and task = $task and shard = $shard
group by site, layer
