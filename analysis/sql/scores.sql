-- name: scores
-- purpose: Importance in each task against importance in the reference task.
-- param: reference - name of the reference task
-- param: eps_mlp - added to the reference importance at site mlp
-- param: eps_attn - added to the reference importance at site attn
-- grain: one row per (task, metric, site, layer, neuron), without the reference task
with

reference as (
    select
        metric,
        site,
        layer,
        neuron,
        importance,
        case site when 'mlp' then $eps_mlp when 'attn' then $eps_attn end as eps
    from computed_importance
    where task = $reference
)

select
    i.run,
    i.task,
    $reference::name as reference,
    i.metric,
    i.site,
    i.layer,
    i.neuron,
    i.head,
    case i.metric
        when 'mean' then abs(i.importance - r.importance)
        when 'rand' then i.importance
        else i.importance / (r.importance + r.eps)
    end as score
from computed_importance as i
join reference as r using (metric, site, layer, neuron)
where i.task <> $reference
{order}
