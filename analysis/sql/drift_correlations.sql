-- name: drift_correlations
-- purpose: Spearman's rank correlation of importance in the two runs; equal values share a rank.
-- grain: one row per (task, metric, site, layer or whole model)
with

strata as (
    select task, metric, site, layer, a, b from computed_drift_pairs
    union all
    select task, metric, site, null as layer, a, b from computed_drift_pairs
),

-- Twice the mean rank of neurons that are tied is a whole number, so all sums below are exact and
-- do not depend on the order in which threads add.
ranked as (
    select
        task,
        metric,
        site,
        layer,
        2 * rank() over (partition by task, metric, site, layer order by a)
        + count(*) over (partition by task, metric, site, layer, a) - 1 as rank_a,
        2 * rank() over (partition by task, metric, site, layer order by b)
        + count(*) over (partition by task, metric, site, layer, b) - 1 as rank_b
    from strata
),

sums as (
    select
        task,
        metric,
        site,
        layer,
        count(*)::hugeint as n,
        sum(rank_a) as a,
        sum(rank_b) as b,
        sum(rank_a * rank_a) as aa,
        sum(rank_b * rank_b) as bb,
        sum(rank_a * rank_b) as ab
    from ranked
    group by all
),

moments as (
    select
        task,
        metric,
        site,
        layer,
        (n * ab - a * b)::double as covariance,
        (n * aa - a * a)::double as variance_a,
        (n * bb - b * b)::double as variance_b
    from sums
)

select
    task,
    metric,
    site,
    layer,
    covariance / nullif(sqrt(variance_a * variance_b), 0) as correlation
from moments
