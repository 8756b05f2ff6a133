-- name: tasks
-- purpose: The tasks of each run: where their text came from, what was planned, what is committed.
-- grain: one row per (run, task)
with

planned as (
    select run, reference, unnest(tasks) as t from {run_records}
),

committed as (
    select run, task, count(*) as shards, sum(num_tokens) as tokens, sum(num_counted) as counted
    from commits
    group by run, task
)

select
    p.run,
    p.t.task as task,
    p.t.task is not distinct from p.reference as is_reference,
    p.t.source as source,
    p.t.num_documents as num_documents,
    p.t.num_empty as num_empty,
    p.t.num_samples as num_samples,
    p.t.num_tokens as num_tokens,
    p.t.num_counted as num_counted,
    p.t.num_shards as num_shards,
    coalesce(c.shards, 0) as committed_shards,
    coalesce(c.tokens, 0)::bigint as committed_tokens,
    coalesce(c.counted, 0)::bigint as committed_counted
from planned as p
left join committed as c on p.run = c.run and p.t.task = c.task
