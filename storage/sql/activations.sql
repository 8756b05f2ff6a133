-- name: activations
-- purpose: Raw activations where the study keeps them, one by one, decoded.
-- column: run - id of the run
-- column: task - name of the task
-- column: site - 'attn' or 'mlp'
-- column: layer - index of the layer, from 0
-- column: neuron - index of the neuron inside its site and layer, from 0
-- column: head - attention head (neuron // head_dim); null at 'mlp'
-- column: sample - index of the sample inside the task
-- column: position - index of the token inside the sample, from 0
-- column: value - activation z; differs from the model's by at most error_bound in table values
-- grain: one row per (run, task, site, layer, neuron, sample, position) that was kept
-- Filters on run, task, site and layer choose files by their path, those on neuron choose row groups.
select
    run,
    task,
    site,
    layer,
    neuron,
    head,
    sample,
    position,
    {decoded} as value
from "values"
