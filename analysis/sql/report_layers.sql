-- name: report_layers
-- purpose: Which share of each task's selected neurons lies in each layer, at every fraction.
-- param: analyses - ids of the analyses
-- param: metric - importance metric
-- grain: one row per (run, site, fraction, task, layer)
with

selected as (
    select analysis, run, site, fraction, task, layer, count(*) as num_selected
    from selections
    where list_contains($analyses, analysis) and metric = $metric
    group by all
),

-- Every layer of every task, so that layers without a selected neuron count as well.
layers as (
    select distinct analysis, site, layer
    from importance
    where list_contains($analyses, analysis) and metric = $metric
),

places as (
    select t.*, l.layer
    from (select distinct analysis, run, site, fraction, task from selected) as t
    join layers as l on t.analysis = l.analysis and t.site = l.site
)

select
    p.run,
    p.site,
    p.fraction,
    p.task,
    p.layer,
    coalesce(s.num_selected, 0) as num_selected,
    coalesce(s.num_selected, 0) / sum(coalesce(s.num_selected, 0))
        over (partition by p.analysis, p.site, p.fraction, p.task) as share
from places as p
left join selected as s
    on p.analysis = s.analysis
    and p.site = s.site
    and p.fraction = s.fraction
    and p.task = s.task
    and p.layer = s.layer
order by p.site desc, list_position($analyses, p.analysis), p.fraction, p.task, p.layer
