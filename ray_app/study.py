"""Study files: one YAML file that says which model, which tasks, what to capture and analyse."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from storage import ActlakeError

__all__ = [
    "AnalysisSettings",
    "CaptureSettings",
    "ModelSettings",
    "ResourceSettings",
    "Study",
    "StudyError",
    "TaskSettings",
    "load_study",
]

Site = Literal["mlp", "attn"]
Scalar = str | int | float | bool
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", max_length=64)]


class StudyError(ActlakeError):
    """A study file is wrong, or asks for something that is not there."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Settings):
    """Which model, and in which state."""

    source: str = Field(
        description="A Hugging Face id ('mistralai/Mistral-7B-v0.3'), a local folder, a GGUF file, "
        "or 'package:NAME/FILE' for a model file inside an installed Python package."
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
    site_modules: dict[Site, str] = Field(
        default_factory=dict,
        description="Output projections named by hand, for models whose structure is not "
        "recognised: {mlp: 'model.layers.{layer}.mlp.down_proj'}.",
    )

    @field_validator("site_modules")
    @classmethod
    def _has_layer_placeholder(cls, value: dict[Site, str]) -> dict[Site, str]:
        for site, pattern in value.items():
            if "{layer}" not in pattern:
                raise ValueError(
                    f"must contain '{{layer}}' where the layer's number stands, found {pattern!r} "
                    f"for {site}"
                )
        return value


class Condition(_Settings):
    """A test of one dataset column."""

    min: float | None = Field(None, description="Keep values >= this.")
    max: float | None = Field(None, description="Keep values <= this.")
    not_: Scalar | list[Scalar] | None = Field(
        None, alias="not", description="Drop this value or these values."
    )


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
    label_column: str | None = Field(None, description="Column that holds the sample's label.")
    filter: dict[str, Scalar | list[Scalar] | Condition] = Field(
        default_factory=dict,
        description="Rows to keep: {column: value}, {column: [values]} or "
        "{column: {min: 0, max: 1, not: value}}.",
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
        return self


class CaptureSettings(_Settings):
    """What to read from the model, over how much text, cut how."""

    sites: list[Site] = Field(
        default_factory=lambda: list(get_args(Site)), min_length=1, description="Sites to capture."
    )
    layers: list[int] | Literal["all"] = Field(
        "all", description="Layers to capture: 'all' or a list of layer numbers from 0."
    )
    tokens: int = Field(100_000, ge=1, description="Counted tokens of each task.")
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
    special_tokens: Literal["exclude", "include"] = Field(
        "exclude",
        description="Whether positions of special tokens (BOS and the like) count in statistics. "
        "Their positions are in the table tokens either way.",
    )
    batch_tokens: int = Field(
        1024, ge=1, description="Most tokens of one batch, padding included (a sample is not cut)."
    )
    shard_tokens: int = Field(
        16_384,
        ge=1,
        description="Tokens after which a shard is closed: the unit of work and commit.",
    )


class ResourceSettings(_Settings):
    """Machines. Nothing here changes which numbers are computed or how they are grouped."""

    stages: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        1,
        description="Parts that the model's layers are cut into, each in an actor of its own; "
        "'auto' takes the fewest that fit the cluster's memory.",
    )
    replicas: int = Field(1, ge=1, description="Copies of the whole model that work in parallel.")
    gpus_per_stage: int = Field(0, ge=0, description="GPUs of each stage; 0 computes on CPUs.")
    cpus_per_stage: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each stage; all cores shared out if not given. Fixed when the "
        "run begins, because sums round differently with another number of threads.",
    )
    reduction: Literal["auto", "eager", "compiled"] = Field(
        "auto",
        description="How statistics are reduced: by torch's operators, or by a kernel that "
        "torch.compile builds; 'auto' compiles for long runs where a C++ compiler is. Fixed when "
        "the run begins, because the two differ in the last bits.",
    )
    max_deaths: int = Field(
        10,
        ge=0,
        description="Deaths of workers in a row, without a shard finished in between, that are "
        "borne before the capture stops.",
    )


Metric = Literal["abs", "rms", "std", "sqrt", "freq", "mean", "rand"]


class AnalysisSettings(_Settings):
    """One analysis of the run: importance, scores, selections and their overlap."""

    metrics: list[Metric] = Field(["abs"], min_length=1, description="Importance metrics.")
    fractions: list[float] = Field(
        [0.01, 0.05],
        min_length=1,
        description="Fractions of the neurons to select, each in (0, 1].",
    )
    within: Literal["model", "layer"] = Field(
        "model", description="Select the top fraction over all layers, or in each layer."
    )
    sites: list[Site] | None = Field(None, description="Sites to analyse; all captured ones.")
    eps: dict[Site, float] | None = Field(
        None, description="Added to the reference importance; the papers' values if not given."
    )
    seed: int = Field(0, description="Seed of the metric rand.")

    @field_validator("fractions")
    @classmethod
    def _in_range(cls, value: list[float]) -> list[float]:
        for fraction in value:
            if not 0 < fraction <= 1:
                raise ValueError(f"each fraction must be in (0, 1], found {fraction}")
        return value


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
        for override in overrides:
            _apply_override(data, override)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise StudyError(f"{path} is not valid YAML: {message}.") from error
    if not isinstance(data, dict):
        raise StudyError(f"{path} must hold keys such as name, model and tasks, found none.")
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise StudyError(_explain(error, path)) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML without silently overwritten keys."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.value[index][0].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _apply_override(data: Any, override: str) -> None:
    key_path, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key_path):
        raise StudyError(
            f"--set takes KEY.PATH=VALUE, found {override!r}: "
            "write for example capture.tokens=4096."
        )
    *parents, last = key_path.split(".")
    target = data
    for parent in parents:
        if not isinstance(target, dict):
            break
        target = target.setdefault(parent, {})
    if not isinstance(target, dict):
        raise StudyError(f"--set {key_path}: {'.'.join(parents)} holds a value, not further keys.")
    target[last] = yaml.safe_load(value)


def _explain(error: ValidationError, path: str | Path) -> str:
    errors = error.errors()
    # A misspelt key causes others to be missing: the misspelling is what to say.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
    more = f" ({len(errors) - 1} more problems follow from there)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{path}: {_unknown_key(place, first['loc'])}{more}."
    if first["type"] == "missing":
        return f"{path}: {place} must be given and is missing{more}."
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{path}: {place + ': ' if place else ''}{message}{found}{more}."


def _is_union_branch(part: int | str) -> bool:
    # pydantic adds the name of the union member that it tried to the location.
    return isinstance(part, str) and bool(re.search(r"\[|^(str|int|float|bool|Condition)$", part))


def _unknown_key(place: str, location: Sequence[int | str]) -> str:
    valid = _valid_keys(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys are: {', '.join(valid)}"
    return f"unknown key {place!r}; {hint}".rstrip(".")


def _valid_keys(location: Sequence[int | str]) -> list[str]:
    sections: Mapping[str, type[BaseModel]] = {
        "model": ModelSettings,
        "tasks": TaskSettings,
        "capture": CaptureSettings,
        "resources": ResourceSettings,
        "analyses": AnalysisSettings,
    }
    if not location:
        return list(Study.model_fields)
    section = Condition if "filter" in location else sections[str(location[0])]
    return [field.alias or name for name, field in section.model_fields.items()]
