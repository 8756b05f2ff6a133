-- name: report_effects
-- purpose: How much more a task loses without its own neurons than without random ones.
-- param: analysis - id of the ablation
-- grain: one row per (measure, kind, fraction, task)
select
    measure,
    kind,
    fraction,
    task,
    unpruned,
    selected_change,
    random_change,
    excess,
    excess_lower,
    excess_upper
from ablation_effects
where analysis = $analysis and task = evaluated and measure in ('loss', 'top1')
order by measure, kind, fraction, task
