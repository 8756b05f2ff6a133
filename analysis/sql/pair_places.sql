-- name: pair_places
-- purpose: Of which layers a run counted pairs of neurons.
-- param: run - id of the run
-- grain: one row per (task, site)
select task, site, list(distinct layer order by layer) as layers
from coactivation
where run = $run
group by task, site
order by task, site
