-- name: given_names
-- purpose: The tasks and sites of a Parquet file of scores of one's own.
-- param: file - path of the file, with glob characters escaped
-- grain: one row
select list(distinct name) filter (name is not null) as names
from (
    select unnest([task::varchar, {site}]) as name
    from read_parquet($file, hive_partitioning = false)
)
