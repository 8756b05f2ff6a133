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

-- A rank belongs to the first fraction whose quota reaches it.
entries as (
    select
        task,
        metric,
        site,
        stratum,
        fraction as entry,
        quota as last_rank,
        lag(quota, 1, 0) over (
            partition by task, metric, site, stratum
            order by fraction
        ) as rank_before
    from computed_quotas
)

select r.*, e.entry
from ranked as r
join entries as e
    on r.task = e.task
    and r.metric = e.metric
    and r.site = e.site
    and r.stratum is not distinct from e.stratum
    and r.rank > e.rank_before
    and r.rank <= e.last_rank
