"""Where files lie in a store. Paths are relative to the store's root and use forward slashes.

A name depends only on the plan (run, task, shard, stage), never on which worker ran or when, so
that computing a shard again replaces its files by identical ones.
"""

__all__ = [
    "analysis_folder",
    "analysis_manifest_path",
    "commit_path",
    "compaction_path",
    "driver_path",
    "part_path",
    "quarantine_path",
    "run_folder",
    "run_path",
    "samples_path",
    "stats_path",
    "table_path",
    "tokens_path",
    "values_path",
]


def run_folder(run: str) -> str:
    """Folder of one run."""
    return f"runs/run={run}"


def run_path(run: str) -> str:
    """The run's record: identity, versions, sites and plan."""
    return f"{run_folder(run)}/run.json"


def table_path(run: str, table: str, task: str, shard: int) -> str:
    """Rows of one shard in a table that one worker writes as a whole."""
    return f"{run_folder(run)}/{table}/task={task}/shard-{shard:05d}.parquet"


def samples_path(run: str, task: str, shard: int) -> str:
    """The chosen inputs of one shard."""
    return table_path(run, "samples", task, shard)


def tokens_path(run: str, task: str, shard: int) -> str:
    """Tokens of one shard with their losses."""
    return table_path(run, "tokens", task, shard)


def part_path(run: str, table: str, task: str, shard: int, stage: int) -> str:
    """Rows of one shard in a table of which each stage writes its layers."""
    return f"{run_folder(run)}/{table}/task={task}/stage-{stage:02d}/shard-{shard:05d}.parquet"


def values_path(run: str, task: str, site: str, layer: int, shard: int) -> str:
    """Raw activations of one site and layer over one shard."""
    folder = f"{run_folder(run)}/values/task={task}/site={site}/layer={layer:02d}"
    return f"{folder}/shard-{shard:05d}.parquet"


def stats_path(run: str, task: str, shard: int, stage: int) -> str:
    """Statistics of the layers that one stage holds, over one shard."""
    return part_path(run, "stats", task, shard, stage)


def quarantine_path(run: str, task: str, shard: int) -> str:
    """Samples of one shard that were set aside; there is no such file if none was."""
    return table_path(run, "quarantine", task, shard)


def commit_path(run: str, task: str, shard: int) -> str:
    """Commit record of one shard; written last, and what makes the shard visible."""
    return f"{run_folder(run)}/commits/task={task}/shard-{shard:05d}.json"


def compaction_path(run: str, task: str, name: str) -> str:
    """Record of one file that took the place of several."""
    return f"{run_folder(run)}/compactions/task={task}/{name}.json"


def driver_path(run: str, role: str = "driver") -> str:
    """Who captures or compacts the run."""
    return f"{run_folder(run)}/{role}.json"


def analysis_folder(analysis: str) -> str:
    """Folder of one analysis."""
    return f"analyses/analysis={analysis}"


def analysis_manifest_path(analysis: str) -> str:
    """The analysis's record: parameters, lineage and files; written last."""
    return f"{analysis_folder(analysis)}/analysis.json"
