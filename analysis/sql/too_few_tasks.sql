-- name: too_few_tasks
-- purpose: How many tasks have scores, if they are too few to compare.
-- grain: at most one row
select count(distinct task) as num_tasks
from computed_scores
having count(distinct task) < 2
