-- name: overlap
-- purpose: How many neurons the selections of two tasks share, against chance.
-- param: within - 'model' or 'layer'
-- grain: one row per (metric, site, fraction, layer or whole model, task_a, task_b)
with

-- Neurons that two tasks share, by the smallest fraction that selects them for both: one join
-- serves all fractions.
met as (
    select
        a.metric,
        a.site,
        a.layer,
        a.task as task_a,
        b.task as task_b,
        greatest(a.entry, b.entry) as entry,
        count(*) as shared
    from computed_ranks as a
    join computed_ranks as b
        on a.metric = b.metric
        and a.site = b.site
        and a.layer = b.layer
        and a.neuron = b.neuron
        and a.task < b.task
    group by all
),

first_selected as (
    select metric, site, layer, task, entry, count(*) as size
    from computed_ranks
    group by all
),

-- All tasks score the same neurons, so one speaks for all. Layer null is the whole model.
populations as (
    select metric, site, layer, count(*) as population
    from computed_scores
    where task = (select min(task) from computed_scores)
    group by metric, site, grouping sets ((layer), ())
),

tasks as (
    select distinct task from computed_quotas
),

fractions as (
    select distinct fraction from computed_quotas
),

grid as (
    select p.metric, p.site, p.layer, p.population, f.fraction, a.task as task_a, b.task as task_b
    from populations as p
    cross join fractions as f
    cross join tasks as a
    join tasks as b on a.task < b.task
),

sizes as (
    select e.metric, e.site, e.layer, f.fraction, e.task, sum(e.size) as size
    from first_selected as e
    join fractions as f on e.entry <= f.fraction
    group by e.metric, e.site, f.fraction, e.task, grouping sets ((e.layer), ())
),

shared as (
    select
        m.metric,
        m.site,
        m.layer,
        f.fraction,
        m.task_a,
        m.task_b,
        sum(m.shared) as shared
    from met as m
    join fractions as f on m.entry <= f.fraction
    group by m.metric, m.site, f.fraction, m.task_a, m.task_b, grouping sets ((m.layer), ())
),

counted as (
    select
        g.metric,
        g.site,
        g.fraction,
        g.layer,
        g.task_a,
        g.task_b,
        g.population,
        coalesce(a.size, 0)::bigint as size_a,
        coalesce(b.size, 0)::bigint as size_b,
        coalesce(s.shared, 0)::bigint as shared
    from grid as g
    left join sizes as a
        on g.metric = a.metric and g.site = a.site and g.fraction = a.fraction
        and g.layer is not distinct from a.layer and g.task_a = a.task
    left join sizes as b
        on g.metric = b.metric and g.site = b.site and g.fraction = b.fraction
        and g.layer is not distinct from b.layer and g.task_b = b.task
    left join shared as s
        on g.metric = s.metric and g.site = s.site and g.fraction = s.fraction
        and g.layer is not distinct from s.layer
        and g.task_a = s.task_a and g.task_b = s.task_b
),

-- Both orders of a pair read this; the test is the dear part.
tested as materialized (
    select
        *,
        size_a * size_b / population as expected,
        hypergeometric_tail(shared, population, size_a, size_b) as p_value
    from counted
),

both_orders as (
    select * from tested
    union all by name
    select * replace (
        task_b as task_a, task_a as task_b, size_b as size_a, size_a as size_b
    )
    from tested
)

select
    (select any_value(run) from computed_ranks) as run,
    metric,
    site,
    $within as within,
    fraction,
    layer,
    task_a,
    task_b,
    population,
    size_a,
    size_b,
    shared,
    shared / nullif(size_a, 0) as share_of_a,
    shared / nullif(size_a + size_b - shared, 0) as jaccard,
    expected,
    shared / nullif(expected, 0) as lift,
    p_value
from both_orders
order by metric, site, fraction, layer nulls first, task_a, task_b
