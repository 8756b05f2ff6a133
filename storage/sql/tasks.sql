-- name: tasks
-- purpose: The tasks of each run: where their text came from, what was planned, what is committed.
-- column: run - id of the run
-- column: task - name of the task
-- column: is_reference - whether the task was the reference when the run began
-- column: source - dataset, files or members that documents come from
-- column: num_documents - documents read
-- column: num_empty - documents set aside because no token that counts was in them
-- column: num_samples - planned samples
-- column: num_tokens - planned tokens
-- column: num_counted - planned tokens that count in statistics
-- column: num_shards - planned shards
-- column: committed_shards - committed shards
-- column: committed_tokens - committed tokens
-- column: committed_counted - committed tokens that count in statistics
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
