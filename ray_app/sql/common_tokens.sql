-- name: common_tokens
-- purpose: The tokens that a task has most often in places where they are predicted.
-- param: run - id of the run
-- param: task - name of the task
-- param: count - how many tokens
-- grain: one row per token, the most common first; ties by id
select token_id
from tokens
where run = $run and task = $task and counted and loss is not null
group by token_id
order by count(*) desc, token_id
limit $count
