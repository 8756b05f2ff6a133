-- name: pair_rows
-- purpose: The rows of one layer's pair matrices, with the sum of each neuron's activations.
-- param: run - id of the run
-- param: task - name of the task
-- param: site - 'mlp' or 'attn'
-- param: layer - index of the layer
-- grain: one row per (shard, neuron)
select
    neuron,
    c.n,
    len(c.together) as width,
    c.together,
    c.product,
    s.n * s.mean as total
from coactivation as c
join stats as s using (run, task, shard, site, layer, neuron)
where run = $run and task = $task and site = $site and layer = $layer and c.n > 0
