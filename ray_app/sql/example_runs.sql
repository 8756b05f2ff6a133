-- name: example_runs
-- purpose: What is in this store.
-- grain: one row per run
select run, model, num_layers, num_neurons, num_tokens, is_complete
from runs
order by created
