-- name: analyses
-- purpose: The finished analyses: of which run, with which parameters, and their size.
-- grain: one row per analysis
select
    analysis,
    run,
    created,
    parameters,
    list_transform(files, lambda f: f.table) as tables,
    list_sum(list_transform(files, lambda f: f.rows))::bigint as num_rows,
    list_sum(list_transform(files, lambda f: f.bytes))::bigint as bytes
from {analysis_manifests}
