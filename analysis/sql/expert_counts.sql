-- name: expert_counts
-- purpose: How many neurons that a task selects in a layer lie in each expert.
-- param: experts - ids of analyses that made experts
-- param: run - id of the run that was scored
-- grain: one row per (experts, task, metric, fraction, layer, expert)
with

members as (
    select analysis as experts, run as experts_run, method, layer, neuron, expert
    from clusters
    where list_contains($experts, analysis)
),

sizes as (
    select experts, experts_run, method, layer, expert, count(*) as size
    from members
    group by all
),

counted as (
    select m.experts, r.task, r.metric, q.fraction, r.layer, m.expert, count(*) as held
    from computed_ranks as r
    join (select distinct fraction from computed_quotas) as q on r.entry <= q.fraction
    join members as m on r.layer = m.layer and r.neuron = m.neuron
    group by all
)

select
    s.experts,
    s.experts_run,
    s.method,
    $run as run,
    q.task,
    q.metric,
    q.site,
    q.fraction,
    s.layer,
    s.expert,
    q.population,
    q.quota as num_selected,
    s.size,
    coalesce(c.held, 0)::bigint as held
from sizes as s
join computed_quotas as q on s.layer = q.stratum
left join counted as c
    on s.experts = c.experts and s.layer = c.layer and s.expert = c.expert
    and q.task = c.task and q.metric = c.metric and q.fraction = c.fraction
