-- name: commits
-- purpose: The shards that are complete; only their rows are visible in the other views.
-- grain: one row per (run, task, shard)
select
    run,
    task,
    shard,
    num_samples,
    num_tokens,
    num_counted,
    coalesce(num_quarantined, 0) as num_quarantined,
    len(files) as num_files,
    list_sum(list_transform(files, lambda f: f.bytes))::bigint as bytes
from {commit_records}
