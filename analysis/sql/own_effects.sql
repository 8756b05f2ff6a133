-- name: own_effects
-- purpose: What the removal of a task's own neurons does to its loss, beside random ones.
-- param: analysis - id of the analysis
-- grain: one row per (task, kind, fraction)
select
    task,
    kind,
    fraction,
    unpruned,
    selected_change,
    random_change,
    excess,
    excess_lower,
    excess_upper
from ablation_effects
where analysis = $analysis and measure = 'loss' and evaluated = task
order by kind, task, fraction
