-- name: routing_by_share
-- purpose: What routers keep of a token's activation, as means over layers, and what that costs.
-- param: analysis - id of the routing
-- grain: one row per (experts, task, router, share), the whole model first
with

masses as (
    select
        experts,
        task,
        router,
        share,
        avg(mass_kept) as mass_kept,
        avg(mass_ratio) as mass_ratio
    from routing_layers
    where analysis = $analysis
    group by all
)

select
    r.experts,
    r.method,
    r.task,
    r.router,
    r.share,
    m.mass_kept,
    m.mass_ratio,
    r.mean_loss,
    r.loss_change,
    r.top1_share
from routing as r
left join masses as m using (experts, task, router, share)
where r.analysis = $analysis
order by
    r.task,
    r.experts,
    list_position(['all', 'truth', 'learned', 'centroid', 'random'], r.router),
    r.share
