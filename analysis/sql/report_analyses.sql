-- name: report_analyses
-- purpose: All finished analyses, the newest first.
-- grain: one row per analysis
select analysis, run, tables, parameters
from analyses
order by created desc, analysis
