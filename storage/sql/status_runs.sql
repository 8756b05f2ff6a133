-- name: status_runs
-- purpose: What each run captured, how far it is, and how much it takes on disk.
-- grain: one row per run
with

sizes as (
    select run, sum(bytes) as bytes from commits group by run
)

select
    r.run,
    concat_ws(' ', r.init, r.dtype, nullif(r.quantization, 'none')) as weights,
    r.num_committed || ' of ' || r.num_shards as shards,
    r.num_tokens as tokens,
    round(coalesce(s.bytes, 0) / 1e6, 1) as megabytes
from runs as r
left join sizes as s on r.run = s.run
order by r.created, r.run
