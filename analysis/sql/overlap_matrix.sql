-- name: overlap_matrix
-- purpose: Overlap of every two tasks over the whole model, for a matrix.
-- param: analysis - id of the analysis
-- param: metric - importance metric
-- param: fraction - fraction of the neurons that was selected
-- grain: one row per (site, task_a, task_b)
select site, task_a, task_b, share_of_a, lift, p_value
from overlap
where
    analysis = $analysis
    and metric = $metric
    and fraction = $fraction
    and layer is null
order by site, task_a, task_b
