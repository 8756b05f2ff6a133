-- name: analyses
-- purpose: The finished analyses: of which run, with which parameters, and their size.
-- column: analysis - id of the analysis
-- column: run - id of the run; of a drift, of its first run
-- column: created - when it was finished, UTC
-- column: parameters - all that decided the result, as JSON
-- column: tables - tables that it has
-- column: num_rows - rows of all its tables
-- column: bytes - their size in bytes
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
