-- name: few_tasks
-- purpose: How many tasks have scores, if fewer than the two that a comparison takes.
-- grain: at most one row
select count(distinct task) as num_tasks
from computed_scores
having count(distinct task) < 2
