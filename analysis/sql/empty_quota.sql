-- name: empty_quota
-- purpose: The first fraction that selects no neuron.
-- grain: at most one row
select site, stratum, fraction, population
from computed_quotas
where quota = 0
order by fraction, site, stratum
limit 1
