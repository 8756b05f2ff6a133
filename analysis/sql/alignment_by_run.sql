-- name: alignment_by_run
-- purpose: How experts match the selections of tasks, over all layers; spread is that of tasks.
-- param: analysis - id of the alignment
-- param: metric - one of its metrics
-- param: fraction - one of its fractions
-- grain: one row per (experts, run)
with

enriched as (
    select experts, run, task, layer, sum(held) filter (p_value <= 0.001) / sum(held) as share
    from cluster_enrichment
    where analysis = $analysis and metric = $metric and fraction = $fraction
    group by all
),

tasks as (
    select
        a.experts,
        any_value(a.experts_run) as experts_run,
        any_value(a.method) as method,
        a.run,
        a.task,
        avg(a.auc) as auc,
        avg(a.auc_best) as auc_best,
        avg(a.auc_random) as auc_random,
        avg(a.ami) as ami,
        avg(coalesce(e.share, 0)) as enriched
    from cluster_alignment as a
    join enriched as e
        on a.experts = e.experts and a.run = e.run and a.task = e.task and a.layer = e.layer
    where a.analysis = $analysis and a.metric = $metric and a.fraction = $fraction
    group by a.experts, a.run, a.task
)

select
    experts,
    any_value(experts_run) as experts_run,
    any_value(method) as method,
    run,
    count(*) as num_tasks,
    avg(auc) as auc,
    stddev_samp(auc) as auc_std,
    avg(auc_best) as auc_best,
    avg(auc_random) as auc_random,
    avg(ami) as ami,
    stddev_samp(ami) as ami_std,
    avg(enriched) as enriched
from tasks
group by experts, run
order by experts, run
