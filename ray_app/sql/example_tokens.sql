-- name: example_tokens
-- purpose: Which tokens surprise the model most.
-- grain: one row per (task, token)
select task, token, count(*) as times, round(avg(loss), 2) as loss
from tokens
where position > 0 and counted
group by task, token
having count(*) > 1
order by loss desc
limit 20
