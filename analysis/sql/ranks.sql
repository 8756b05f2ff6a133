-- name: ranks
-- purpose: The neurons that the largest fraction selects: rank, and first fraction that selects.
-- param: within - 'model' or 'layer'
-- param: rest - 1 - the largest fraction
-- grain: one row per (task, metric, site, layer, neuron) selected by the largest fraction
with

candidates as (
    select *, case $within when 'layer' then layer end as stratum
    from computed_scores
),

-- Sorting only what can be selected is several times faster than sorting everything. The score at
-- this quantile is never above the last one that is selected, and its ties are kept.
thresholds as (
    select task, metric, site, stratum, quantile_disc(score, $rest) as threshold
    from candidates
    group by all
),

selectable as (
    select c.*
    from candidates as c
    join thresholds as t
        on c.task = t.task
        and c.metric = t.metric
        and c.site = t.site
        and c.stratum is not distinct from t.stratum
    where c.score >= t.threshold
),

-- Ties go to the lower layer, then to the lower neuron.
ranked as (
    select
        *,
        row_number() over (
            partition by task, metric, site, stratum
            order by score desc, layer, neuron
        ) as rank
    from selectable
),

quotas as (
    select
        task,
        metric,
        site,
        stratum,
        list(fraction order by fraction) as fractions,
        list(quota order by fraction) as quotas
    from computed_quotas
    group by all
)

select
    r.*,
    q.fractions[len(list_filter(q.quotas, lambda quota: quota < r.rank)) + 1] as entry
from ranked as r
join quotas as q
    on r.task = q.task
    and r.metric = q.metric
    and r.site = q.site
    and r.stratum is not distinct from q.stratum
where r.rank <= q.quotas[-1]
