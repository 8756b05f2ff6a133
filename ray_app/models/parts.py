"""Cutting a model into stages: contiguous layers, and what runs before and after them.

A stage keeps the whole model's module tree, so that module names, layer numbers and whatever a
family derives from them (sliding windows, rotary bases, scales) stay those of the whole model.
Modules that belong to other stages are replaced by `Passthrough`, which holds no memory. What
enters the first layer of a later stage is overwritten by the hidden states that it was given, so
nothing that a family does to its embeddings is done twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_app.models.architecture import Architecture
from ray_app.models.errors import ModelError
from ray_app.models.sites import layer_prefixes

__all__ = ["ModelParts", "Passthrough", "StageModel", "find_parts", "remove_parts", "whole_parts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParts:
    """Which modules of a model run before, in and after its layers."""

    layers: tuple[str, ...]
    """Names of the layers, in order."""
    front: tuple[str, ...]
    """Names of the modules with tensors of their own that run before the first layer."""
    tail: tuple[str, ...]
    """Names of those that run after the last one: the final norm and the head."""
    tied: tuple[str, ...]
    """Names of the front's modules whose weights the tail reads as well."""
    width: int
    """Width of the residual stream."""
    layers_give_tuples: bool
    """Whether a layer returns its hidden states as the first of several values."""

    def absent(self, layers: range) -> list[str]:
        """Names of the modules that a stage of these layers does not hold."""
        names = [name for index, name in enumerate(self.layers) if index not in layers]
        if layers.stop < len(self.layers):
            names += self.tail
        if layers.start > 0:
            # A tied head is the embedding table: the last stage holds it under both names.
            kept = self.tied if layers.stop == len(self.layers) else ()
            names += [name for name in self.front if name not in kept]
        return names


