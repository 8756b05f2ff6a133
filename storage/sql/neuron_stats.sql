-- name: neuron_stats
-- purpose: Statistics of every neuron, merged over all committed shards of a task.
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
