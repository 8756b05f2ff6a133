"""Importance and score of every metric, against NumPy on the raw activations."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis import AnalysisSettings, analyse_run
from analysis.steps import Steps
from storage.catalog import open_connection

# Each of (positions, neurons) float64, as the papers define them.
IMPORTANCE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs": lambda z: np.abs(z).mean(0),
    "rms": lambda z: np.sqrt((z**2).mean(0)),
    "std": lambda z: np.sqrt(((z - z.mean(0)) ** 2).mean(0)),
    "sqrt": lambda z: np.sqrt(np.abs(z)).mean(0),
    "freq": lambda z: (z > 0).mean(0),
    "mean": lambda z: z.mean(0),
}
PLACES = [("attn", 0), ("attn", 1), ("mlp", 0), ("mlp", 1), ("mlp", 2)]


def column(run: Any, table: str, name: str, **where: Any) -> np.ndarray:
    condition = " and ".join(f"{key} = ${key}" for key in where)
    found = run.store.table(
        f"select {name} from {table} where {condition} order by layer, neuron", where
    )
    return found[name].to_numpy()


def test_importance_is_what_numpy_finds_in_the_activations(captured: Any) -> None:
    settings = AnalysisSettings.model_validate({"metrics": [*IMPORTANCE], "fractions": [0.5]})
    analyse_run(captured.store, captured.id, settings)
    for metric, task, (site, layer) in itertools.product(IMPORTANCE, captured.tasks, PLACES):
        expected = IMPORTANCE[metric](captured.activations(task, site, layer))
        where = {"task": task, "metric": metric, "site": site, "layer": layer}
        found = column(captured, "importance", "importance", **where)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12, err_msg=metric)


def test_only_the_metrics_and_sites_asked_for_are_computed(captured: Any) -> None:
    settings = AnalysisSettings(metrics=["std", "rand"], fractions=[0.5], sites=["attn"])
    analyse_run(captured.store, captured.id, settings)
    for table in ("importance", "scores", "selections", "overlap"):
        kinds = captured.store.sql(f"select distinct metric, site from {table} order by all")
        assert kinds.fetchall() == [("rand", "attn"), ("std", "attn")]


@pytest.mark.parametrize("eps", [{}, {"mlp": 0.5}, {"mlp": 2.0, "attn": 0.25}], ids=str)
def test_score_is_importance_over_that_in_the_reference_plus_eps(
    captured: Any, eps: dict[str, float]
) -> None:
    metrics = ["abs", "rms", "std", "sqrt", "freq"]
    settings = AnalysisSettings.model_validate({"metrics": metrics, "fractions": [0.5], "eps": eps})
    analyse_run(captured.store, captured.id, settings)
    added = {"mlp": 1e-3, "attn": 1e-4} | eps
    for metric, task, (site, layer) in itertools.product(metrics, captured.tasks[:-1], PLACES):
        in_task, in_reference = (
            IMPORTANCE[metric](captured.activations(name, site, layer)) for name in (task, "mixed")
        )
        where = {"task": task, "metric": metric, "site": site, "layer": layer}
        found = column(captured, "scores", "score", **where)
        np.testing.assert_allclose(found, in_task / (in_reference + added[site]), rtol=1e-9)
        assert found[0] == 0


def test_score_of_mean_is_a_distance_without_ratio(captured: Any) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(metrics=["mean"], fractions=[0.5]))
    for task, (site, layer) in itertools.product(captured.tasks[:-1], PLACES):
        means = [captured.activations(name, site, layer).mean(0) for name in (task, "mixed")]
        found = column(captured, "scores", "score", task=task, site=site, layer=layer)
        np.testing.assert_allclose(found, np.abs(means[0] - means[1]), atol=1e-12)


def test_another_reference_is_scored_against_and_is_no_task_then(captured: Any) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(fractions=[0.5]), reference="prose")
    names = captured.store.sql("select distinct task, reference from scores order by all")
    assert names.fetchall() == [(task, "prose") for task in ("code", "mixed", "numbers")]
    in_task, in_reference = (
        np.abs(captured.activations(name, "mlp", 1)).mean(0) for name in ("mixed", "prose")
    )
    found = column(captured, "scores", "score", task="mixed", site="mlp", layer=1)
    np.testing.assert_allclose(found, in_task / (in_reference + 1e-3), rtol=1e-9)


def random_numbers(seed: int, tasks: list[str], neurons: int) -> np.ndarray:
    """Importance rand as the SQL file computes it: (tasks, neurons)."""
    connection = open_connection()
    connection.execute(
        """
        create table neuron_stats as
        select 'run' as run, task, 'mlp' as site, 0::smallint as layer, neuron::integer as neuron,
            null::smallint as head, 0.0 as abs, 0.0 as rms, 0.0 as std, 0.0 as sqrt, 0.0 as freq,
            0.0 as mean
        from unnest($tasks) as t(task), range($neurons) as n(neuron)
        """,
        {"tasks": tasks, "neurons": neurons},
    )
    steps = Steps(connection, lambda step: None)
    steps.intern(["run", "rand", "mlp", *tasks])
    params = {"run": "run", "sites": ["mlp"], "seed": seed}
    steps.run("importance", params, metrics="rand", order="order by task, neuron")
    return steps.table("importance")["importance"].to_numpy().reshape(len(tasks), neurons)


def test_rand_is_standard_normal_and_the_same_every_time() -> None:
    first = random_numbers(7, ["a", "b"], 20_000)
    assert (random_numbers(7, ["a", "b"], 20_000) == first).all()
    assert stats.kstest(first.ravel(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(first)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[0, :-1], first[0, 1:])[0, 1]) < 0.03


def test_rand_of_a_neuron_depends_on_seed_and_task_but_not_on_other_tasks() -> None:
    both = random_numbers(0, ["a", "b"], 500)
    assert (random_numbers(0, ["b"], 500)[0] == both[1]).all()
    assert (random_numbers(1, ["b"], 500)[0] != both[1]).all()
    assert (both[0] != both[1]).all()


def test_score_of_rand_is_the_random_number_itself(captured: Any) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(metrics=["rand"], fractions=[0.5]))
    where = {"task": "code", "site": "mlp"}
    score = column(captured, "scores", "score", **where)
    assert score.tolist() == column(captured, "importance", "importance", **where).tolist()
    assert len(set(score)) == 50


def test_the_head_of_an_attention_neuron_is_kept(captured: Any) -> None:
    analyse_run(captured.store, captured.id, AnalysisSettings(fractions=[0.5]))
    for table in ("importance", "scores"):
        heads = captured.store.sql(
            f"select distinct site, neuron // 2 as pair, head from {table} where site = 'attn' "
            f"union all select distinct site, null, head from {table} where site = 'mlp' order by 2"
        )
        assert heads.fetchall() == [("attn", i, i) for i in range(3)] + [("mlp", None, None)]
