-- name: service_tables
-- purpose: The tables that have committed rows.
-- grain: one row per table
select distinct table_name
from committed_files
where num_rows > 0
