"""Study files: one YAML file that says which model, which tasks, what to capture and analyse."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from analysis.settings import AnalysisSettings, Site
from ray_app.validation import explain
from storage import ActlakeError

__all__ = [
    "AnalysisSettings",
    "CaptureSettings",
    "CoactivationSettings",
    "EvaluationSettings",
    "GpuName",
    "ModelSettings",
    "ModelShape",
    "Pooling",
    "ResourceSettings",
    "Study",
    "StudyError",
    "TaskSettings",
    "ValuesSettings",
    "load_study",
]

Pooling = Literal["max", "mean"]
Scalar = str | int | float | bool
GpuName = Literal[
    "T4", "V100", "A10G", "L4", "L40S", "RTX-3090", "RTX-4090", "A100-40GB", "A100-80GB", "H100"
]  # fmt: skip
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", max_length=64)]


class StudyError(ActlakeError):
    """A study file is wrong, or asks for something that is not there."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelShape(_Settings):
    """What the model's config.json says, so that `actlake plan` can do without the hub.

    Keys are named as there; what is not given is as transformers has it for the model type. A
    capture reads the model's own configuration, and is refused if that says otherwise.
    """

    model_type: str = Field(description="Kind of model in transformers: mistral, llama, vit.")
    num_hidden_layers: int = Field(ge=1, description="Layers.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    intermediate_size: int | None = Field(None, ge=1, description="MLP neurons of a layer.")
    num_attention_heads: int = Field(ge=1, description="Attention heads of a layer.")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="Heads whose keys and values are shared by the others."
    )
    vocab_size: int | None = Field(None, ge=1, description="Tokens that a language model knows.")
    max_position_embeddings: int | None = Field(
        None, ge=1, description="Longest sample of a language model, in tokens."
    )
    tie_word_embeddings: bool | None = Field(
        None, description="Whether the head has the weights of the embedding."
    )
    image_size: int | None = Field(None, ge=1, description="Height and width of images, in pixels.")
    patch_size: int | None = Field(None, ge=1, description="Height and width of patches.")
    num_labels: int | None = Field(None, ge=1, description="Classes of a vision transformer.")

    def given(self) -> dict[str, Any]:
        """The keys that are given, but for the model type."""
        return self.model_dump(exclude_none=True, exclude={"model_type"})


class ModelSettings(_Settings):
    """Which model, and in which state."""

    source: str = Field(
        description="A Hugging Face id ('mistralai/Mistral-7B-v0.3'), 'timm:NAME' for a vision "
        "transformer of timm, a local folder (of transformers, or of timm's save_for_hf), a GGUF "
        "file, or 'package:NAME/FILE' for a model file inside an installed Python package."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id.")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="Trained weights, or fresh ones from the model's own initialiser."
    )
    init_seed: int = Field(0, description="Seed of the random initialisation.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of weights and activations."
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention implementation of transformers; part of the run's identity."
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="8-bit or 4-bit linear maps by bitsandbytes; the output head keeps its dtype.",
    )
    shape: ModelShape | None = Field(
        None, description="Its measures, for plans where the hub is out of reach."
    )
    site_modules: dict[Site, str] = Field(
        default_factory=dict,
        description="Output projections named by hand, for models whose structure is not "
        "recognised: {mlp: 'model.layers.{layer}.mlp.down_proj'}.",
    )

    @field_validator("site_modules")
    @classmethod
    def _has_layer_placeholder(cls, value: dict[Site, str]) -> dict[Site, str]:
        for site, pattern in value.items():
            if re.findall(r"[{}]", pattern.replace("{layer}", "")) or "{layer}" not in pattern:
                raise ValueError(
                    "must contain '{layer}' where the layer's number stands, and no other braces, "
                    f"found {pattern!r} for {site}"
                )
        return value


class Condition(_Settings):
    """A test of one dataset column."""

    min: float | None = Field(None, description="Keep values >= this.")
    max: float | None = Field(None, description="Keep values <= this.")
    not_: Scalar | list[Scalar] | None = Field(
        None, alias="not", description="Drop this value or these values."
    )


