-- name: drift_tasks
-- purpose: How well the model predicts each task, and a digest of the inputs that it read.
-- param: run - id of the run
-- grain: one row per task
with

predicted as (
    select task, loss, top1 from tokens
    where run = $run and counted and loss is not null
    union all
    select task, loss, top1 from predictions
    where run = $run and loss is not null
),

-- Threads meet tokens in any order: fsum carries what rounding loses.
accuracy as (
    select
        task,
        fsum(loss::double) / count(*) as loss,
        sum(top1::bigint) / count(*) as top1
    from predicted
    group by task
),

inputs as (
    select task, count(*) as num_samples, bit_xor(hash(sample, token_ids, image, counted)) as digest
    from samples
    where run = $run
    group by task
)

select i.task, i.num_samples, i.digest, p.loss, p.top1
from inputs as i
left join accuracy as p on i.task = p.task
