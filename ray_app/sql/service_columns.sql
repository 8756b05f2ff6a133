-- name: service_columns
-- purpose: The columns of all views with their types.
-- grain: one row per column
select table_name, column_name, data_type
from information_schema.columns
order by table_name, ordinal_position
