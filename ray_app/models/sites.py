"""Finding the neurons: the output projections of every layer's attention and MLP.

Families are recognised by structure, not by name. In the list of layers, linear maps are
grouped by the module that holds them; the attention group's last map reads
``num_heads * head_dim`` values and the MLP group's last map reads the MLP's width, and both write
the residual stream. What is found is confirmed on a probe batch by behaviour: every hook fires
with its width, and only the attention site mixes positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ray_app.models.architecture import Architecture
from ray_app.models.errors import ModelError
from ray_app.models.hooks import read_inputs

__all__ = ["SiteLocation", "confirm_sites", "find_sites", "layer_prefixes", "linear_shape"]

Probe = dict[tuple[str, int], list[Tensor]]
"""What each (site, layer) read, one (positions, width) tensor per call."""

_MIXED = 0.05
"""Relative change that another position must make to count. Attention's is larger; in 8-bit, the
rounding of one position depends a little on the others of its batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteLocation:
    """One site of one layer: the module whose input is read."""

    site: str
    """'mlp' or 'attn'."""
    layer: int
    """Index of the layer."""
    module: str
    """Dotted name of the output projection."""
    width: int
    """Number of neurons."""
    head_dim: int | None
    """Neurons of one attention head; None at 'mlp'."""


def find_sites(
    model: nn.Module, architecture: Architecture, *, by_hand: Mapping[str, str] | None = None
) -> list[SiteLocation]:
    """Locate both sites of every layer.

    Args:
        model: the model; its weights may be absent (`Architecture.skeleton`).
        architecture: what is known of it.
        by_hand: module patterns with ``{layer}`` that override the search, by site.

    Returns:
        Locations ordered by layer, then site.

    Raises:
        ModelError: if the structure is not recognised; says how to name the modules by hand.
    """
    heads, head_dim = architecture.num_heads, architecture.head_dim
    if heads is None or head_dim is None:
        raise ModelError(
            f"the architecture {type(model).__name__} has no attention heads: actlake captures "
            "decoders with attention, in the manner of Llama, GPT-2 or OPT."
        )
    found = []
    for layer, prefix in enumerate(layer_prefixes(model, architecture.num_layers)):
        modules = dict(model.named_modules())
        names = {
            site: pattern.format(layer=layer) for site, pattern in (by_hand or {}).items()
        } or _projections(modules[prefix], prefix, architecture.width, heads * head_dim)
        for site in sorted(names):
            if names[site] not in modules:
                raise ModelError(
                    f"model.site_modules.{site}: the model has no module {names[site]!r}; "
                    f"modules of layer {layer} are: {_linear_names(modules[prefix], prefix)}."
                )
            if not isinstance(modules[names[site]], nn.Linear | Conv1D):
                raise ModelError(
                    f"model.site_modules.{site}: {names[site]!r} is no linear map; linear modules "
                    f"of layer {layer} are: {_linear_names(modules[prefix], prefix)}."
                )
            width = linear_shape(modules[names[site]])[0]
            found.append(
                SiteLocation(
                    site=site,
                    layer=layer,
                    module=names[site],
                    width=width,
                    # Named by hand, it may read heads of another size than queries have.
                    head_dim=width // heads if site == "attn" else None,
                )
            )
    return found


