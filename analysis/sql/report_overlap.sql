-- name: report_overlap
-- purpose: Overlap of every two tasks over the whole model, at every fraction.
-- param: analyses - ids of the analyses
-- param: metric - importance metric
-- grain: one row per (run, site, fraction, task_a, task_b)
select
    run,
    site,
    fraction,
    task_a,
    task_b,
    size_a,
    shared,
    share_of_a,
    lift,
    p_value
from overlap
where list_contains($analyses, analysis) and metric = $metric and layer is null
order by site desc, list_position($analyses, analysis), fraction, task_a, task_b
