-- name: selections
-- purpose: The top fraction of neurons by score, for each fraction asked for.
-- param: within - 'model' or 'layer'
-- grain: one row per (task, metric, site, fraction, layer, neuron)
select
    r.run,
    r.task,
    r.metric,
    r.site,
    $within as within,
    q.fraction,
    r.layer,
    r.neuron,
    r.score,
    r.rank::integer as rank
from computed_ranks as r
join (select distinct fraction from computed_quotas) as q on r.entry <= q.fraction
order by r.metric, r.site, r.task, q.fraction, r.layer, r.neuron
