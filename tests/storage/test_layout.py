"""Paths of a store: Hive-style, sorted like the numbers in them."""

from storage import layout


def test_paths_are_what_the_documentation_says() -> None:
    assert layout.run_path("r") == "runs/run=r/run.json"
    assert layout.samples_path("r", "t", 7) == "runs/run=r/samples/task=t/shard-00007.parquet"
    assert layout.tokens_path("r", "t", 7) == "runs/run=r/tokens/task=t/shard-00007.parquet"
    assert layout.stats_path("r", "t", 7, 1) == (
        "runs/run=r/stats/task=t/stage-01/shard-00007.parquet"
    )
    assert layout.commit_path("r", "t", 7) == "runs/run=r/commits/task=t/shard-00007.json"
    assert layout.analysis_manifest_path("a") == "analyses/analysis=a/analysis.json"
