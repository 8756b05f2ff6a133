"""Every SQL file of analysis says what it is, and binds where nothing has been captured yet."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import analysis
from analysis.steps import Steps
from storage import create_store
from storage.sqlfiles import load_query

FILES = sorted(path.stem for path in (Path(analysis.__file__).parent / "sql").glob("*.sql"))

# In the order of an analysis: each leaves the table that later ones read.
STEPS: dict[str, dict[str, Any]] = {
    "importance": {"run": "r", "sites": ["mlp"], "metrics": ["abs", "rand"], "seed": 0},
    "scores": {"reference": "t", "eps_mlp": 1.0, "eps_attn": 1.0},
    "quotas": {"fractions": [0.1, 0.5], "within": "model"},
    "ranks": {"within": "model", "rest": 0.5},
    "selections": {"within": "model"},
    "overlap": {"within": "model"},
    "rankings": {},
}
_VIEW = {"analysis": "a", "metric": "abs", "fraction": 0.1}
_PLACE = {"site": "mlp", "layer": 0, "neuron": 0}
_NEURON = _PLACE | {"run": "r"}
QUESTIONS: dict[str, dict[str, Any]] = {
    "bad_scores": {},
    "cross_matrix": {"analysis": "a"},
    "empty_quota": {},
    "too_few_tasks": {},
    "uneven_scores": {},
    "kept_tables": {"folder": "runs/run=r"},
    "layer_profile": _VIEW,
    "neuron_examples": {**_NEURON, "task": "t", "count": 3, "per_sample": False, "context": 3},
    "neuron_scores": _PLACE | {"analysis": "a", "metric": "abs", "within": "model"},
    "neuron_statistics": _NEURON,
    "newest_analysis": {"run": "r", "analysis": None},
    "own_effects": {"analysis": "a"},
    "overlap_matrix": _VIEW,
    "pair_places": {"run": "r"},
    "pair_rows": {"run": "r", "task": "t", "site": "mlp", "layer": 0},
    "task_accuracy": {"run": "r"},
    "top_neurons": {**_VIEW, "count": 3},
}
ON_FILES = {"given_scores"}
"""Read a file and not the store; test_own_scores.py holds them."""
ON_TWO_RUNS = {name for name in FILES if name.startswith(("drift", "persistence"))}
"""Need the steps of two runs; test_drift.py holds them."""


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    """All steps taken in an empty store."""
    connection = create_store(tmp_path / "empty").connect()
    taken = Steps(connection, lambda step: None)
    for name, params in STEPS.items():
        taken.run(name, params)
    yield taken
    connection.close()


def test_every_file_is_covered_here() -> None:
    assert sorted([*STEPS, *QUESTIONS, *ON_FILES, *ON_TWO_RUNS]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_each_file_states_name_purpose_grain_and_each_parameter(name: str) -> None:
    query = load_query("analysis", name)
    assert query.name == name
    assert query.purpose.endswith(".")
    assert query.grain
    assert all(query.params.values())
    assert query.params.keys() == set(re.findall(r"\$([a-z_]+)", query.text))
    assert query.params.keys() == {**STEPS, **QUESTIONS}.get(name, query.params).keys()


def test_all_steps_and_questions_bind_in_an_empty_store(steps: Steps, tmp_path: Path) -> None:
    for name in STEPS:
        assert [batch.num_rows for batch in steps.batches(name) if batch.num_rows] == []
    store = create_store(tmp_path / "empty")
    for name, params in QUESTIONS.items():
        text = load_query("analysis", name).text
        if "computed_" in text:
            found = steps.first(name)
            assert found == ({"num_tasks": 0} if name == "too_few_tasks" else None)
        else:
            assert store.table(text, params).num_rows == 0
