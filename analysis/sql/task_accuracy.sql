-- name: task_accuracy
-- purpose: How well the model predicts each task: its tokens, or the classes of its images.
-- param: run - id of the run
-- grain: one row per task
with

predicted as (
    select task, loss, top1, top10 from tokens
    where run = $run and counted and loss is not null
    union all
    select task, loss, top1, top10 from predictions
    where run = $run and loss is not null
)

select
    task,
    count(*) as predictions,
    avg(loss) as loss,
    avg(top1::integer) as top1,
    avg(top10::integer) as top10
from predicted
group by task
order by loss
