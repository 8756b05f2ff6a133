-- name: layer_profile
-- purpose: How many of each task's selected neurons lie in each layer.
-- param: analysis - id of the analysis
-- param: metric - importance metric
-- param: fraction - fraction of the neurons that was selected
-- grain: one row per (site, task, layer)
with

selected as (
    select site, task, layer, count(*) as num_selected
    from selections
    where analysis = $analysis and metric = $metric and fraction = $fraction
    group by site, task, layer
),

-- Every layer of every task, so that layers without a selected neuron count as well.
layers as (
    select distinct t.site, t.task, l.layer
    from (select distinct site, task from selected) as t
    join (select distinct site, layer from importance where analysis = $analysis) as l
        on t.site = l.site
)

select l.site, l.task, l.layer, coalesce(s.num_selected, 0) as num_selected
from layers as l
left join selected as s on l.site = s.site and l.task = s.task and l.layer = s.layer
order by l.site, l.task, l.layer