class EvaluationSettings(_Settings):
    """Which samples ablated models are evaluated on; documents that the capture used are not."""

    tokens: int | None = Field(
        None, ge=1, description="Counted tokens; as many as are captured if not given."
    )
    split: str | None = Field(
        None, description="Split of the dataset, such as test, instead of the captured one."
    )
    data_files: str | list[str] | None = Field(
        None, description="Files of the dataset instead of the captured ones."
    )


_COMMON_KEYS = ("limit", "tokens", "evaluation")
_TASK_KEYS = {
    "dataset": (
        "dataset", "subset", "split", "data_files", "revision", "streaming", "column", "template",
        "image_column", "label_column", "superclasses", "superclass", "filter", *_COMMON_KEYS,
    ),
    "files": ("files", *_COMMON_KEYS),
    "mixture": ("mixture", *_COMMON_KEYS),
}  # fmt: skip
"""Keys of a task that mean something, by where its documents come from."""


class TaskSettings(_Settings):
    """A named set of samples: a dataset, plain files, or a mixture of other tasks."""

    dataset: str | None = Field(
        None, description="First argument of datasets.load_dataset: a hub id, json, parquet, text."
    )
    subset: str | None = Field(None, description="Configuration name of the dataset.")
    split: str = Field("train", description="Split of the dataset.")
    data_files: str | list[str] | None = Field(
        None, description="Files of a json, parquet, csv or text dataset."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    streaming: bool = Field(
        False, description="Read the dataset as a stream instead of downloading all of it."
    )
    column: str = Field("text", description="Column that holds the text.")
    template: str | None = Field(
        None, description="Text made of several columns instead: '{question}\\n{answer}'."
    )
    image_column: str = Field(
        "image",
        description="Column that holds the image, for vision models: encoded bytes, or the path of "
        "a file.",
    )
    label_column: str | None = Field(
        None,
        description="Column that holds the sample's label; of images, the class that the model is "
        "to predict: by name, else by number.",
    )
    superclasses: str | None = Field(
        None,
        description="Table that groups labels into superclasses: cifar20 for the labels of "
        "CIFAR-100, or a YAML file of {superclass: [labels]}.",
    )
    superclass: str | None = Field(
        None, description="Keep rows whose label lies in this superclass of the table."
    )
    filter: dict[str, Scalar | list[Scalar] | Condition] = Field(
        default_factory=dict,
        description="Rows to keep: {column: value}, {column: [values]} or "
        "{column: {min: 0, max: 1, not: value}}; 'meta.set' is the field set of a column meta.",
    )
    files: str | list[str] | None = Field(
        None,
        description="Plain text files by glob, one document each. 'package:NAME/GLOB' looks inside "
        "an installed package, 'site-packages:GLOB' among all installed packages.",
    )
    mixture: list[Name] | None = Field(
        None,
        description="Names of other tasks: documents are drawn from them in turn, from those that "
        "they did not use themselves.",
    )
    limit: int | None = Field(None, ge=1, description="Most documents to read.")
    tokens: int | None = Field(None, ge=1, description="Counted tokens, instead of capture.tokens.")
    evaluation: EvaluationSettings | None = Field(
        None, description="Instead of the study's evaluation, key by key."
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> "TaskSettings":
        given = [key for key in ("dataset", "files", "mixture") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(
                f"exactly one of dataset, files and mixture must be given, found {found}"
            )
        if self.mixture is not None and len(self.mixture) == 0:
            raise ValueError("mixture must name at least one task, found an empty list")
        if self.mixture is not None and len(set(self.mixture)) < len(self.mixture):
            raise ValueError(f"mixture must name each task once, found {self.mixture}")
        ignored = [key for key in self.model_fields_set if key not in _TASK_KEYS[given[0]]]
        if ignored:
            raise ValueError(
                f"{min(ignored)} says nothing about {given[0]} and would be ignored: leave it out; "
                f"keys beside {given[0]} are {', '.join(_TASK_KEYS[given[0]])}"
            )
        together = (self.superclasses, self.superclass)
        if any(together) and not all((*together, self.label_column)):
            raise ValueError(
                "superclasses, superclass and label_column choose rows together: give all three, "
                "or no superclass"
            )
        if self.template is not None and "column" in self.model_fields_set:
            raise ValueError("column and template both say what the text is: leave one out")
        return self


class Place(Protocol):
    """A site of a layer."""

    @property
    def site(self) -> str:
        """'mlp' or 'attn'."""

    @property
    def layer(self) -> int:
        """Index of the layer."""


class CoactivationSettings(_Settings):
    """Of which layers all pairs of neurons are counted; each takes 12 bytes a pair and shard."""

    layers: list[int] = Field(min_length=1, description="Layers, by number from 0.")
    sites: list[Site] = Field(["mlp"], min_length=1, description="Sites of these layers.")

    def holds(self, place: Place) -> bool:
        """Whether pairs of neurons of a site and layer are counted."""
        return place.site in self.sites and place.layer in self.layers


class ValuesSettings(_Settings):
    """Which raw activations to keep: by default all of what is captured."""

    sites: list[Site] | None = Field(
        None, min_length=1, description="Sites of which to keep them; all captured ones by default."
    )
    layers: list[int] | None = Field(
        None,
        min_length=1,
        description="Layers of which to keep them; all captured ones by default.",
    )
    tasks: list[Name] | None = Field(
        None, min_length=1, description="Tasks of which to keep them; all by default."
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the counted positions to keep, each drawn for itself by the study's "
        "seed, its task, sample and position.",
    )
    encoding: Literal["float32", "float16", "int8"] = Field(
        "float16",
        description="What is kept of a value: all of it; eleven binary digits, up to 65,504; or "
        "the nearest of 255 steps between the extremes of its neuron in the shard. Columns value, "
        "code, scale and error_bound of the table values.",
    )

    @field_validator("sites", "layers", "tasks")
    @classmethod
    def _in_one_order(cls, value: list[Any] | None) -> list[Any] | None:
        return value if value is None else sorted(set(value))

    def keeps(self, site: str, layer: int) -> bool:
        """Whether values of a captured site and layer are kept."""
        return (self.sites is None or site in self.sites) and (
            self.layers is None or layer in self.layers
        )

    def keeps_task(self, task: str) -> bool:
        """Whether values of a task are kept."""
        return self.tasks is None or task in self.tasks


class CaptureSettings(_Settings):
    """What to read from the model, over how much text, cut how."""

    sites: list[Site] = Field(
        default_factory=lambda: sorted(get_args(Site)),
        min_length=1,
        description="Sites to capture.",
    )
    layers: Annotated[list[int], Field(min_length=1)] | Literal["all"] = Field(
        "all", description="Layers to capture: 'all' or a list of layer numbers from 0."
    )
    tokens: int = Field(
        100_000, ge=1, description="Counted tokens of each task; of images, patches and tokens."
    )
    max_length: int = Field(512, ge=2, description="Longest sample, in tokens.")
    long_documents: Literal["truncate", "split"] = Field(
        "truncate",
        description="Keep the first max_length tokens of a document, or cut it into windows of "
        "max_length tokens that are samples of their own.",
    )
    windows_per_document: int | None = Field(
        None,
        ge=1,
        description="With split: most windows of one document, chosen by the study's seed.",
    )

    @field_validator("sites", "pooled")
    @classmethod
    def _in_one_order(cls, value: list[str]) -> list[str]:
        return sorted(set(value))

    @field_validator("layers")
    @classmethod
    def _each_once(cls, value: list[int] | str) -> list[int] | str:
        return value if isinstance(value, str) else sorted(set(value))

    @model_validator(mode="after")
    def _has_windows_only_if_split(self) -> "CaptureSettings":
        if self.windows_per_document is not None and self.long_documents != "split":
            raise ValueError(
                "windows_per_document says nothing where documents are truncated: set "
                "long_documents to split, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _values_are_captured(self) -> "CaptureSettings":
        if self.values is None:
            return self
        captured = {"sites": self.sites, "layers": self.layers}
        for key, known in captured.items():
            asked = getattr(self.values, key) or []
            missing = [one for one in asked if known != "all" and one not in known]
            if missing:
                raise ValueError(
                    f"values.{key} must be among capture.{key} ({', '.join(map(str, known))}), "
                    f"found {missing[0]!r}"
                )
        return self

    special_tokens: Literal["auto", "exclude", "include"] = Field(
        "auto",
        description="Whether positions of special tokens (BOS, the class token of images and the "
        "like) count in statistics; 'auto' counts them in images only. Their positions are in the "
        "table tokens either way.",
    )
    pooled: list[Pooling] = Field(
        default_factory=list,
        description="Also keep one value per sample and neuron, pooled over the sample's counted "
        "positions: max, mean or both.",
    )
    top: int = Field(
        5,
        ge=0,
        description="How many of the highest and how many of the lowest activations of every "
        "neuron to keep, with sample and position; 0 keeps none.",
    )
    coactivation: CoactivationSettings | None = Field(
        None,
        description="Also count, for all pairs of neurons of some layers, how often both are "
        "active, and how they correlate.",
    )
    values: ValuesSettings | None = Field(
        None,
        description="Also keep raw activations, neuron by neuron: {} keeps all of them, at two "
        "bytes each.",
    )
    budget_gb: float | None = Field(
        None,
        gt=0,
        description="Most gigabytes (10^9 bytes) that the run may take on disk. Inputs, "
        "statistics, pooled values and pairs of neurons must fit; of the rest, top activations are "
        "kept first, then as large a share of the raw values as fits, then all their digits.",
    )
    batch_tokens: int = Field(
        1024, ge=1, description="Most tokens of one batch, padding included (a sample is not cut)."
    )
    shard_tokens: int = Field(
        16_384,
        ge=1,
        description="Tokens after which a shard is closed: the unit of work and commit.",
    )
    max_quarantined: int = Field(
        0,
        ge=0,
        description="Samples of the run that may fail (the model raises on them, or activations or "
        "losses are not finite) and are set aside in the table quarantine; one more stops the "
        "capture. May be raised to go on with a run.",
    )

    def counts_special(self, modality: Literal["language", "image"]) -> bool:
        """Whether special tokens count in statistics."""
        if self.special_tokens == "auto":
            return modality == "image"
        return self.special_tokens == "include"


class ResourceSettings(_Settings):
    """Machines. Nothing here changes which numbers are computed or how they are grouped."""

    stages: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        1,
        description="Parts that the model's layers are cut into, each in an actor of its own; "
        "'auto' takes the fewest that fit the cluster's memory.",
    )
    replicas: int = Field(1, ge=1, description="Copies of the whole model that work in parallel.")
    gpus_per_stage: int = Field(0, ge=0, description="GPUs of each stage; 0 computes on CPUs.")
    gpu: GpuName | None = Field(
        None,
        description="The GPU that plans reckon with, for its memory and speed; those of this "
        "machine if not given. Changes no capture.",
    )
    tflops: float | None = Field(
        None,
        gt=0,
        description="Teraflops that each stage really reaches, for the hours of a plan. If not "
        "given, a share of what the GPU's maker says (docs/plan.md), or 0.07 for each CPU core.",
    )
    cpus_per_stage: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each stage; all cores shared out if not given. Fixed when the "
        "run begins, because sums round differently with another number of threads.",
    )
    reduction: Literal["auto", "eager", "compiled"] = Field(
        "auto",
        description="How statistics and losses are computed: by torch's operators, or by kernels "
        "compiled where the stage runs; 'auto' compiles if there is a C compiler where the run "
        "begins. Fixed then, because the two differ in the last bits.",
    )
    max_deaths: int = Field(
        10,
        ge=0,
        description="Deaths of workers in a row, without a shard finished in between, that are "
        "borne before the capture stops.",
    )


class Study(_Settings):
    """A whole study."""

    name: Name = Field(description="Name of the study; run ids begin with it.")
    seed: int = Field(0, description="Seed of the choice and order of samples.")
    model: ModelSettings = Field(description="Which model.")
    tasks: dict[Name, TaskSettings] = Field(min_length=1, description="Tasks by name.")
    reference: Name | None = Field(
        None, description="The task that others are scored against; needed by analyses."
    )
    capture: CaptureSettings = Field(default_factory=CaptureSettings, description="What to read.")
    resources: ResourceSettings = Field(
        default_factory=ResourceSettings, description="Machines to use."
    )
    analyses: list[AnalysisSettings] = Field(
        default_factory=list, description="Analyses of the finished run."
    )
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="Samples to evaluate ablated models on."
    )

    @model_validator(mode="after")
    def _names_agree(self) -> "Study":
        known = ", ".join(self.tasks)
        if self.reference is not None and self.reference not in self.tasks:
            raise ValueError(
                f"reference must be the name of a task, found {self.reference!r}; "
                f"tasks are: {known}"
            )
        if self.analyses and self.reference is None:
            raise ValueError(
                f"analyses need a reference: add 'reference: TASK' with one of: {known}"
            )
        if self.analyses and len(self.tasks) < 2:
            raise ValueError("analyses need at least one task besides the reference, found none")
        values = self.capture.values
        for name in (values and values.tasks) or ():
            if name not in self.tasks:
                raise ValueError(
                    f"capture.values.tasks must name tasks, found {name!r}; tasks are: {known}"
                )
        for name, task in self.tasks.items():
            for member in task.mixture or ():
                if member not in self.tasks or self.tasks[member].mixture is not None:
                    raise ValueError(
                        f"tasks.{name}.mixture must name tasks that are not mixtures themselves, "
                        f"found {member!r}; tasks are: {known}"
                    )
        return self

    def tokens_of(self, task: str) -> int:
        """Counted tokens that a task asks for."""
        return self.tasks[task].tokens or self.capture.tokens

    def evaluation_of(self, task: str) -> EvaluationSettings:
        """What a task is evaluated on: its own settings, and for the others the study's."""
        own = self.tasks[task].evaluation
        given = {} if own is None else own.model_dump(exclude_none=True)
        return self.evaluation.model_copy(update=given)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read and validate a study file.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings, values in YAML, applied before validation.

    Raises:
        StudyError: one sentence that names the key, the rule and what was found.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"cannot read the study {path}: {error}.") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not valid YAML: {_one_line(error)}.") from error
    if not isinstance(data, dict):
        raise StudyError(f"{path} must hold keys such as name, model and tasks, found none.")
    for override in overrides:
        _apply_override(data, override)
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise StudyError(f"{path}: {explain(error, Study)}.") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML without silently overwritten keys."""


_MERGE = "tag:yaml.org,2002:merge"
"""What '<<' is: the keys of another mapping, which those beside it override."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    given = [key for key, _ in node.value if key.tag != _MERGE]
    keys = [loader.construct_object(key) for key in given]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", given[index].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key_path, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key_path):
        raise StudyError(
            f"--set takes KEY.PATH=VALUE, found {override!r}: "
            "write for example capture.tokens=4096."
        )
    *parents, last = key_path.split(".")
    target: Any = data
    for depth, parent in enumerate(parents, 1):
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise StudyError(
                f"--set {key_path}: {'.'.join(parents[:depth])} holds {target!r}, no further keys."
            )
    try:
        target[last] = yaml.load(value, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise StudyError(f"--set {key_path}: {_one_line(error)}, found {value!r}.") from error


def _one_line(error: yaml.YAMLError) -> str:
    """What is wrong with some YAML and where, without the lines that PyYAML draws."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
