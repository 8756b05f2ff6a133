-- name: committed_table
-- purpose: The rows of one table, from committed files only.
-- grain: that of the table
select {columns}
from {files} as t
semi join committed_files as c on t.filename = c.filename
