-- name: experts
-- purpose: The analysis of that id, if it made experts.
-- param: analysis - id of the analysis
-- grain: at most one row
select analysis, run
from analyses
where analysis = $analysis and list_contains(tables, 'clusters')
