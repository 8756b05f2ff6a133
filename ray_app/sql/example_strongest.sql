-- name: example_strongest
-- purpose: Which words excite neurons of the first layer most.
-- grain: one row per activation
select t.run, t.task, t.neuron, t.value, s.tokens[t.position + 1] as token, s.source
from top_activations as t
join samples as s using (run, task, sample)
where t.site = 'mlp' and t.layer = 0 and t.kind = 'highest' and t.rank = 1
order by t.value desc
limit 20
