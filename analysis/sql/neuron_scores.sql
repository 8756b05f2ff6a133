-- name: neuron_scores
-- purpose: How one neuron scored in each task, its rank, and the fractions it was selected in.
-- param: analysis - id of the analysis
-- param: metric - importance metric
-- param: within - 'model' or 'layer': the neurons among which it has its rank
-- param: site - its site
-- param: layer - its layer
-- param: neuron - its index
-- grain: one row per task
with

rivals as (
    select
        *,
        layer = $layer and neuron = $neuron as is_it
    from scores
    where
        analysis = $analysis
        and metric = $metric
        and site = $site
        and ($within = 'model' or layer = $layer)
),

it as (
    select task, score from rivals where is_it
),

-- Ties by layer, then neuron, as selections have them.
places as (
    select
        r.task,
        any_value(it.score) as score,
        count(*) as population,
        1 + count(*) filter (
            where
            r.score > it.score
            or (r.score = it.score and (r.layer, r.neuron) < ($layer::smallint, $neuron::integer))
        ) as rank
    from rivals as r
    join it using (task)
    group by r.task
),

selected as (
    select task, list(fraction order by fraction) as fractions
    from selections
    where
        analysis = $analysis
        and metric = $metric
        and site = $site
        and layer = $layer
        and neuron = $neuron
    group by task
)

select
    p.task,
    i.importance,
    p.score,
    p.rank,
    p.population,
    coalesce(s.fractions, []) as fractions
from places as p
join importance as i
    on
        p.task = i.task
        and i.analysis = $analysis
        and i.metric = $metric
        and i.site = $site
        and i.layer = $layer
        and i.neuron = $neuron
left join selected as s on p.task = s.task
order by p.score desc, p.task
