-- name: committed_files
-- purpose: The files that commit records and analysis manifests vouch for, with their checksums.
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

all_files as (
    select file from run_files
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
