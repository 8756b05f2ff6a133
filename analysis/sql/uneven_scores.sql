-- name: uneven_scores
-- purpose: The first neuron that does not have exactly one score in every task.
-- grain: at most one row
with

tasks as (
    select count(*) as num_tasks, bit_xor(hash(task)) as digest
    from (select distinct task from computed_scores)
),

-- Once every task: the right number of scores, and the right tasks (by the exclusive or of their
-- hashes, since counting distinct tasks of half a million neurons takes five times as long).
odd as (
    select metric, site, layer, neuron
    from computed_scores
    group by all
    having
        count(*) <> (select num_tasks from tasks)
        or bit_xor(hash(task)) <> (select digest from tasks)
    order by all
    limit 1
)

select site, layer, neuron, list(task order by task) as tasks
from computed_scores
semi join odd using (metric, site, layer, neuron)
group by metric, site, layer, neuron
