"""How long a plan would take, reckoned from weights and tokens: for orders of magnitude."""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_app.facts import ModelFacts
from ray_app.placement import GPUS, Node
from ray_app.study import Study

__all__ = ["Hours", "estimate_hours"]

_FLOPS = 2
"""Of each weight and position: a product and a sum. What attention adds at long context, and what
statistics add, is left out."""
_SHARE = {"none": 0.3, "int8": 0.1, "int4": 0.1}
"""Of the maker's figure that is reached: assumed, for lack of a GPU to measure on. Eight and four
bits are unpacked for each product."""
_CORE_TFLOPS = 0.07
"""Of a CPU core in float32: SmolLM2 on two cores (docs/scale.md: 625 tokens/s in capture)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    """What a plan would take, once models are loaded."""

    capture: float
    """Hours of the capture."""
    evaluation: float
    """Hours to evaluate one ablated model on all tasks."""
    assumption: str
    """What the figures assume."""


def estimate_hours(
    study: Study,
    model: ModelFacts,
    cut: Sequence[range],
    nodes: Sequence[Node],
    num_tokens: int,
) -> Hours:
    """Estimate the hours of a plan; stages work side by side, so the heaviest sets the pace.

    Args:
        study: the study.
        model: its model.
        cut: the layers of each stage.
        nodes: the machines.
        num_tokens: positions of all samples of the capture.
    """
    tflops, source = _speed(study, nodes, len(cut))
    weights = max(model.counts.of_stage(layers) for layers in cut)
    replicas = study.resources.replicas
    hours_of_token = _FLOPS * weights / (tflops * 1e12 * replicas) / 3600
    evaluated = sum(
        study.evaluation_of(task).tokens or study.tokens_of(task) for task in study.tasks
    )
    return Hours(
        capture=num_tokens * hours_of_token,
        evaluation=evaluated * hours_of_token,
        assumption=(
            f"{_FLOPS} FLOPs a weight and token, {tflops:.3g} TFLOP/s a stage ({source}), "
            f"stages side by side"
        ),
    )


def _speed(study: Study, nodes: Sequence[Node], num_stages: int) -> tuple[float, str]:
    """Teraflops of a stage, and where the figure is from."""
    resources, settings = study.resources, study.model
    if resources.tflops is not None:
        return resources.tflops, "resources.tflops"
    if resources.gpus_per_stage == 0:
        actors = num_stages * resources.replicas
        threads = resources.cpus_per_stage or max(1, int(nodes[0].cpus) // actors)
        return threads * _CORE_TFLOPS, f"{threads} CPU thread(s) of {_CORE_TFLOPS}, assumed"
    name = resources.gpu or "L4"
    gpu = GPUS[name]
    peak = gpu.tflops_float32 if settings.dtype == "float32" else gpu.tflops_half
    share = _SHARE[settings.quantization]
    # However many GPUs a stage has, its layers compute one after the other.
    assumed = "" if resources.gpu else ", for lack of resources.gpu"
    return share * peak, f"{share:.0%} of the {peak:g} of one {name}{assumed}, assumed"
