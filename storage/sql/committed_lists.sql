-- name: committed_lists
-- purpose: The committed files of each table, and until when they are those if nothing is written.
-- grain: one row per table that has any
select
    table_name,
    list(filename order by filename) as filenames,
    (select min(effective_ms) from {compaction_records} where effective_ms > epoch_ms(now()))
        as until_ms
from ({committed_files})
group by table_name
