-- name: committed_lists
-- purpose: The committed files of each table, how their values are encoded, and until when this holds.
-- column: table_name - name of the table
-- column: filenames - absolute paths or URLs of its files
-- column: encodings - of raw values in the store; null is one of them where a run does not say it
-- column: until_ms - when a compaction takes effect, in Unix time; null if nothing is known to change
-- grain: one row per table that has any
with

committed as materialized (
    {committed_files}
),

encodings as (
    select list(distinct r.capture.values.encoding) as encodings
    from committed as c
    left join {run_records} as r on regexp_extract(c.filename, '/run=([^/]+)/', 1) = r.run
    where c.table_name = 'values'
)

select
    table_name,
    list(filename order by filename) as filenames,
    (select encodings from encodings) as encodings,
    (select min(effective_ms) from {compaction_records} where effective_ms > epoch_ms(now()))
        as until_ms
from committed
group by table_name
