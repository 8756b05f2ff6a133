-- name: example_loss
-- purpose: How well the model predicts each task.
-- grain: one row per (run, task)
select
    run,
    task,
    count(loss) as predictions,
    round(avg(loss), 3) as loss,
    round(avg(top1::int), 3) as top1
from tokens
where counted
group by run, task
order by run, loss
