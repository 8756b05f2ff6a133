-- name: persistence_pairs
-- purpose: What share of their selections two tasks have in common, in both runs.
-- grain: one row per (metric, site, fraction, layer or whole model, task_a, task_b), task_a < task_b
with

a as (
    select
        metric,
        site,
        fraction,
        layer,
        least(task_a, task_b) as task_a,
        greatest(task_a, task_b) as task_b,
        -- Of selections of one size, both orders give the same.
        avg(coalesce(share_of_a, 0)) as share
    from computed_overlap
    group by metric, site, fraction, layer, least(task_a, task_b), greatest(task_a, task_b)
),

b as (
    select
        metric,
        site,
        fraction,
        layer,
        least(task_a, task_b) as task_a,
        greatest(task_a, task_b) as task_b,
        avg(coalesce(share_of_a, 0)) as share
    from computed_overlap_b
    group by metric, site, fraction, layer, least(task_a, task_b), greatest(task_a, task_b)
)

select
    a.metric,
    a.site,
    a.fraction,
    a.layer,
    a.task_a,
    a.task_b,
    a.share as share_a,
    b.share as share_b
from a
join b
    on a.metric = b.metric
    and a.site = b.site
    and a.fraction = b.fraction
    and a.layer is not distinct from b.layer
    and a.task_a = b.task_a
    and a.task_b = b.task_b
order by a.metric, a.site, a.fraction, a.layer nulls first, a.task_a, a.task_b
