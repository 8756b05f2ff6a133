-- name: top_activations
-- purpose: The highest and lowest activations of each neuron in each task, and where they were.
-- column: run - id of the run
-- column: task - name of the task
-- column: site - 'attn' or 'mlp'
-- column: layer - index of the layer, from 0
-- column: neuron - index of the neuron inside its site and layer, from 0
-- column: head - attention head (neuron // head_dim); null at 'mlp'
-- column: kind - 'highest' or 'lowest'
-- column: rank - from 1; ties by sample, then position
-- column: value - activation z
-- column: sample - index of the sample inside the task
-- column: position - index of the token inside the sample, from 0
-- grain: one row per (run, task, site, layer, neuron, kind, rank)
with

kept as (
    select
        run,
        task,
        site,
        layer,
        neuron,
        head,
        k,
        'highest' as kind,
        unnest(highest) as value,
        unnest(highest_sample) as sample,
        unnest(highest_position) as position
    from top
    union all
    select
        run,
        task,
        site,
        layer,
        neuron,
        head,
        k,
        'lowest' as kind,
        unnest(lowest) as value,
        unnest(lowest_sample) as sample,
        unnest(lowest_position) as position
    from top
),

-- Each shard has its own best k, so that those of the task are the best k of all of them; what
-- comes after could be better in what a shard did not keep.
ranked as (
    select
        *,
        row_number() over (
            partition by run, task, site, layer, neuron, head, kind
            order by if(kind = 'highest', -value, value), sample, position
        ) as rank
    from kept
)

select
    run,
    task,
    site,
    layer,
    neuron,
    head,
    kind,
    rank,
    value,
    sample,
    position
from ranked
where rank <= k
