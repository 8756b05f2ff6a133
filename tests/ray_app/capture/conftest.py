"""A reference for captures: the same tokens through the original model, read by plain hooks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from ray_app.models.loading import locate_model
from ray_app.run import Run
from ray_app.study import ModelSettings


@dataclass
class Reference:
    """What the original model did with the samples of one task."""

    activations: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    """(positions, neurons) by site and layer, of counted positions."""
    num_counted: dict[int, int] = field(default_factory=dict)
    """Counted positions by sample, in the order in which activations have them."""
    losses: dict[int, list[float]] = field(default_factory=dict)
    """Of the tokens after the first, by sample."""
    top1: dict[int, list[bool]] = field(default_factory=dict)
    top10: dict[int, list[bool]] = field(default_factory=dict)


def run_plainly(
    model: torch.nn.Module, run: Run, rows: list[dict[str, Any]], found: Reference
) -> None:
    """Run samples through the model as one batch padded on the right with an arbitrary token."""
    longest = max(row["num_tokens"] for row in rows)
    ids = torch.full((len(rows), longest), 7)
    mask = torch.zeros_like(ids)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = row["num_tokens"]
        ids[index, :length] = torch.tensor(row["token_ids"])
        mask[index, :length] = 1
        counted[index, :length] = torch.tensor(row["counted"])

    def keep(key: tuple[str, int]) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: Any) -> None:
            z = inputs[0].reshape(len(rows) * longest, -1)[counted.flatten()]
            found.activations.setdefault(key, []).append(z.clone())

        return hook

    handles = [
        model.get_submodule(site["module"]).register_forward_pre_hook(
            keep((site["site"], site["layer"]))
        )
        for site in run.record["sites"]
    ]
    with torch.no_grad():
        padded = {"attention_mask": mask} if len(rows) > 1 else {}
        logits = model(input_ids=ids, **padded).logits
    for handle in handles:
        handle.remove()
    for index, row in enumerate(rows):
        length, sample = row["num_tokens"], row["sample"]
        found.num_counted[sample] = row["num_counted"]
        scores, wanted = logits[index, : length - 1].float(), ids[index, 1:length]
        best = scores.topk(10, dim=1).indices == wanted[:, None]
        found.losses[sample] = cross_entropy(scores, wanted, reduction="none").tolist()
        found.top1[sample] = best[:, 0].tolist()
        found.top10[sample] = best.any(1).tolist()


@pytest.fixture
def reference_of() -> Callable[..., dict[str, Reference]]:
    """Gives by task what the original model does with the samples of a run.

    Args:
        run: the run; its samples must be committed.
        one_by_one: whether each sample goes through the model alone, instead of in the batches of
            the plan.
    """

    def collect(run: Run, *, one_by_one: bool) -> dict[str, Reference]:
        settings = ModelSettings.model_validate(run.record["model"]["settings"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            locate_model(settings).name,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
        ).eval()
        groups: dict[Any, list[dict[str, Any]]] = {}
        query = "from samples where run = $run order by task, shard, batch"
        for row in run.store.sql(query, {"run": run.id}).to_arrow_table().to_pylist():
            key = (row["task"], row["sample"] if one_by_one else (row["shard"], row["batch"]))
            groups.setdefault(key, []).append(row)
        found: dict[str, Reference] = {}
        for (task, _), rows in groups.items():
            run_plainly(model, run, rows, found.setdefault(task, Reference()))
        return found

    return collect


@pytest.fixture
def neurons_of() -> Callable[..., dict[str, np.ndarray]]:
    """Gives merged statistics of one task, site and layer as columns, neurons in order."""

    def select(run: Run, task: str, site: str, layer: int) -> dict[str, np.ndarray]:
        result = run.store.sql(
            "from neuron_stats where run = $run and task = $task and site = $site "
            "and layer = $layer order by neuron",
            {"run": run.id, "task": task, "site": site, "layer": layer},
        )
        return {name: np.asarray(column) for name, column in result.fetchnumpy().items()}

    return select
