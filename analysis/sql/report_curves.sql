-- name: report_curves
-- purpose: What the removal of a task's own neurons does to it, and that of as many random ones.
-- param: analysis - id of the ablation
-- grain: one row per (measure, kind, task, chosen_by, fraction), fraction 0 being the whole model
with

-- A selection has an interval over samples; of random neurons, the controls span a range.
changes as (
    select
        kind,
        task,
        chosen_by,
        fraction,
        count(*) as num_choices,
        avg(loss_change) as loss_change,
        if(chosen_by = 'score', min(loss_change_lower), min(loss_change)) as loss_lower,
        if(chosen_by = 'score', max(loss_change_upper), max(loss_change)) as loss_upper,
        avg(top1_change) as top1_change,
        if(chosen_by = 'score', min(top1_change_lower), min(top1_change)) as top1_lower,
        if(chosen_by = 'score', max(top1_change_upper), max(top1_change)) as top1_upper
    from evaluations
    where analysis = $analysis and task = evaluated and label is null
    group by kind, task, chosen_by, fraction
),

starts as (
    select distinct kind, task, chosen_by, 0 as fraction, 0 as num_choices, 0, 0, 0, 0, 0, 0
    from changes
),

points as (
    from changes
    union all
    from starts
),

measures as (
    select
        'loss (nats)' as measure, kind, task, chosen_by, fraction, num_choices,
        loss_change as change, loss_lower as lower, loss_upper as upper
    from points
    union all
    select
        'top-1 (share)' as measure, kind, task, chosen_by, fraction, num_choices,
        top1_change as change, top1_lower as lower, top1_upper as upper
    from points
)

from measures
order by measure, kind, task, chosen_by desc, fraction
