-- name: commits
-- purpose: The shards that are complete; only their rows are visible in the other views.
-- column: run - id of the run
-- column: task - name of the task
-- column: shard - index of the shard inside the task
-- column: num_samples - samples that were planned
-- column: num_tokens - tokens that were computed
-- column: num_counted - tokens that count in statistics
-- column: num_quarantined - samples that were set aside
-- column: num_files - files of the shard
-- column: bytes - their size in bytes
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
