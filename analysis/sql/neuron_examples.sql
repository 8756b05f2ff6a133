-- name: neuron_examples
-- purpose: Where one neuron was highest and lowest, with the tokens around.
-- param: run - id of the run
-- param: site - its site
-- param: layer - its layer
-- param: neuron - its index
-- param: task - name of the task; null for all of them together
-- param: per_sample - whether only the best of each sample is wanted
-- param: count - most rows of each kind
-- param: context - tokens on either side
-- grain: one row per (kind, rank)
with

found as (
    select
        run,
        task,
        kind,
        value,
        sample,
        position,
        row_number() over (partition by task, kind, sample order by rank) as rank_in_sample
    from top_activations
    where
        run = $run
        and site = $site
        and layer = $layer
        and neuron = $neuron
        and ($task::varchar is null or task = $task)
),

best as (
    select
        *,
        row_number() over (
            partition by kind
            order by if(kind = 'highest', -value, value), task, sample, position
        ) as rank
    from found
    where not $per_sample or rank_in_sample = 1
)

select
    b.kind,
    b.rank,
    b.value,
    b.task,
    b.sample,
    b.position,
    s.source,
    s.label,
    array_to_string(s.tokens[greatest(b.position - $context, 0) + 1:b.position], '') as before,
    s.tokens[b.position + 1] as token,
    array_to_string(s.tokens[b.position + 2:b.position + 1 + $context], '') as after
from best as b
join samples as s using (run, task, sample)
where b.rank <= $count
order by b.kind, b.rank
