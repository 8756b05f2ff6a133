-- name: report_routing
-- purpose: What routers keep of a token's activation, and how well tasks are predicted then.
-- param: analysis - id of the routing
-- grain: one row per (experts, task, router, share); router all, which keeps all, at every share
with

masses as (
    select
        experts,
        task,
        router,
        share,
        count(*) as num_layers,
        avg(mass_kept) as mass_kept,
        stddev_samp(mass_kept) as mass_kept_std,
        avg(mass_ratio) as mass_ratio,
        stddev_samp(mass_ratio) as mass_ratio_std
    from routing_layers
    where analysis = $analysis
    group by all
),

own as (
    from routing
    where analysis = $analysis
),

shares as (
    select distinct experts, task, share
    from own
    where router <> 'all'
),

-- All experts do not depend on the share: as a line, what routers do is seen against them.
predictions as (
    from own
    where router <> 'all'
    union all
    select o.* replace (s.share as share)
    from own as o
    join shares as s on o.experts = s.experts and o.task = s.task
    where o.router = 'all'
)

select
    p.experts,
    p.method,
    p.task,
    p.router,
    p.share as share_of_experts,
    p.num_kept,
    m.num_layers,
    m.mass_kept,
    m.mass_kept_std,
    m.mass_ratio,
    m.mass_ratio_std,
    p.top1_share as top1,
    p.top1_share - p.top1_change + p.top1_change_lower as top1_lower,
    p.top1_share - p.top1_change + p.top1_change_upper as top1_upper,
    p.mean_loss as loss,
    p.mean_loss - p.loss_change + p.loss_change_lower as loss_lower,
    p.mean_loss - p.loss_change + p.loss_change_upper as loss_upper
from predictions as p
left join masses as m
    on p.experts = m.experts
    and p.task = m.task
    and p.router = m.router
    and p.share = m.share
order by
    p.experts,
    p.task,
    list_position(['truth', 'learned', 'centroid', 'random', 'all'], p.router),
    p.share
