"""Study files are read as written, and what is wrong in one is said in one sentence."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_app.study import Study, StudyError, load_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"source": "some/model"},
    "tasks": {"a": {"files": "a/*.txt"}, "b": {"files": "b/*.txt"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The small study with one value changed; a value of `...` takes the key away."""
    study = copy.deepcopy(SMALL)
    *parents, last = path.split(".")
    target = study
    for parent in parents:
        target = target.setdefault(parent, {})
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return study


def refusal(folder: Path, study: Any, overrides: Sequence[str] = ()) -> str:
    """What loading a study says against it, without the name of the file."""
    path = folder / "study.yaml"
    path.write_text(study if isinstance(study, str) else yaml.safe_dump(study), encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load_study(path, overrides)
    return str(caught.value).removeprefix(f"{path}: ").replace(str(path), "FILE")


def load(folder: Path, study: dict[str, Any], overrides: Sequence[str] = ()) -> Study:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return load_study(path, overrides)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_the_studies_that_come_with_the_project_are_valid(path: Path) -> None:
    assert load_study(path).tasks


def test_there_are_studies_to_check() -> None:
    assert "smollm2-demo.yaml" in {path.name for path in STUDIES}


def test_a_small_study_gets_the_documented_defaults(tmp_path: Path) -> None:
    study = load(tmp_path, SMALL)
    assert (study.model.init, study.model.dtype, study.seed) == ("pretrained", "float32", 0)
    assert study.capture.sites == ["attn", "mlp"]
    assert study.capture.layers == "all"
    assert study.capture.special_tokens == "auto"
    assert study.tokens_of("a") == study.capture.tokens == 100_000
    assert (study.reference, study.analyses) == (None, [])


def test_a_task_may_ask_for_tokens_of_its_own(tmp_path: Path) -> None:
    study = load(tmp_path, changed("tasks.a.tokens", 7))
    assert (study.tokens_of("a"), study.tokens_of("b")) == (7, 100_000)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("modle", "model"),
        ("analysis", "analyses"),
        ("model.sorce", "source"),
        ("model.d_type", "dtype"),
        ("tasks.a.fles", "files"),
        ("tasks.a.datset", "dataset"),
        ("capture.token", "tokens"),
        ("capture.maxlength", "max_length"),
        ("resources.replcas", "replicas"),
        ("tasks.filter.fils", "files"),
        ("tasks.str.fils", "files"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(
    tmp_path: Path, path: str, nearest: str
) -> None:
    expected = f"unknown key {path!r}; the nearest valid one is {nearest!r}."
    assert refusal(tmp_path, changed(path, 1)) == expected


def test_an_unknown_key_in_a_filter_or_an_analysis_is_refused_alike(tmp_path: Path) -> None:
    assert refusal(tmp_path, changed("tasks.a.filter", {"stars": {"minimum": 3}})) == (
        "unknown key 'tasks.a.filter.stars.minimum'; the nearest valid one is 'min'."
    )
    study = changed("analyses", [{"metric": ["abs"]}]) | {"reference": "a"}
    assert refusal(tmp_path, study) == (
        "unknown key 'analyses.0.metric'; the nearest valid one is 'metrics'."
    )


def test_an_unknown_key_like_no_other_is_refused_with_all_valid_ones(tmp_path: Path) -> None:
    assert refusal(tmp_path, changed("xyzzy", 1)) == (
        "unknown key 'xyzzy'; valid are name, seed, model, tasks, reference, capture, resources, "
        "analyses, evaluation."
    )


def test_other_mistakes_are_counted_beside_an_unknown_key(tmp_path: Path) -> None:
    study = changed("model", ...) | {"modle": {"source": "x"}, "seed": "x"}
    assert refusal(tmp_path, study) == (
        "unknown key 'modle'; the nearest valid one is 'model' (2 more to correct)."
    )


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("name", ..., "name must be given and is missing."),
        ("model", ..., "model must be given and is missing."),
        ("model.source", ..., "model.source must be given and is missing."),
        ("capture", None, "capture must hold keys, found None."),
        ("tasks.a", "a/*.txt", "tasks.a must hold keys, found 'a/*.txt'."),
        ("tasks", ["a"], "tasks: input should be a valid dictionary, found ['a']."),
        (
            "tasks",
            {},
            "tasks: dictionary should have at least 1 item after validation, not 0, found {}.",
        ),
        (
            "seed",
            "x",
            ("seed: input should be a valid integer, found 'x'."),
        ),
        (
            "capture.tokens",
            0,
            "capture.tokens: input should be greater than or equal to 1, found 0.",
        ),
        (
            "capture.max_length",
            1,
            "capture.max_length: input should be greater than or equal to 2, found 1.",
        ),
        (
            "capture.layers",
            "some",
            (
                "capture.layers cannot be 'some': Layers to capture: 'all' or a list of layer "
                "numbers from 0."
            ),
        ),
        (
            "capture.layers",
            [],
            (
                "capture.layers cannot be []: Layers to capture: 'all' or a list of layer numbers "
                "from 0."
            ),
        ),
        (
            "capture.layers",
            [0, "x"],
            ("capture.layers.1: input should be a valid integer, found 'x'."),
        ),
        (
            "capture.sites",
            ["mlp", "mpl"],
            "capture.sites.1: input should be 'mlp' or 'attn', found 'mpl'.",
        ),
        (
            "model.dtype",
            "int7",
            "model.dtype: input should be 'float32', 'bfloat16' or 'float16', found 'int7'.",
        ),
        (
            "model.site_modules",
            {"mpl": "h.{layer}"},
            "model.site_modules.mpl: input should be 'mlp' or 'attn', found 'mpl'.",
        ),
        *(
            (
                "model.site_modules",
                {"mlp": pattern},
                (
                    "model.site_modules: must contain '{layer}' where the layer's number stands, "
                    f"and no other braces, found {pattern!r} for mlp."
                ),
            )
            for pattern in ("h.0.mlp", "h.{layer}.{x}", "h.{layer", "h.{layer}.{}")
        ),
        (
            "tasks.7a",
            {"files": "x"},
            "tasks.7a: string should match pattern '^[A-Za-z][A-Za-z0-9_.-]*$', found '7a'.",
        ),
        ("tasks.a.limit", 0, "tasks.a.limit: input should be greater than or equal to 1, found 0."),
        (
            "tasks.a.files",
            5,
            (
                "tasks.a.files cannot be 5: Plain text files by glob, one document each. "
                "'package:NAME/GLOB' looks inside an installed package, 'site-packages:GLOB' "
                "among all installed packages."
            ),
        ),
        (
            "tasks.a.filter",
            {"stars": None},
            (
                "tasks.a.filter.stars cannot be None: Rows to keep: {column: value}, {column: "
                "[values]} or {column: {min: 0, max: 1, not: value}}; 'meta.set' is the field set "
                "of a column meta."
            ),
        ),
        (
            "tasks.a.filter",
            {"stars": {"min": "few"}},
            ("tasks.a.filter.stars.min: input should be a valid number, found 'few'."),
        ),
        (
            "tasks.a.dataset",
            "json",
            (
                "tasks.a: exactly one of dataset, files and mixture must be given, found dataset "
                "and files."
            ),
        ),
        (
            "tasks.a.files",
            ...,
            "tasks.a: exactly one of dataset, files and mixture must be given, found none of them.",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_the_rule(
    tmp_path: Path, path: str, value: Any, error: str
) -> None:
    assert refusal(tmp_path, changed(path, value)) == error


@pytest.mark.parametrize(
    ("mixture", "error"),
    [
        ([], "tasks.m: mixture must name at least one task, found an empty list."),
        (["a", "a"], "tasks.m: mixture must name each task once, found ['a', 'a']."),
        (
            ["a", "c"],
            (
                "tasks.m.mixture must name tasks that are not mixtures themselves, found 'c'; "
                "tasks are: a, b, m."
            ),
        ),
        (
            ["m"],
            (
                "tasks.m.mixture must name tasks that are not mixtures themselves, found 'm'; "
                "tasks are: a, b, m."
            ),
        ),
    ],
)
def test_a_mixture_names_other_tasks_once_each(
    tmp_path: Path, mixture: list[str], error: str
) -> None:
    assert refusal(tmp_path, changed("tasks.m", {"mixture": mixture})) == error


def test_the_reference_must_be_a_task(tmp_path: Path) -> None:
    assert refusal(tmp_path, SMALL | {"reference": "c"}) == (
        "reference must be the name of a task, found 'c'; tasks are: a, b."
    )


def test_analyses_need_a_reference_and_a_task_to_compare(tmp_path: Path) -> None:
    assert refusal(tmp_path, SMALL | {"analyses": [{}]}) == (
        "analyses need a reference: add 'reference: TASK' with one of: a, b."
    )
    alone = changed("tasks.b", ...) | {"analyses": [{}], "reference": "a"}
    assert refusal(tmp_path, alone) == (
        "analyses need at least one task besides the reference, found none."
    )


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_lies_above_nought_and_at_most_at_one(tmp_path: Path, fraction: float) -> None:
    study = SMALL | {"reference": "a", "analyses": [{"fractions": [0.1, fraction]}]}
    assert refusal(tmp_path, study) == (
        f"analyses.0.fractions: each fraction must be in (0, 1], found {float(fraction)}."
    )


def test_a_fraction_of_one_is_taken(tmp_path: Path) -> None:
    study = SMALL | {"reference": "a", "analyses": [{"fractions": [1, 1e-6]}]}
    assert sorted(load(tmp_path, study).analyses[0].fractions) == [1e-6, 1.0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "FILE must hold keys such as name, model and tasks, found none."),
        ("- a\n- b\n", "FILE must hold keys such as name, model and tasks, found none."),
        (
            "name: a\nseed: 1\nname: b\n",
            "FILE is not valid YAML: the key 'name' is given twice in line 3, column 1.",
        ),
        (
            "name: x\ntasks:\n  a: {files: x, files: y}\n",
            "FILE is not valid YAML: the key 'files' is given twice in line 3, column 17.",
        ),
        (
            "name: [a\n",
            (
                "FILE is not valid YAML: expected ',' or ']', but got '<stream end>' in line 2, "
                "column 1."
            ),
        ),
        (
            "name: !!python/object:os.system {}\n",
            (
                "FILE is not valid YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object:os.system' in line 1, column 7."
            ),
        ),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, error: str) -> None:
    assert refusal(tmp_path, text) == error


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(tmp_path / "none.yaml")
    assert str(caught.value) == (
        f"cannot read the study {tmp_path}/none.yaml: [Errno 2] No such file or directory: "
        f"'{tmp_path}/none.yaml'."
    )
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(
        StudyError, match=rf"^cannot read the study {tmp_path}/binary.yaml: 'utf-8'"
    ):
        load_study(tmp_path / "binary.yaml")


def test_overrides_change_single_settings(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        SMALL,
        [
            "capture.tokens=4096",
            "model.init=random",
            "capture.layers=[0, 2]",
            "tasks.a={dataset: json, filter: {stars: {not: [1, 2]}}}",
            "reference=b",
        ],
    )
    assert study.capture.tokens == 4096
    assert study.model.init == "random"
    assert study.capture.layers == [0, 2]
    assert study.tasks["a"].model_dump(by_alias=True)["filter"] == {
        "stars": {"min": None, "max": None, "not": [1, 2]}
    }
    assert study.reference == "b"


def test_the_last_override_of_a_setting_holds(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "error"),
    [
        (
            "capture.tokens",
            (
                "--set takes KEY.PATH=VALUE, found 'capture.tokens': write for example "
                "capture.tokens=4096."
            ),
        ),
        (
            "capture..tokens=1",
            (
                "--set takes KEY.PATH=VALUE, found 'capture..tokens=1': write for example "
                "capture.tokens=4096."
            ),
        ),
        ("=1", "--set takes KEY.PATH=VALUE, found '=1': write for example capture.tokens=4096."),
        (
            "capture.layers=[1",
            (
                "--set capture.layers: expected ',' or ']', but got '<stream end>' in line 1, "
                "column 3, found '[1'."
            ),
        ),
        ("name.x=1", "--set name.x: name holds 'small', no further keys."),
        (
            "tasks.a.files.x.y=1",
            "--set tasks.a.files.x.y: tasks.a.files holds 'a/*.txt', no further keys.",
        ),
        ("capture.tokns=1", "unknown key 'capture.tokns'; the nearest valid one is 'tokens'."),
        ("seed=", "seed: input should be a valid integer, found None."),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, error: str) -> None:
    assert refusal(tmp_path, SMALL, [override]) == error


def test_a_study_cannot_be_changed_after_it_was_read(tmp_path: Path) -> None:
    study = load(tmp_path, SMALL)
    with pytest.raises(ValueError, match="frozen"):
        study.seed = 3  # type: ignore[misc]


def test_every_setting_explains_itself() -> None:
    def unexplained(settings: Any, place: str) -> list[str]:
        found = []
        for name, field in settings.model_fields.items():
            if not field.description:
                found.append(f"{place}.{name}")
            for part in getattr(field.annotation, "__args__", ()) or (field.annotation,):
                if hasattr(part, "model_fields"):
                    found += unexplained(part, f"{place}.{name}")
        return found

    assert unexplained(Study, "study") == []


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"files": "a/*.txt", "filter": {"stars": 1}},
            (
                "tasks.a: filter says nothing about files and would be ignored: leave it out; keys "
                "beside files are files, limit, tokens, evaluation."
            ),
        ),
        ({"files": "a/*.txt", "column": "body"}, "tasks.a: column says nothing about files"),
        ({"mixture": ["b"], "split": "test"}, "tasks.a: split says nothing about mixture"),
        (
            {"dataset": "json", "column": "body", "template": "{body}"},
            "tasks.a: column and template both say what the text is: leave one out.",
        ),
    ],
)
def test_keys_that_would_be_ignored_are_refused(
    tmp_path: Path, task: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError) as caught:
        load(tmp_path, {**SMALL, "tasks": {**SMALL["tasks"], "a": task}})
    assert message in str(caught.value)


def test_windows_without_splitting_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="windows_per_document says nothing where documents are"):
        load(tmp_path, SMALL, ["capture.windows_per_document=2"])


def test_a_truth_value_is_no_count(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"capture\.tokens: input should be a valid integer, f"):
        load(tmp_path, SMALL, ["capture.tokens=true"])


def test_the_order_of_sites_and_layers_says_nothing(tmp_path: Path) -> None:
    one = load(tmp_path, SMALL, ["capture.sites=[attn, mlp]", "capture.layers=[2, 0, 2]"])
    other = load(tmp_path, SMALL, ["capture.sites=[mlp, attn]", "capture.layers=[0, 2]"])
    assert one == other
