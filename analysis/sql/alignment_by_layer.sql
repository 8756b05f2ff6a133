-- name: alignment_by_layer
-- purpose: Mean and spread over tasks of how experts match selections, in each layer.
-- param: analysis - id of the alignment
-- param: metric - one of its metrics
-- param: fraction - one of its fractions; null for all
-- grain: one row per (experts, run, fraction, layer)
with

enriched as (
    select
        experts,
        run,
        task,
        fraction,
        layer,
        sum(held) filter (p_value <= 0.001) / sum(held) as share
    from cluster_enrichment
    where
        analysis = $analysis
        and metric = $metric
        and ($fraction::double is null or fraction = $fraction)
    group by all
)

select
    a.experts,
    any_value(a.experts_run) as experts_run,
    any_value(a.method) as method,
    a.run,
    a.fraction,
    a.layer,
    count(distinct a.task) as num_tasks,
    avg(a.auc) as auc,
    stddev_samp(a.auc) as auc_std,
    avg(a.auc_best) as auc_best,
    avg(a.auc_random) as auc_random,
    avg(a.ami) as ami,
    stddev_samp(a.ami) as ami_std,
    avg(coalesce(e.share, 0)) as enriched
from cluster_alignment as a
join enriched as e
    on a.experts = e.experts
    and a.run = e.run
    and a.task = e.task
    and a.fraction = e.fraction
    and a.layer = e.layer
where
    a.analysis = $analysis
    and a.metric = $metric
    and ($fraction::double is null or a.fraction = $fraction)
group by a.experts, a.run, a.fraction, a.layer
order by a.experts, a.run, a.fraction, a.layer
