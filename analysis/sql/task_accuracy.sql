-- name: task_accuracy
-- purpose: How well the model predicts the tokens of each task.
-- param: run - id of the run
-- grain: one row per task
select
    task,
    count(*) as tokens,
    avg(loss) as loss,
    avg(top1::integer) as top1,
    avg(top10::integer) as top10
from tokens
where run = $run and counted and loss is not null
group by task
order by loss
