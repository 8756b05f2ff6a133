-- name: reconcile
-- purpose: Committed shards whose tables do not agree with one another or with their record.
-- grain: one row per (run, task, shard) that disagrees
with

token_counts as (
    select run, task, shard, count(*) as tokens, count(*) filter (counted) as counted
    from tokens
    anti join quarantine using (run, task, shard, sample)
    group by run, task, shard
),

-- A record counts what was computed: the samples that were set aside are counted apart.
sample_counts as (
    select run, task, shard, count(*) as samples, sum(num_tokens) as tokens
    from samples
    anti join quarantine using (run, task, shard, sample)
    group by run, task, shard
),

-- There must be none of these.
quarantined_tokens as (
    select run, task, shard, count(*) as tokens
    from tokens
    semi join quarantine using (run, task, shard, sample)
    group by run, task, shard
),

quarantine_counts as (
    select run, task, shard, count(*) as samples
    from quarantine
    semi join samples using (run, task, shard, sample)
    group by run, task, shard
),

prediction_counts as (
    select run, task, shard, count(*) as samples
    from predictions
    anti join quarantine using (run, task, shard, sample)
    group by run, task, shard
),

stat_counts as (
    select
        run,
        task,
        shard,
        count(*) as neurons,
        count(distinct (site, layer, neuron)) as distinct_neurons,
        min(n) as least,
        max(n) as most
    from stats
    group by run, task, shard
),

-- All lists of a shard are as long as k and the positions that count allow.
top_counts as (
    select
        run,
        task,
        shard,
        count(*) as neurons,
        count(distinct (site, layer, neuron)) as distinct_neurons,
        min(least(len(highest), len(lowest))) as least,
        max(greatest(len(highest), len(lowest))) as most
    from top
    group by run, task, shard
),

pooled_counts as (
    select
        run,
        task,
        shard,
        count(*) as neurons,
        count(distinct (site, layer, neuron)) as distinct_neurons,
        min(len(sample)) as least,
        max(len(sample)) as most
    from pooled
    group by run, task, shard
),

expected as (
    select
        c.run,
        c.task,
        c.shard,
        c.num_samples,
        c.num_tokens,
        c.num_counted,
        c.num_quarantined,
        r.num_neurons,
        if(r.top > 0, r.num_neurons, null) as top_neurons,
        if(r.top > 0, least(r.top, c.num_counted), null) as top_length,
        if(len(r.pooled) > 0, r.num_neurons, null) as pooled_neurons,
        if(len(r.pooled) > 0, c.num_samples, null) as pooled_length
    from commits as c
    join runs as r on c.run = r.run
)

select
    e.run,
    e.task,
    e.shard,
    e.num_samples,
    s.samples as sample_rows,
    p.samples as predicted_samples,
    e.num_quarantined,
    q.samples as quarantined_rows,
    e.num_tokens,
    t.tokens as token_rows,
    u.tokens as quarantined_tokens,
    e.num_counted,
    t.counted as counted_tokens,
    x.least as least_n,
    x.most as most_n,
    e.top_length,
    y.least as least_top,
    y.most as most_top,
    y.neurons as top_rows,
    e.pooled_length,
    o.least as least_pooled,
    o.most as most_pooled,
    o.neurons as pooled_rows,
    e.num_neurons,
    x.neurons as neuron_rows
from expected as e
left join token_counts as t using (run, task, shard)
left join quarantined_tokens as u using (run, task, shard)
left join quarantine_counts as q using (run, task, shard)
left join sample_counts as s using (run, task, shard)
left join prediction_counts as p using (run, task, shard)
left join stat_counts as x using (run, task, shard)
left join top_counts as y using (run, task, shard)
left join pooled_counts as o using (run, task, shard)
where
    coalesce(s.samples, 0) != e.num_samples
    -- Language models and models without a head predict no samples.
    or p.samples != e.num_samples
    or coalesce(s.tokens, 0) != e.num_tokens
    or coalesce(t.tokens, 0) != e.num_tokens
    or coalesce(t.counted, 0) != e.num_counted
    or coalesce(q.samples, 0) != e.num_quarantined
    or u.tokens is not null
    or x.least is distinct from e.num_counted
    or x.most is distinct from e.num_counted
    or x.neurons is distinct from e.num_neurons
    or x.distinct_neurons is distinct from e.num_neurons
    or y.neurons is distinct from e.top_neurons
    or y.distinct_neurons is distinct from e.top_neurons
    or y.least is distinct from e.top_length
    or y.most is distinct from e.top_length
    or o.neurons is distinct from e.pooled_neurons
    or o.distinct_neurons is distinct from e.pooled_neurons
    or o.least is distinct from e.pooled_length
    or o.most is distinct from e.pooled_length
order by e.run, e.task, e.shard
