-- name: neuron_stats
-- purpose: Statistics of every neuron, merged over all committed shards of a task.
-- grain: one row per (run, task, site, layer, neuron)
with

-- E[z^2] of a shard is m2 / n + mean^2. Merging through it is one pass and, in float64, keeps
-- the variance to a relative error of about 1e-15 * (1 + mean^2 / variance).
merged as (
    select
        run,
        task,
        site,
        layer,
        neuron,
        any_value(head) as head,
        sum(n)::bigint as n,
        sum(n * mean) / sum(n) as mean,
        sum(m2 + n * mean * mean) / sum(n) as mean_square,
        sum(abs_sum) / sum(n) as abs,
        sum(sqrt_sum) / sum(n) as sqrt,
        sum(pos_sum) / sum(n) as pos,
        sum(neg_sum) / sum(n) as neg,
        sum(pos_count) / sum(n) as freq,
        sum(nonzero_count) / sum(n) as nonzero,
        min(min) as min,
        max(max) as max
    from stats
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
