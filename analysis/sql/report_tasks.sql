-- name: report_tasks
-- purpose: What was captured of each task and how well the model predicts it.
-- param: runs - ids of the runs
-- grain: one row per (run, task)
with

predicted as (
    select run, task, loss, top1, top10 from tokens
    where list_contains($runs, run) and counted and loss is not null
    union all
    select run, task, loss, top1, top10 from predictions
    where list_contains($runs, run) and loss is not null
),

accuracy as (
    select
        run,
        task,
        count(*) as predictions,
        avg(loss) as loss,
        avg(top1::integer) as top1,
        avg(top10::integer) as top10
    from predicted
    group by run, task
)

select
    t.run,
    t.task,
    t.is_reference,
    -- Of files in folders of this machine, their own names.
    regexp_replace(
        t.source,
        '(^|, )(?:file:/|~[^/,]*|[.][.]?)?/(?:(?:[^,]|,[^ ])*/)?((?:[^,/]|,[^ /])+)',
        '\1\2',
        'g'
    ) as source,
    t.committed_tokens,
    a.predictions,
    a.loss,
    a.top1,
    a.top10
from tasks as t
left join accuracy as a on t.run = a.run and t.task = a.task
where list_contains($runs, t.run)
order by list_position($runs, t.run), t.is_reference, t.task
