"""What is known of a study's model before its weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_app.hub import OutOfReachError
from ray_app.models.architecture import Architecture
from ray_app.models.loading import ModelFiles, load_architecture, load_shape, locate_model
from ray_app.models.parts import ModelParts, find_parts, whole_parts
from ray_app.models.quantization import check_quantizable
from ray_app.models.sites import SiteLocation, find_sites, layer_prefixes
from ray_app.models.sizes import PartSizes, count_parts, measure_parts
from ray_app.study import CoactivationSettings, Study, StudyError

__all__ = ["ModelFacts", "inspect_model", "outline_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of a model without its weights."""

    files: ModelFiles
    """Where it is."""
    architecture: Architecture
    """What it is."""
    num_parameters: int
    """Number of parameters."""
    sites: tuple[SiteLocation, ...]
    """Sites that the study captures."""
    sizes: PartSizes
    """Bytes of its parts."""
    counts: PartSizes
    """Numbers of weights of its parts."""

    @property
    def is_outlined(self) -> bool:
        """Whether it is known from the study alone."""
        return self.files.fingerprint == "shape"

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.architecture.num_layers

    @property
    def num_neurons(self) -> int:
        """Neurons of all captured sites."""
        return sum(site.width for site in self.sites)


def inspect_model(study: Study) -> ModelFacts:
    """Read a model's configuration and find its sites, without loading weights.

    Raises:
        ModelError: if the model is not there or its structure is not recognised.
        OutOfReachError: if it could only be on the hub, which cannot be asked.
        StudyError: if layers, lengths or tasks do not fit the model.
    """
    files = locate_model(study.model)
    return _facts(study, files, load_architecture(study.model, files))


def outline_model(study: Study) -> ModelFacts:
    """The same, from the study's `model.shape` where the hub cannot be asked.

    Raises:
        OutOfReachError: if the study does not say the shape.
        ModelError, StudyError: as `inspect_model`.
    """
    try:
        return inspect_model(study)
    except OutOfReachError as error:
        if (known := load_shape(study.model)) is None:
            raise OutOfReachError(
                f"{str(error).rstrip('.')}; to plan without it, give the model's measures as "
                "model.shape."
            ) from error
    return _facts(study, *known)


def _facts(study: Study, files: ModelFiles, architecture: Architecture) -> ModelFacts:
    model = architecture.skeleton()
    by_hand = {str(site): pattern for site, pattern in study.model.site_modules.items()}
    sites = find_sites(model, architecture, by_hand=by_hand)
    check_quantizable(model, sites, study.model)
    parts = _parts(study, architecture)
    facts = ModelFacts(
        files=files,
        architecture=architecture,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sites=tuple(sites),
        sizes=measure_parts(model, parts, study.model),
        counts=count_parts(model, parts),
    )
    _check_modality(study, architecture)
    _check_against_model(study, architecture)
    layers = range(facts.num_layers) if study.capture.layers == "all" else study.capture.layers
    chosen = [s for s in facts.sites if s.layer in layers and s.site in study.capture.sites]
    for site in study.capture.sites:
        if site not in {s.site for s in chosen}:
            raise StudyError(
                f"capture.sites asks for {site!r}, which model.site_modules does not name: name "
                "its modules there too, or take it out of capture.sites."
            )
    if study.capture.coactivation is not None:
        _check_captured("coactivation", study.capture.coactivation, chosen)
    return replace(facts, sites=tuple(chosen))


def _check_captured(
    key: str, settings: CoactivationSettings, captured: Sequence[SiteLocation]
) -> None:
    known = {(site.site, site.layer) for site in captured}
    for site in settings.sites:
        for layer in settings.layers:
            if (site, layer) not in known:
                layers = sorted(layer for captured_site, layer in known if captured_site == site)
                raise StudyError(
                    f"capture.{key} must name sites and layers that are captured, found site "
                    f"{site!r} of layer {layer}; captured layers of that site are: "
                    f"{', '.join(map(str, layers)) or 'none'}."
                )


def _parts(study: Study, architecture: Architecture) -> ModelParts:
    model = architecture.skeleton()
    if study.resources.stages == 1:
        return whole_parts(layer_prefixes(model, architecture.num_layers), architecture)
    return find_parts(model, architecture)


def _check_against_model(study: Study, model: Architecture) -> None:
    values = study.capture.values
    asked = {
        "capture.layers": study.capture.layers,
        "capture.values.layers": values and values.layers,
    }
    for key, layers in asked.items():
        wrong = [
            n for n in layers or () if not isinstance(n, str) and not 0 <= n < model.num_layers
        ]
        if wrong:
            raise StudyError(
                f"{key} must lie in 0..{model.num_layers - 1} for {model.name}, found {wrong[0]}."
            )
    stages = study.resources.stages
    if stages != "auto" and stages > model.num_layers:
        raise StudyError(
            f"resources.stages must be at most {model.num_layers}, the number of layers of "
            f"{model.name}, found {stages}."
        )
    longest = study.capture.max_length if model.modality == "language" else 0
    if model.max_positions is not None and longest > model.max_positions:
        raise StudyError(
            f"capture.max_length must be at most {model.max_positions}, the longest sample that "
            f"{model.name} can read, found {study.capture.max_length}."
        )


_IGNORED_CAPTURE = {
    "image": ("max_length", "long_documents", "windows_per_document"),
    "language": (),
}
_IGNORED_TASK = {"image": ("files", "column", "template"), "language": ("image_column",)}
"""Keys that say nothing about what a model of the modality reads."""


def _check_modality(study: Study, model: Architecture) -> None:
    given = [
        (f"capture.{key}", study.capture.model_fields_set, key)
        for key in _IGNORED_CAPTURE[model.modality]
    ]
    for name, task in study.tasks.items():
        given += [
            (f"tasks.{name}.{key}", task.model_fields_set, key)
            for key in _IGNORED_TASK[model.modality]
        ]
        # Superclasses need the label to choose rows by.
        if model.num_outputs == 0 and task.label_column is not None and task.superclass is None:
            raise StudyError(
                f"tasks.{name}.label_column asks how well labels are predicted, and {model.name} "
                "has no classification head: leave it out (filter and superclass choose rows "
                "without it being predicted), or choose a model with a head."
            )
    reads = "images" if model.modality == "image" else "texts"
    for place, keys, key in given:
        if key in keys:
            instead = ", and name a dataset of images" if key == "files" else ""
            raise StudyError(
                f"{place} says nothing about {reads}, which {model.name} reads: leave it "
                f"out{instead}."
            )