class Passthrough(nn.Module):
    """Stands for a module that another stage holds: it hands hidden states on.

    Where something else goes in (ids, embeddings that are yet to be projected, pixels), zeros of
    the shape of hidden states come out, which take no memory.
    """

    @classmethod
    def instead_of(
        cls, module: nn.Module, width: int, dtype: torch.dtype, *, as_tuple: bool = False
    ) -> "Passthrough":
        """What stands for this module.

        Args:
            module: the module.
            width: width of the residual stream.
            dtype: dtype of hidden states.
            as_tuple: whether they come out as the only one of several values.
        """
        if isinstance(module, nn.Conv2d):
            return _PassthroughPatches(module, width, dtype)
        return cls(width, dtype, as_tuple=as_tuple)

    def __init__(self, width: int, dtype: torch.dtype, *, as_tuple: bool = False) -> None:
        super().__init__()
        self._width = width
        self._dtype = dtype
        self._as_tuple = as_tuple
        self.was_called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument if it has the shape of hidden states, else zeros of that shape."""
        self.was_called = True
        value: Tensor = args[0] if args else next(iter(kwargs.values()))
        if value.dim() < 3 or value.shape[-1] != self._width:
            value = self._blank(value.device).expand(*value.shape[:2], self._width)
        return (value,) if self._as_tuple else value

    def _blank(self, device: torch.device) -> Tensor:
        return torch.zeros((), dtype=self._dtype, device=device)


class _PassthroughPatches(Passthrough):
    """Stands for the convolution that makes patches of pixels."""

    def __init__(self, module: nn.Conv2d, width: int, dtype: torch.dtype) -> None:
        super().__init__(width, dtype)
        padding: Any = module.padding
        self._window = tuple(zip(module.kernel_size, module.stride, padding, strict=True))
        # transformers asks it for the dtype that pixels are to have.
        self.weight = torch.empty(0, dtype=dtype, device="meta")

    def forward(self, pixels: Tensor) -> Tensor:
        """Zeros of the shape of patches: (B, width, rows, columns)."""
        self.was_called = True
        places = [
            (size + 2 * padding - kernel) // stride + 1
            for size, (kernel, stride, padding) in zip(pixels.shape[-2:], self._window, strict=True)
        ]
        return self._blank(pixels.device).expand(len(pixels), self._width, *places)


class StageModel:
    """Some layers of a model, with the same numbers as inside the whole model."""

    def __init__(
        self, model: nn.Module, architecture: Architecture, parts: ModelParts, layers: range
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.parts = parts
        self.layers = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == len(parts.layers)
        self._entry = model.get_submodule(parts.layers[layers.start])
        self._exit = model.get_submodule(parts.layers[layers.stop - 1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that are not quantised."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def run(self, inputs: Tensor, attention_mask: Tensor | None, hidden: Tensor | None) -> Tensor:
        """One forward pass through the layers of this stage.

        Args:
            inputs: (B, P) int64 token ids or (B, C, H, W) pixels, for the first stage; later ones
                take from them the shapes of masks and positions only.
            attention_mask: (B, P) int64, or None if there is no padding.
            hidden: (B, P, width) what the stage before returned; None for the first stage.

        Returns:
            (B, P, width) hidden states; of the last stage (B, P, vocabulary) or (B, classes)
            logits.

        Raises:
            ModelError: if hidden states are missing, or given to the first stage.
        """
        if (hidden is None) != self.is_first:
            found = "none" if hidden is None else f"some of shape {tuple(hidden.shape)}"
            raise ModelError(
                f"the stage of layers {self.layers.start} to {self.layers.stop - 1} takes "
                f"{'no ' if self.is_first else ''}hidden states, found {found}."
            )
        device = self.device
        entering = inputs.to(device, self.dtype if inputs.is_floating_point() else None)
        mask = None if attention_mask is None else attention_mask.to(device)
        left: list[Tensor] = []
        with self._given(hidden), self._taken(left):
            logits = self.architecture.run(self.model, entering, mask)
        return logits if self.is_last else left[0]

    def probe(self, codes: Tensor) -> Tensor:
        """`run` with inputs made from codes, and with hidden states of order one if need be.

        Args:
            codes: (1, P) int64; see `Architecture.probe_inputs`.
        """
        hidden = None
        if not self.is_first:
            phases = (codes[..., None] + 1) * torch.arange(1, self.parts.width + 1)
            hidden = phases.float().sin().to(self.dtype)
        return self.run(self.architecture.probe_inputs(codes), None, hidden)

    @contextmanager
    def _given(self, hidden: Tensor | None) -> Iterator[None]:
        if hidden is None:
            yield
            return
        entering = hidden.to(self.device)

        def replace(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (entering, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": entering}

        handle = self._entry.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _taken(self, left: list[Tensor]) -> Iterator[None]:
        if self.is_last:
            yield
            return

        def take(module: nn.Module, args: Any, output: Any) -> None:
            left.append(output[0] if isinstance(output, tuple) else output)

        handle = self._exit.register_forward_hook(take)
        try:
            yield
        finally:
            handle.remove()


def find_parts(model: nn.Module, architecture: Architecture) -> ModelParts:
    """Find what runs before and after the layers, by running the model without them.

    All modules that hold tensors are replaced by `Passthrough`, whose calls are watched. The model
    is unusable afterwards.

    Args:
        model: its skeleton (`Architecture.skeleton`).
        architecture: what is known of it.

    Raises:
        ModelError: if the model does not hand hidden states from layer to layer.
    """
    width = architecture.width
    prefixes = layer_prefixes(model, architecture.num_layers)
    inside = tuple(f"{prefix}." for prefix in prefixes)
    outside = [
        name
        for name, module in model.named_modules()
        if name not in prefixes and not name.startswith(inside) and _is_leaf_with_tensors(module)
    ]
    with_weights = [n for n in outside if _has_parameters(model.get_submodule(n))]
    tied = _tied_modules(model)
    for as_tuple in (False, True):
        front = _modules_before(model, architecture, prefixes, outside, as_tuple=as_tuple)
        if front is not None:
            return ModelParts(
                layers=tuple(prefixes),
                front=tuple(name for name in with_weights if name in front),
                tail=tuple(name for name in with_weights if name not in front),
                tied=tuple(name for name in with_weights if name in front and name in tied),
                width=width,
                layers_give_tuples=as_tuple,
            )
    raise ModelError(
        f"the architecture {type(model).__name__} cannot be cut into stages, because its layers "
        "do not simply hand hidden states on: set resources.stages to 1."
    )


def whole_parts(layers: Sequence[str], architecture: Architecture) -> ModelParts:
    """The parts of a model of which nothing is removed."""
    return ModelParts(
        layers=tuple(layers),
        front=(),
        tail=(),
        tied=(),
        width=architecture.width,
        layers_give_tuples=False,
    )


def remove_parts(model: Any, parts: ModelParts, layers: range, dtype: torch.dtype) -> None:
    """Replace the modules that a stage of these layers does not hold."""
    for name in parts.absent(layers):
        as_tuple = parts.layers_give_tuples and name in parts.layers
        there = model.get_submodule(name)
        stand_in = Passthrough.instead_of(there, parts.width, dtype, as_tuple=as_tuple)
        model.set_submodule(name, stand_in)
    # transformers noted which weights are tied before these modules went away.
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    model.all_tied_weights_keys = {a: b for a, b in pairs if a in there and b in there}


def _modules_before(
    model: nn.Module,
    architecture: Architecture,
    layers: Sequence[str],
    outside: Iterable[str],
    *,
    as_tuple: bool,
) -> set[str] | None:
    """Names of the modules called before the first layer; None if layers speak another way."""
    width = architecture.width
    watched = {
        name: Passthrough.instead_of(model.get_submodule(name), width, torch.float32)
        for name in outside
    }
    for name, module in watched.items():
        model.set_submodule(name, module)
    before: set[str] = set()

    def note(module: nn.Module, args: Any) -> None:
        before.update(name for name, other in watched.items() if other.was_called)

    for index, name in enumerate(layers):
        stub = Passthrough(width, torch.float32, as_tuple=as_tuple)
        model.set_submodule(name, stub)
        if index == 0:
            stub.register_forward_pre_hook(note)
    inputs = architecture.blank_inputs(2)
    try:
        with torch.no_grad():
            output = architecture.run(model, inputs, None)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        # Tuples where tensors are expected, or the reverse: the caller tries the other.
        return None
    return before if (output.shape[0], output.shape[-1]) == (2, width) else None


def _is_leaf_with_tensors(module: nn.Module) -> bool:
    if any(True for _ in module.children()):
        return False
    return _has_parameters(module) or any(True for _ in module.buffers(recurse=False))


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _tied_modules(model: nn.Module) -> set[str]:
    pairs = getattr(model, "all_tied_weights_keys", {})
    return {name.rpartition(".")[0] for name in (*pairs.keys(), *pairs.values())}
