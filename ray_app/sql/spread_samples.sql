-- name: spread_samples
-- purpose: Committed samples spread evenly over a run, with how well they were predicted.
-- param: run - id of the run
-- param: count - number of samples wanted
-- grain: one row per sample
with

numbered as (
    select
        task,
        shard,
        sample,
        row_number() over (order by task, shard, sample) - 1 as place,
        count(*) over () as total
    from samples
    anti join quarantine using (run, task, sample)
    where run = $run
),

-- Every (total / count)-th sample; all of them if fewer were committed than asked for.
chosen as (
    select * from numbered
    where place * $count // total > (place - 1) * $count // total or place = 0
),

predicted as (
    select task, sample, position, loss, top1 from tokens
    where run = $run and loss is not null
    union all
    select task, sample, 0 as position, loss, top1 from predictions
    where run = $run and loss is not null
),

by_sample as (
    select
        task,
        sample,
        list(loss order by position) as loss,
        list(top1 order by position) as top1
    from predicted
    group by task, sample
)

select
    c.task,
    c.shard,
    c.sample,
    coalesce(p.loss, []) as loss,
    coalesce(p.top1, []) as top1
from chosen as c
left join by_sample as p on c.task = p.task and c.sample = p.sample
order by c.task, c.shard, c.sample
