-- name: importance
-- purpose: How strongly each neuron takes part in each task, by the metrics asked for.
-- param: run - id of the run
-- param: sites - sites to analyse
-- param: seed - seed of the metric rand
-- grain: one row per (task, metric, site, layer, neuron)
with

-- rand is a standard normal number that depends on seed, task and neuron alone (Box and Muller,
-- 1958, on the two halves of an MD5 digest), so it is the same in every engine and order.
digests as (
    select
        *,
        concat_ws('/', $seed, task, site, layer, neuron) as key
    from neuron_stats
    where run = $run and list_contains($sites, site)
),

by_metric as (
    select
        task,
        site,
        layer,
        neuron,
        head,
        abs,
        rms,
        std,
        sqrt,
        freq,
        mean,
        sqrt(-2 * ln((md5_number_upper(key)::double + 1) / 18446744073709551617.0))
        * cos(2 * pi() * md5_number_lower(key)::double / 18446744073709551616.0) as rand
    from digests
),

-- What is not among the metrics asked for is not computed.
long as (
    unpivot by_metric
    on {metrics}
    into name metric value importance
)

select
    $run::name as run,
    task::name as task,
    metric::name as metric,
    site::name as site,
    layer,
    neuron,
    head,
    importance
from long
{order}
