-- name: service_experts
-- purpose: The experts that one neuron belongs to, and how many neurons they have.
-- param: run - id of the run whose weights the experts were made of
-- param: site - its site
-- param: layer - its layer
-- param: neuron - its index
-- grain: one row per analysis
with

mine as (
    select analysis, method, expert
    from clusters
    where run = $run and site = $site and layer = $layer and neuron = $neuron
)

select
    m.analysis,
    m.method,
    m.expert,
    count(*) as size
from mine as m
join clusters as c
    on m.analysis = c.analysis and m.expert = c.expert and c.site = $site and c.layer = $layer
group by all
order by m.analysis
