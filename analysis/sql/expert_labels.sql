-- name: expert_labels
-- purpose: The expert of every neuron, and how experts were made.
-- param: analysis - id of the experts
-- grain: one row per layer
select
    c.layer,
    list(c.expert order by c.neuron) as labels,
    any_value(a.parameters)::varchar as parameters
from clusters as c
join analyses as a using (analysis)
where analysis = $analysis
group by c.layer
order by c.layer
