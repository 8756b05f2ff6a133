-- name: neuron_pairs
-- purpose: How often two neurons of a layer are active together, and how they correlate.
-- column: run - id of the run
-- column: task - name of the task
-- column: site - 'attn' or 'mlp'
-- column: layer - index of the layer, from 0
-- column: neuron - index of the first neuron inside its site and layer, from 0
-- column: other - index of the second one; both orders of a pair, and each neuron with itself
-- column: n - number of counted positions
-- column: together - share of positions at which both are > 0
-- column: expected - the share if they were independent: the product of the two shares
-- column: lift - together / expected; null if nothing is expected
-- column: correlation - Pearson's correlation of their activations; null if one never changes
-- grain: one row per (run, task, site, layer, neuron, other)
with

pairs as (
    select
        run,
        task,
        site,
        layer,
        neuron,
        n,
        unnest(together) as together,
        unnest(product) as product,
        unnest(range(len(together)))::integer as other
    from coactivation
    -- A shard whose samples were all set aside has no positions.
    where n > 0
),

merged as (
    select
        run,
        task,
        site,
        layer,
        neuron,
        other,
        sum(n)::bigint as n,
        sum(together) / sum(n) as together,
        fsum(product) / sum(n) as product
    from pairs
    group by run, task, site, layer, neuron, other
)

select
    m.run,
    m.task,
    m.site,
    m.layer,
    m.neuron,
    m.other,
    m.n,
    m.together,
    a.freq * b.freq as expected,
    m.together / nullif(a.freq * b.freq, 0) as lift,
    -- Rounding may leave a hair more than 1, and of a neuron that never changes some 1e-16 of its
    -- square; greatest and least would skip a null.
    case
        when a.std > 1e-6 * abs(a.mean) and b.std > 1e-6 * abs(b.mean) then
            greatest(-1, least(1, (m.product - a.mean * b.mean) / (a.std * b.std)))
    end as correlation
from merged as m
join neuron_stats as a
    on m.run = a.run and m.task = a.task and m.site = a.site and m.layer = a.layer
    and m.neuron = a.neuron
join neuron_stats as b
    on m.run = b.run and m.task = b.task and m.site = b.site and m.layer = b.layer
    and m.other = b.neuron
