-- name: report_enrichment
-- purpose: The experts of each layer in which some task is richest, by the scores of their own run.
-- param: analysis - id of the alignment
-- param: metric - one of its metrics
-- param: count - most experts of each layer
-- grain: one row per (experts, fraction, layer, expert, task)
with

own as (
    select *
    from cluster_enrichment
    where analysis = $analysis and metric = $metric and run = experts_run
),

ranked as (
    select
        experts,
        fraction,
        layer,
        expert,
        row_number() over (
            partition by experts, fraction, layer
            order by min(p_value), max(lift) desc, expert
        ) as place
    from own
    group by experts, fraction, layer, expert
)

select
    o.experts,
    o.method,
    o.run,
    o.fraction,
    o.layer,
    o.expert,
    o.task,
    o.size,
    o.held,
    o.lift,
    o.p_value
from own as o
join ranked as r
    on o.experts = r.experts
    and o.fraction = r.fraction
    and o.layer = r.layer
    and o.expert = r.expert
where r.place <= $count
order by o.experts, o.fraction, o.layer, o.expert, o.task
