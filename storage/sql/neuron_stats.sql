-- name: neuron_stats
-- purpose: Statistics of every neuron, merged over all committed shards of a task.
-- column: run - id of the run
-- column: task - name of the task
-- column: site - 'attn' or 'mlp'
-- column: layer - index of the layer, from 0
-- column: neuron - index of the neuron inside its site and layer, from 0
-- column: head - attention head (neuron // head_dim); null at 'mlp'
-- column: n - number of counted positions
-- column: mean - mean of the activation z
-- column: std - standard deviation of z over all positions (divided by n)
-- column: rms - sqrt(mean of z^2)
-- column: abs - mean of |z|
-- column: sqrt - mean of sqrt|z|
-- column: pos - mean of max(z, 0) over all positions
-- column: neg - mean of min(z, 0) over all positions
-- column: freq - share of positions with z > 0
-- column: nonzero - share of positions with z != 0
-- column: min - smallest z
-- column: max - largest z
-- grain: one row per (run, task, site, layer, neuron)
with

-- E[z^2] of a shard is m2 / n + mean^2. Merging through it is one pass and, in float64, keeps
-- the variance to a relative error of about 1e-15 * (1 + mean^2 / variance). Threads meet shards in
-- any order: fsum carries what rounding loses, so that every query gets the same last digit.
merged as (
    select
        run,
        task,
        site,
        layer,
        neuron,
        any_value(head) as head,
        sum(n)::bigint as n,
        fsum(n * mean) / sum(n) as mean,
        fsum(m2 + n * mean * mean) / sum(n) as mean_square,
        fsum(abs_sum) / sum(n) as abs,
        fsum(sqrt_sum) / sum(n) as sqrt,
        fsum(pos_sum) / sum(n) as pos,
        fsum(neg_sum) / sum(n) as neg,
        sum(pos_count) / sum(n) as freq,
        sum(nonzero_count) / sum(n) as nonzero,
        min(min) as min,
        max(max) as max
    from stats
    -- A shard whose samples were all set aside has no positions.
    where n > 0
    group by run, task, site, layer, neuron
)

select
    run,
    task,
    site,
    layer,
    neuron,
    head,
    n,
    mean,
    sqrt(greatest(mean_square - mean * mean, 0)) as std,
    sqrt(mean_square) as rms,
    abs,
    sqrt,
    pos,
    neg,
    freq,
    nonzero,
    min,
    max
from merged
