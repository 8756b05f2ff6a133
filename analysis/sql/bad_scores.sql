-- name: bad_scores
-- purpose: The first row that cannot be ranked: something missing or out of range.
-- grain: at most one row
select task, site, layer, neuron, score
from computed_scores
where
    task is null
    or site is null
    or layer is null
    or layer < 0
    or neuron is null
    or neuron < 0
    or score is null
    or isnan(score)
    or isinf(score)
order by task, site, layer, neuron
limit 1
