-- name: sorted_rows
-- purpose: The rows of some files of one table, in the order in which compaction stores them.
-- grain: that of the table
select {columns}
from read_parquet([{files}], hive_partitioning = false)
order by {keys}
