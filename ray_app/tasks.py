"""Ray: work that is cut into tasks, each a call of a function that is tested without Ray."""

from collections.abc import Iterator, Sequence

import ray
from ray.exceptions import RayTaskError

from analysis.experts import ExpertSettings, LayerExperts
from ray_app.experts import WeightsSpec, split_layer
from ray_app.models.loading import quiet_transformers
from storage import ActlakeError

__all__ = ["split_layers_on_ray"]


def split_layers_on_ray(
    spec: WeightsSpec, settings: ExpertSettings, layers: Sequence[int]
) -> Iterator[LayerExperts]:
    """`ray_app.experts.split_layers` with one task per layer, in the order in which they end.

    Ray must run already (`ray_app.actors.ray_session`).

    Raises:
        ActlakeError: what a task raised.
    """
    task = ray.remote(num_cpus=1)(_split_layer)
    pending = [task.remote(spec, settings, layer) for layer in layers]
    while pending:
        (done,), pending = ray.wait(pending, num_returns=1)
        try:
            yield ray.get(done)
        except RayTaskError as error:
            if isinstance(error.cause, ActlakeError):
                raise error.cause from None
            raise


def _split_layer(spec: WeightsSpec, settings: ExpertSettings, layer: int) -> LayerExperts:
    quiet_transformers()
    return split_layer(spec, settings, layer)
