"""What is known of a study's model before its weights are read."""

from dataclasses import dataclass, replace
from typing import Any

from ray_app.models.loading import ModelFiles, load_config, locate_model
from ray_app.models.parts import find_parts, whole_parts
from ray_app.models.quantization import check_quantizable
from ray_app.models.sites import SiteLocation, empty_model, find_sites, layer_prefixes
from ray_app.models.sizes import PartSizes, measure_parts
from ray_app.study import Study, StudyError

__all__ = ["ModelFacts", "inspect_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of a model without its weights."""

    files: ModelFiles
    """Where it is."""
    architecture: str
    """Class name in transformers."""
    num_layers: int
    """Number of layers."""
    num_parameters: int
    """Number of parameters."""
    vocabulary: int
    """Size of the vocabulary."""
    hidden: int
    """Width of the residual stream."""
    max_positions: int | None
    """Longest sample that the model can read, if it has a bound."""
    sites: tuple[SiteLocation, ...]
    """Sites that the study captures."""
    sizes: PartSizes
    """Bytes of its parts."""

    @property
    def num_neurons(self) -> int:
        """Neurons of all captured sites."""
        return sum(site.width for site in self.sites)


def inspect_model(study: Study) -> ModelFacts:
    """Read a model's configuration and find its sites, without loading weights.

    Raises:
        ModelError: if the model is not there or its structure is not recognised.
        StudyError: if layers or lengths do not fit the model.
    """
    files = locate_model(study.model)
    config = load_config(study.model, files)
    model = empty_model(config)
    text = config.get_text_config()
    by_hand = {str(site): pattern for site, pattern in study.model.site_modules.items()}
    sites = find_sites(model, config, by_hand=by_hand)
    check_quantizable(model, sites, study.model)
    facts = ModelFacts(
        files=files,
        architecture=type(model).__name__,
        num_layers=text.num_hidden_layers,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        sites=tuple(sites),
        sizes=_sizes(study, config),
    )
    _check_against_model(study, facts)
    layers = range(facts.num_layers) if study.capture.layers == "all" else study.capture.layers
    chosen = [s for s in facts.sites if s.layer in layers and s.site in study.capture.sites]
    for site in study.capture.sites:
        if site not in {s.site for s in chosen}:
            raise StudyError(
                f"capture.sites asks for {site!r}, which model.site_modules does not name: name "
                "its modules there too, or take it out of capture.sites."
            )
    return replace(facts, sites=tuple(chosen))


def _sizes(study: Study, config: Any) -> PartSizes:
    model = empty_model(config)
    if study.resources.stages == 1:
        prefixes = layer_prefixes(model, config.get_text_config().num_hidden_layers)
        parts = whole_parts(prefixes, config)
    else:
        parts = find_parts(empty_model(config), config)
    return measure_parts(model, parts, study.model, config)


def _check_against_model(study: Study, model: ModelFacts) -> None:
    layers = study.capture.layers
    wrong = [] if layers == "all" else [n for n in layers if not 0 <= n < model.num_layers]
    if wrong:
        raise StudyError(
            f"capture.layers must lie in 0..{model.num_layers - 1} for {model.architecture}, "
            f"found {wrong[0]}."
        )
    stages = study.resources.stages
    if stages != "auto" and stages > model.num_layers:
        raise StudyError(
            f"resources.stages must be at most {model.num_layers}, the number of layers of "
            f"{model.architecture}, found {stages}."
        )
    if model.max_positions is not None and study.capture.max_length > model.max_positions:
        raise StudyError(
            f"capture.max_length must be at most {model.max_positions}, the longest sample that "
            f"{model.architecture} can read, found {study.capture.max_length}."
        )
