-- name: reconcile
-- purpose: Committed shards whose tables do not agree with one another or with their record.
-- grain: one row per (run, task, shard) that disagrees
with

token_counts as (
    select run, task, shard, count(*) as tokens, count(*) filter (counted) as counted
    from tokens
    group by run, task, shard
),

sample_counts as (
    select run, task, shard, count(*) as samples, sum(num_tokens) as tokens
    from samples
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

expected as (
    select c.run, c.task, c.shard, c.num_samples, c.num_tokens, c.num_counted, r.num_neurons
    from commits as c
    join runs as r on c.run = r.run
)

select
    e.run,
    e.task,
    e.shard,
    e.num_samples,
    s.samples as sample_rows,
    e.num_tokens,
    t.tokens as token_rows,
    e.num_counted,
    t.counted as counted_tokens,
    x.least as least_n,
    x.most as most_n,
    e.num_neurons,
    x.neurons as neuron_rows
from expected as e
left join token_counts as t using (run, task, shard)
left join sample_counts as s using (run, task, shard)
left join stat_counts as x using (run, task, shard)
where
    s.samples is distinct from e.num_samples
    or s.tokens is distinct from e.num_tokens
    or t.tokens is distinct from e.num_tokens
    or t.counted is distinct from e.num_counted
    or x.least is distinct from e.num_counted
    or x.most is distinct from e.num_counted
    or x.neurons is distinct from e.num_neurons
    or x.distinct_neurons is distinct from e.num_neurons
order by e.run, e.task, e.shard
