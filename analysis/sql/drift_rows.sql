-- name: drift_rows
-- purpose: All rows of one drift, in order.
-- grain: that of the table drift
select *
from drift
where analysis = {analysis}
order by metric, site, fraction, layer nulls first, task
