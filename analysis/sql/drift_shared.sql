-- name: drift_shared
-- purpose: How many neurons both runs select for a task, against chance.
-- param: reference - name of the reference task, which is not scored
-- grain: one row per (task, metric, site, fraction, layer or whole model)
with

fractions as (
    select distinct fraction from computed_quotas
),

-- The first fraction that selects the neuron in each run; null if none does.
selected as (
    select task, metric, site, layer, a.entry as entry_a, b.entry as entry_b
    from computed_ranks as a
    full join computed_ranks_b as b using (task, metric, site, layer, neuron)
),

counted as (
    select
        s.task,
        s.metric,
        s.site,
        f.fraction,
        s.layer,
        count(*) filter (s.entry_a <= f.fraction) as size_a,
        count(*) filter (s.entry_b <= f.fraction) as size_b,
        count(*) filter (s.entry_a <= f.fraction and s.entry_b <= f.fraction) as shared
    from selected as s
    cross join fractions as f
    group by s.task, s.metric, s.site, f.fraction, grouping sets ((s.layer), ())
),

-- Layers in which neither run selects a neuron have a row too.
filled as (
    select
        e.task,
        e.metric,
        e.site,
        f.fraction,
        e.layer,
        e.population,
        coalesce(c.size_a, 0) as size_a,
        coalesce(c.size_b, 0) as size_b,
        coalesce(c.shared, 0) as shared
    from computed_drift_errors as e
    cross join fractions as f
    left join counted as c
        on e.task = c.task
        and e.metric = c.metric
        and e.site = c.site
        and f.fraction = c.fraction
        and e.layer is not distinct from c.layer
    where e.task <> $reference
)

select
    *,
    size_a * size_b / population as expected,
    hypergeometric_tail(shared, population, size_a, size_b) as p_value
from filled
