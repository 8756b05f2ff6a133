-- name: persistence
-- purpose: What of the tasks' selections one run has in common with another, and their overlap.
-- param: run_a - id of the first run
-- param: run_b - id of the second run
-- param: within - 'model' or 'layer'
-- grain: one row per (metric, site, fraction, layer or whole model)
with

shares as (
    select *, shared / nullif(size_a, 0) as share from computed_drift_shared
),

-- Threads meet tasks in any order: fsum carries what rounding loses.
counted as (
    select
        metric,
        site,
        fraction,
        layer,
        count(*) as num_tasks,
        sum(size_a) as size_a,
        sum(size_b) as size_b,
        sum(shared) as shared,
        fsum(expected) as expected,
        case
            when count(share) > 0 then sqrt(
                greatest(fsum(share * share) / count(share) - (fsum(share) / count(share)) ** 2, 0)
            )
        end as same_neurons_spread
    from shares
    group by metric, site, fraction, layer
),

wholes as (
    select metric, site, fraction, size_a, size_b from counted where layer is null
)

select
    $run_a as run_a,
    $run_b as run_b,
    c.metric,
    c.site,
    $within as within,
    c.fraction,
    c.layer,
    c.num_tasks,
    m.correlation,
    m.p_value,
    m.num_permutations,
    c.shared / nullif(c.size_a, 0) as same_neurons,
    c.same_neurons_spread,
    c.expected / nullif(c.size_a, 0) as same_by_chance,
    c.shared / nullif(c.expected, 0) as lift,
    c.size_a / nullif(w.size_a, 0) as selected_a,
    c.size_b / nullif(w.size_b, 0) as selected_b
from counted as c
join wholes as w on c.metric = w.metric and c.site = w.site and c.fraction = w.fraction
left join computed_mantel as m
    on c.metric = m.metric
    and c.site = m.site
    and c.fraction = m.fraction
    and c.layer is not distinct from m.layer
order by c.metric, c.site, c.fraction, c.layer nulls first
