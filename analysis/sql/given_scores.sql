-- name: given_scores
-- purpose: Scores of one's own from a Parquet file, in the form of computed ones.
-- param: file - path of the file
-- grain: one row per (task, site, layer, neuron)
select
    null::varchar as run,
    task::varchar as task,
    null::varchar as reference,
    'given' as metric,
    {site} as site,
    layer::smallint as layer,
    neuron::integer as neuron,
    null::smallint as head,
    score::double as score
from read_parquet($file)
