-- name: given_scores
-- purpose: Scores of one's own from a Parquet file, in the form of computed ones.
-- param: file - path of the file, with glob characters escaped
-- grain: one row per (task, site, layer, neuron); null where a number does not fit
select
    null::varchar as run,
    task::varchar::name as task,
    null::varchar as reference,
    'given'::name as metric,
    {site}::name as site,
    try_cast(layer as smallint) as layer,
    try_cast(neuron as integer) as neuron,
    null::smallint as head,
    score::double as score
from read_parquet($file, hive_partitioning = false)
