"""Routing: experts that carry a task are chosen for its tokens, and keeping all changes no bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import AnalysisError
from analysis.experts import ExpertSettings, LayerExperts, keep_experts
from analysis.routing import ROUTERS, load_experts
from analysis.settings import RoutingSettings
from ray_app.ablation.routers import LayerRouters, RoutedLayer
from ray_app.ablation.routing import Routers, RoutingEngine, route_experts, routing_specs
from ray_app.ablation.routing_stage import build_routing
from ray_app.ablation.samples import EvaluationSamples
from ray_app.capture.workers import LocalWorkers
from ray_app.experts import make_experts
from ray_app.progress import NoProgress
from ray_app.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def opener(run: Run, samples: EvaluationSamples, cut: Sequence[range]) -> Any:
    """Engines in this process, with a stage for each range of layers."""

    @contextmanager
    def engine(reference: str, routers: Routers) -> Iterator[RoutingEngine]:
        workers = LocalWorkers(*map(build_routing, routing_specs(run, cut, reference, routers)))
        yield RoutingEngine(workers, run, samples, reference, lambda **_: nullcontext(NoProgress()))

    return engine


def test_experts_that_carry_a_task_are_chosen_for_its_tokens(
    known_run: Run, carriers: dict[str, np.ndarray], draw: Callable[..., Any]
) -> None:
    def planted() -> list[LayerExperts]:
        layers = []
        for layer, task in enumerate(carriers):
            labels = np.zeros(24, dtype=np.int64)
            labels[carriers[task]] = 2
            labels[np.flatnonzero(labels == 0)[::2]] = 1
            layers.append(LayerExperts(layer=layer, labels=labels))
        return layers

    settings = ExpertSettings(clusters=3)
    made = keep_experts(known_run.store, known_run.record, settings, planted)
    samples = draw(known_run)
    loaded = load_experts(known_run.store, [made.id], None)
    asked = RoutingSettings(tasks=["a", "b"], shares=[1 / 3, 1], learn_tokens=60)
    result = route_experts(
        known_run, samples, loaded, asked, opener(known_run, samples, [range(2)])
    )
    rows = known_run.store.table("from routing order by task, router, share").to_pylist()
    assert len(rows) == 2 * (1 + len(ROUTERS) * 2)
    for task in "ab":
        own = {(row["router"], row["share"]): row for row in rows if row["task"] == task}
        whole = own["all", 1]
        assert whole["top1_share"] == 1
        for router in ROUTERS:
            assert own[router, 1]["mean_loss"] == whole["mean_loss"]
        for router in ("truth", "centroid", "learned"):
            assert own[router, 1 / 3]["mean_loss"] == whole["mean_loss"], router
            assert own[router, 1 / 3]["loss_change_upper"] == 0
        assert own["random", 1 / 3]["top1_share"] < 0.7
    masses = known_run.store.table("from routing_layers where share < 1").to_pylist()
    assert len(masses) == 2 * len(ROUTERS) * 2
    for row in masses:
        is_carried = row["layer"] == "ab".index(row["task"])
        if row["router"] == "random":
            # Where nothing fires, nothing is lost.
            assert (row["mass_kept"] == 1) != is_carried
        else:
            assert (row["mass_kept"], row["mass_ratio"]) == (1, 1)
        assert (row["num_experts"], row["num_kept"], row["mass_best"]) == (3, 1, 1)
    again = route_experts(known_run, samples, loaded, asked, opener(known_run, samples, [range(2)]))
    assert (again.id, again.is_new) == (result.id, False)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_routers_of_any_model_keep_no_more_than_the_truth_and_stages_change_nothing(
    family: str,
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    draw: Callable[..., Any],
) -> None:
    run = capture_locally(write_study(family=family))
    made = [
        make_experts(run.store, run.id, ExpertSettings.model_validate({"clusters": 6} | more)).id
        for more in ({}, {"method": "random"})
    ]
    samples, settings = draw(run), RoutingSettings(shares=[0.2, 0.5, 1], learn_tokens=100)
    loaded = load_experts(run.store, made, None)
    route_experts(run, samples, loaded, settings, opener(run, samples, [range(2)]))
    masses = run.store.table("from routing_layers").to_pylist()
    assert len(masses) == 2 * 2 * len(ROUTERS) * 3
    for row in masses:
        assert row["num_kept"] == {0.2: 1, 0.5: 3, 1: 6}[row["share"]]
        if row["router"] == "truth" or row["share"] == 1:
            assert row["mass_ratio"] == pytest.approx(1)
        else:
            assert row["mass_kept"] < row["mass_best"]
        if row["router"] == "random":
            # Each expert is as likely as the others to be kept.
            assert row["mass_kept"] == pytest.approx(row["num_kept"] / 6, abs=0.06)
    rows = run.store.table("from routing").to_pylist()
    whole = {row["mean_loss"] for row in rows if row["share"] == 1}
    assert len(whole) == 1
    assert whole.isdisjoint(row["mean_loss"] for row in rows if row["share"] < 1)

    routers = {
        made[0]: {
            layer: LayerRouters.untaught(torch.from_numpy(labels), torch.eye(6, 32))
            for layer, labels in loaded[0].labels.items()
        }
    }
    found = []
    for cut in ([range(2)], [range(1), range(1, 2)]):
        with opener(run, samples, cut)("mixed", routers) as engine:
            scores = engine.route(made[0], [(router, 2) for router in ROUTERS], "code", seed=1)
            inputs = engine.inputs(made[0], [0, 1], "code", 50)
        found.append(([one.sums["loss"] for one in scores], inputs))
    assert np.array_equal(found[0][0], found[1][0])
    for layer, (x, mass) in found[0][1].items():
        assert (x.shape, mass.shape) == ((50, 32), (50, 6))
        assert np.array_equal(x, found[1][1][layer][0])
        assert np.array_equal(mass, found[1][1][layer][1])


def test_a_router_learns_what_its_centres_do_not_know() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4100, 16), generator=generator)
    masses = torch.relu(x @ torch.randn((16, 5), generator=generator))
    unrelated = torch.randn((5, 16), generator=generator)
    labels = torch.arange(5)
    before = LayerRouters.untaught(labels, unrelated)
    after = before.taught(x[:4000], masses[:4000], seed=3)
    device = torch.device("cpu")
    # One neuron per expert: activations are masses.
    ratios = [
        RoutedLayer(routers, device).kept_mass(x[4000:], masses[4000:], [2], seed=0).relative[:, 0]
        for routers in (before, after)
    ]
    learned = ROUTERS.index("learned")
    assert ratios[0][learned] < 60
    assert ratios[1][learned] > 95
    again = before.taught(x[:4000], masses[:4000], seed=3)
    assert all(map(torch.equal, again.learned, after.learned))


def test_mistakes_are_told(
    known_run: Run, write_study: Callable[..., Path], capture_locally: Callable[..., Run]
) -> None:
    store = known_run.store
    other = capture_locally(write_study(), store.files.root)
    settings = ExpertSettings(clusters=4, method="random")
    ours, theirs = (make_experts(store, run, settings).id for run in (known_run.id, other.id))
    with pytest.raises(AnalysisError, match=f"experts must be of one run .*{theirs} of {other.id}"):
        load_experts(store, [ours, theirs], None)
    with pytest.raises(AnalysisError, match="there are no experts 'experts-0'"):
        load_experts(store, ["experts-0"], None)
    with pytest.raises(AnalysisError, match=r"layers must be among .* \(0, 1\), found 0, 7"):
        load_experts(store, [ours], [0, 7])
    loaded, nothing = (
        load_experts(store, [ours], [1]),
        EvaluationSamples(analysis="", shards={}, notes=()),
    )
    for wrong, said in (
        (RoutingSettings(shares=[0.1]), "share 0.1 keeps no expert: layers have 4"),
        (RoutingSettings(tasks=["c"]), "tasks must be of run .*, found 'c'"),
    ):
        with pytest.raises(AnalysisError, match=said):
            route_experts(known_run, nothing, loaded, wrong, opener(known_run, nothing, []))
