-- name: example_overlap
-- purpose: Which tasks share more neurons than chance would have it.
-- grain: one row per (run, site, pair of tasks)
select run, site, task_a, task_b, shared, round(expected, 1) as by_chance, round(lift, 1) as lift
from overlap
where
    metric = 'abs'
    and layer is null
    and task_a < task_b
    and fraction = (select min(fraction) from overlap)
order by lift desc
limit 20
