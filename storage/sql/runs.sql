-- name: runs
-- purpose: The captures of this store: which model, from which study, how far.
-- column: run - id of the run
-- column: study - name of the study
-- column: created - when the run began, UTC
-- column: model - model.source of the study
-- column: init - pretrained or random
-- column: dtype - type of weights and activations
-- column: quantization - none, int8 or int4
-- column: architecture - class name in transformers
-- column: num_layers - number of layers
-- column: num_neurons - captured neurons of all sites and layers
-- column: top - highest and lowest activations kept of each neuron; 0 if none
-- column: pooled - what was pooled over samples: max, mean; null or empty if nothing
-- column: value_encoding - how raw values were kept; null if none were
-- column: value_share - of the counted positions whose raw values were kept
-- column: reference - reference task when the run began; null if there was none
-- column: num_shards - planned shards
-- column: num_committed - committed shards
-- column: num_tokens - committed tokens
-- column: is_complete - whether all planned shards are committed
-- grain: one row per run
with

committed as (
    select run, count(*) as shards, sum(num_tokens) as tokens
    from commits
    group by run
)

select
    r.run,
    r.study,
    r.created,
    r.model.source as model,
    r.model.init as init,
    r.model.dtype as dtype,
    r.model.quantization as quantization,
    r.model.architecture as architecture,
    r.model.num_layers as num_layers,
    r.model.num_neurons as num_neurons,
    coalesce(r.capture.top, 0) as top,
    r.capture.pooled as pooled,
    r.capture.values.encoding as value_encoding,
    r.capture.values.share as value_share,
    r.reference,
    len(r.shards) as num_shards,
    coalesce(c.shards, 0) as num_committed,
    coalesce(c.tokens, 0)::bigint as num_tokens,
    coalesce(c.shards, 0) = len(r.shards) as is_complete
from {run_records} as r
left join committed as c on r.run = c.run
