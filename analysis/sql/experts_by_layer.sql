-- name: experts_by_layer
-- purpose: How the neurons of each layer were grouped.
-- param: analysis - id of the experts
-- grain: one row per layer
select *
from cluster_layers
where analysis = $analysis
order by layer
