-- name: empty_quota
-- purpose: The smallest fraction that selects no neuron, where the fewest neurons are.
-- grain: at most one row
select site, stratum, fraction, population
from computed_quotas
where quota = 0
order by fraction, population, site, stratum
limit 1
