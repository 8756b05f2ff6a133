-- name: cross_matrix
-- purpose: What is left of each task's top-1 when the model is pruned for one.
-- param: analysis - id of the analysis
-- grain: one row per (task, evaluated)
select
    task,
    evaluated,
    reached,
    fraction,
    ratio,
    ratio_lower,
    ratio_upper,
    top1_unpruned
from cross_evaluations
where analysis = $analysis
order by task, evaluated
