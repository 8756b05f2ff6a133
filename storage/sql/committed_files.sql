-- name: committed_files
-- purpose: The files that records vouch for, with their checksums, without those that were compacted.
-- column: filename - absolute path or URL of the file
-- column: table_name - table that the file belongs to
-- column: num_rows - number of rows
-- column: bytes - size in bytes
-- column: sha256 - SHA-256 of the content, in hexadecimal
-- grain: one row per file
with

run_files as (
    select unnest(files) as file from {commit_records}
),

analysis_files as (
    select unnest(files) as file from {analysis_manifests}
),

-- A record counts from a moment after it was written: a query that began later finds the new file in
-- its listing, and one that began earlier finds the old ones, which stay for a day or more.
compactions as (
    select files, replaces
    from {compaction_records}
    where effective_ms <= epoch_ms(now())
),

replaced as (
    select unnest(replaces) as path from compactions
),

all_files as (
    select file from run_files
    union all
    select unnest(files) as file from compactions
    union all
    select file from analysis_files
)

select
    {root} || '/' || file.path as filename,
    file.table as table_name,
    file.rows as num_rows,
    file.bytes as bytes,
    file.sha256 as sha256
from all_files
anti join replaced on file.path = replaced.path
