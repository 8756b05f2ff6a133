-- name: report_runs
-- purpose: Which models were captured, how far, and their tasks.
-- param: runs - ids of the runs
-- grain: one row per run, in the order of the ids
with

task_names as (
    select run, string_agg(task, ', ' order by task) as tasks
    from tasks
    group by run
)

select
    r.run,
    r.study,
    r.created::varchar as created,
    -- Of a model in a folder of this machine, its own name.
    regexp_replace(r.model, '^(?:file:/|~[^/]*|[.][.]?)?/(?:.*/)?([^/]+)/?$', '\1') as model,
    r.init,
    r.architecture,
    r.dtype,
    r.quantization,
    r.num_layers,
    r.num_neurons,
    t.tasks,
    r.reference,
    r.num_tokens,
    r.is_complete
from runs as r
join task_names as t on r.run = t.run
where list_contains($runs, r.run)
order by list_position($runs, r.run)
