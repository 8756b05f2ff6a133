-- name: kept_tables
-- purpose: The tables that a run wrote.
-- param: folder - folder of the run inside the store
-- grain: one row per table
select distinct table_name
from committed_files
where contains(filename, $folder || '/')
order by table_name
