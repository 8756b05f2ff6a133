-- name: pooled_activations
-- purpose: What each neuron did in each sample, pooled over the sample's counted positions.
-- column: run - id of the run
-- column: task - name of the task
-- column: site - 'attn' or 'mlp'
-- column: layer - index of the layer, from 0
-- column: neuron - index of the neuron inside its site and layer, from 0
-- column: head - attention head (neuron // head_dim); null at 'mlp'
-- column: sample - index of the sample inside the task
-- column: max - largest z; null if not kept
-- column: mean - mean of z; null if not kept
-- grain: one row per (run, task, site, layer, neuron, sample)
select
    run,
    task,
    site,
    layer,
    neuron,
    head,
    unnest(sample) as sample,
    unnest(max) as max,
    unnest(mean) as mean
from pooled
