-- name: listed_table
-- purpose: The rows of one table, from files that were looked up beforehand.
-- grain: that of the table
select {columns}
from {files} as t
