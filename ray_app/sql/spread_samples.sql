-- name: spread_samples
-- purpose: Committed samples spread evenly over a run, with what the store says of their tokens.
-- param: run - id of the run
-- param: count - number of samples wanted
-- grain: one row per sample
with

numbered as (
    select
        task,
        shard,
        sample,
        token_ids,
        counted,
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

predictions as (
    select
        task,
        sample,
        list(loss order by position) filter (position > 0) as loss,
        list(top1 order by position) filter (position > 0) as top1
    from tokens
    where run = $run
    group by task, sample
)

select c.task, c.shard, c.sample, c.token_ids, c.counted, p.loss, p.top1
from chosen as c
join predictions as p on c.task = p.task and c.sample = p.sample
order by c.task, c.shard, c.sample