def confirm_sites(
    model: nn.Module,
    sites: list[SiteLocation],
    architecture: Architecture,
    *,
    run: Callable[[Tensor], object] | None = None,
) -> None:
    """Run a probe batch and check that the sites behave as what they are taken for.

    Each hook must fire exactly once with one row of `width` per position, and when only one token
    or patch changes, the attention site of the first captured layer must change at other
    positions, and the MLP site of layer 0 must not if it were not for attention.

    Args:
        model: the model, or a stage of it.
        sites: its sites; nothing is checked if there are none.
        architecture: what is known of the model.
        run: runs a probe through the stage, given its (1, P) codes; through the whole model if not
            given.

    Raises:
        ModelError: naming the site, the layer and what was seen.
    """
    modules = {(site.site, site.layer): model.get_submodule(site.module) for site in sites}
    num_probed, place = architecture.num_probed, architecture.changed_position
    codes = torch.arange(num_probed).unsqueeze(0)
    changed = codes.clone()
    changed[0, place] += max(architecture.num_outputs // 2, 2)
    others = torch.arange(num_probed) != place
    run = run or (lambda probed: architecture.run(model, architecture.probe_inputs(probed), None))
    probe = partial(_probe, run, modules)
    first, second = probe(codes), probe(changed)
    for site in sites:
        seen = [tuple(z.shape) for z in first[site.site, site.layer]]
        expected = (num_probed, site.width)
        if seen != [expected]:
            raise ModelError(
                f"site {site.site!r} of layer {site.layer} ({site.module}) must be read once per "
                f"forward pass with shape {expected}, found {seen or 'no call at all'}: name the "
                "right modules in model.site_modules."
            )
    _confirm_attention_mixes(sites, first, second, others)
    if {("attn", 0), ("mlp", 0)} <= modules.keys():
        with _silenced(module for (site, _), module in modules.items() if site == "attn"):
            before, after = (probe(those)["mlp", 0][0][others] for those in (codes, changed))
        if (before - after).abs().max() > _MIXED * before.abs().max():
            raise ModelError(
                "site 'mlp' of layer 0 mixes positions even when site 'attn' is silent, so they "
                "are not what they are called: name the right modules in model.site_modules, and "
                "do not swap the two."
            )


def _confirm_attention_mixes(
    sites: list[SiteLocation], first: Probe, second: Probe, others: Tensor
) -> None:
    start = min((site.layer for site in sites), default=None)
    for site in sites:
        if site.site == "attn" and site.layer == start:
            before, after = (seen[site.site, site.layer][0][others] for seen in (first, second))
            if torch.equal(before, after):
                raise ModelError(
                    f"site 'attn' of layer {site.layer} ({site.module}) does not mix positions, so "
                    "it is not attention's output projection: name it in model.site_modules."
                )


@contextmanager
def _silenced(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules give zeros as long as the block runs."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(
                lambda _, inputs, output: torch.zeros_like(output)
            )
            stack.callback(handle.remove)
        yield


def _probe(
    run: Callable[[Tensor], object], modules: Mapping[tuple[str, int], nn.Module], codes: Tensor
) -> Probe:
    seen: Probe = {key: [] for key in modules}

    def keep(key: tuple[str, int], z: Tensor) -> None:
        # OPT flattens its batch before the MLP: positions are rows either way.
        seen[key].append(z.flatten(0, -2).clone())

    with torch.inference_mode(), read_inputs(modules, keep):
        run(codes)
    return seen


def layer_prefixes(model: nn.Module, num_layers: int) -> list[str]:
    """Names of the layers, in order.

    Raises:
        ModelError: if the model has no list of that many layers of one kind.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) == num_layers
        and len({type(layer) for layer in module}) == 1
        and next(_linears(module[0]), None) is not None
    ]
    if not lists:
        raise ModelError(
            f"the architecture {type(model).__name__} is not recognised: no list of {num_layers} "
            "layers of one kind was found; actlake captures decoders in the manner of Llama, "
            "Mistral, Qwen, Gemma, GPT-2, GPT-NeoX and OPT, and vision transformers in that of ViT."
        )
    return [f"{lists[0]}.{index}" for index in range(num_layers)]


def _projections(layer: nn.Module, prefix: str, hidden: int, attn_width: int) -> dict[str, str]:
    groups: dict[str, list[tuple[str, int, int]]] = {}
    for name, module in _linears(layer):
        groups.setdefault(name.rpartition(".")[0], []).append((name, *linear_shape(module)))
    mlp = [group[-1] for group in groups.values() if _is_mlp(group, hidden)]
    closing = [
        [entry for entry in group if entry[1:] == (attn_width, hidden)]
        for group in groups.values()
        if not _is_mlp(group, hidden)
    ]
    attn = [entries[-1] for entries in closing if entries]
    if len(mlp) != 1 or len(attn) != 1:
        raise ModelError(
            f"the layers of this model are not recognised: found {len(attn)} candidates for "
            f"attention's output projection and {len(mlp)} for the MLP's. Name both in the study, "
            f"for example model.site_modules: {{attn: '{_hint(prefix)}.self_attn.o_proj', "
            f"mlp: '{_hint(prefix)}.mlp.down_proj'}}; linear modules of a layer are: "
            f"{_linear_names(layer, prefix)}."
        )
    return {"attn": f"{prefix}.{attn[0][0]}", "mlp": f"{prefix}.{mlp[0][0]}"}


def _is_mlp(group: list[tuple[str, int, int]], hidden: int) -> bool:
    """Whether the maps before the last write just what it reads: plain, gated, or both fused.

    Attention differs: its queries, keys and values are three maps, or one that is wider than what
    the output projection reads, or (grouped queries) maps of unequal width.
    """
    _, width, outputs = group[-1]
    before = [outputs for _, _, outputs in group[:-1]]
    return outputs == hidden and before in ([width], [width, width], [2 * width])


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map; GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def _hint(prefix: str) -> str:
    return prefix.rpartition(".")[0] + ".{layer}"


def _linear_names(layer: nn.Module, prefix: str) -> str:
    return ", ".join(f"{prefix}.{name}" for name, _ in _linears(layer))
