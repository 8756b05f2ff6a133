-- name: value_files
-- purpose: The committed files of raw values below a folder.
-- param: folder - absolute path or URL of the folder
-- grain: one row per file
select filename
from committed_files
where table_name = 'values' and starts_with(filename, $folder)
order by filename
