"""How many bytes each part of a model takes, and where to cut it into stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from ray_app.models.parts import ModelParts
from ray_app.models.quantization import BYTES_PER_WEIGHT, quantized_weights
from ray_app.study import ModelSettings

__all__ = ["PartSizes", "balanced_cut", "count_parts", "measure_parts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSizes:
    """Bytes of the weights of a model's parts, as they lie in memory; or numbers of weights."""

    layers: tuple[int, ...]
    """Of each layer."""
    front: int
    """Of what runs before the layers: embeddings."""
    tail: int
    """Of what runs after them: the final norm and the head, tied or not."""
    tied: int
    """Of the front's weights that are the tail's as well."""

    def of_stage(self, layers: range) -> int:
        """Bytes of the weights that a stage of these layers holds."""
        first, last = layers.start == 0, layers.stop == len(self.layers)
        ends = self.front * first + self.tail * last - self.tied * (first and last)
        return sum(self.layers[layers.start : layers.stop]) + ends

    def cut(self, num_stages: int, *, by_work: bool) -> list[range]:
        """The layers of each stage, so that the largest stage is as small as can be.

        Args:
            num_stages: number of stages, at most one per layer.
            by_work: leave out the embedding, which takes memory but next to no time. Stages on
                CPUs share the memory of their machine, so there only the time is to be balanced;
                on GPUs each must fit its own.
        """
        costs = list(self.layers)
        costs[-1] += self.tail
        costs[0] += 0 if by_work else self.front
        return balanced_cut(costs, num_stages)


def balanced_cut(costs: Sequence[int], num_stages: int) -> list[range]:
    """Cut a row of costs into contiguous ranges whose largest sum is least.

    Of equally good cuts, the one whose later ranges are the shorter ones is taken, so that the
    same model is always cut in the same way.
    """
    sums = [0, *accumulate(costs)]
    count = len(costs)
    # best[end] = (largest sum, starts) of the best cut of costs[:end] into as many ranges as yet.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stage in range(num_stages):
        left = num_stages - stage - 1
        best = {
            end: min(
                (max(largest, sums[end] - sums[start]), [*starts, start])
                for start, (largest, starts) in best.items()
                if start < end
            )
            for end in range(stage + 1, count - left + 1)
        }
    starts = best[count][1]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def measure_parts(model: nn.Module, parts: ModelParts, settings: ModelSettings) -> PartSizes:
    """Measure the parts of a model whose weights may be absent (`Architecture.skeleton`)."""
    plain = getattr(torch, settings.dtype).itemsize
    quantized = quantized_weights(model, settings)
    narrow = BYTES_PER_WEIGHT[settings.quantization]
    return _measured(model, parts, lambda name: narrow if name in quantized else plain)


def count_parts(model: nn.Module, parts: ModelParts) -> PartSizes:
    """Count the weights of a model's parts; arguments as `measure_parts`."""
    return _measured(model, parts, lambda name: 1)


def _measured(model: nn.Module, parts: ModelParts, width_of: Callable[[str], float]) -> PartSizes:
    named = model.named_parameters(remove_duplicate=False)
    sizes = {name: int(parameter.numel() * width_of(name)) for name, parameter in named}

    def total(modules: Sequence[str]) -> int:
        return sum(
            n for name, n in sizes.items() if name.startswith(tuple(f"{m}." for m in modules))
        )

    layers = tuple(total([layer]) for layer in parts.layers)
    tail, tied = total(parts.tail), total(parts.tied)
    distinct = sum(sizes[name] for name, _ in model.named_parameters())
    return PartSizes(
        layers=layers, front=distinct - sum(layers) - tail + tied, tail=tail, tied=tied
    )
