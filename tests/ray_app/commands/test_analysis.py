"""The commands analyse, overlap, summary, plot and run, as a person types them."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_app import cli
from ray_app.commands import capture as capture_commands
from ray_app.run import Run

Actlake = Callable[..., SimpleNamespace]


@pytest.fixture
def actlake(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Actlake:
    """Runs the command line in this process; status, out and err of one command."""

    def run(*args: object) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["actlake", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "80")
        capfd.readouterr()
        status: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.fixture
def run(write_study: Callable[..., Path], capture_locally: Callable[..., Run]) -> Run:
    """A captured run of the tiny model: tasks code, prose, numbers, and the reference mixed."""
    return capture_locally(write_study())


def root(run: Run) -> str:
    return run.store.files.root


@pytest.fixture
def scores_file(tmp_path: Path) -> Path:
    layers, neurons = np.indices((2, 50)).reshape(2, -1)
    random = np.random.default_rng(0)
    parts = [
        pa.table({"task": [task] * 100, "layer": layers, "neuron": neurons,
                  "score": random.normal(size=100)})
        for task in ("a", "b", "c")
    ]  # fmt: skip
    pq.write_table(pa.concat_tables(parts), tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def test_the_whole_chain_from_a_captured_run_to_tables_and_pictures(
    run: Run, actlake: Actlake, tmp_path: Path
) -> None:
    options = ("--metrics", "rms,abs", "--fractions", "0.05,0.1")
    made = actlake("analyse", root(run), *options)
    assert (made.status, made.out) == (0, "")
    neurons = 2 * (72 + 32)
    assert re.fullmatch(
        rf"analysis overlap-[0-9a-f]{{8}} made: rows of importance {4 * 2 * neurons:,}, "
        rf"scores {3 * 2 * neurons:,}, selections [0-9]+, overlap 144\n",
        made.err,
    )
    again = actlake("analyse", root(run), *options)
    assert again.err == made.err.replace(" made:", " was there already:")

    shown = actlake("summary", root(run))
    assert (shown.status, shown.err) == (0, "")
    assert max(map(len, shown.out.splitlines()[:-2])) <= 80
    assert "…" not in shown.out
    check_summary(run, shown.out)

    drawn = actlake("plot", root(run), "--out", tmp_path / "pictures")
    paths = [tmp_path / "pictures" / name for name in ("layers.png", "overlap.png")]
    assert (drawn.status, drawn.out.splitlines()) == (0, [str(path) for path in paths])
    assert sorted((tmp_path / "pictures").iterdir()) == sorted(paths)
    for path in paths:
        with PIL.Image.open(path) as picture:
            picture.verify()
        with PIL.Image.open(path) as picture:
            width, height = picture.size
            assert picture.format == "PNG"
            assert 1200 < width < 2500
            assert 500 < height < 1200
            assert len(np.unique(picture.convert("L"))) > 10


def check_summary(run: Run, text: str) -> None:
    """Every number that a summary shows is one that SQL gives."""
    for task, tokens, loss, top1, top10 in run.store.sql(
        "select task, count(*), avg(loss), avg(top1::int), avg(top10::int) from tokens "
        "where counted and loss is not null group by task"
    ).fetchall():
        shares = rf"{top1:.1%} │ +{top10:.1%}"
        assert re.search(rf"{task} +│ +{tokens:,} │ +{loss:.3f} │ +{shares}", text)
    assert "Percent of the top 5.0% mlp neurons" in text
    assert "Percent of the top 5.0% attn neurons" in text
    (shared,) = run.store.sql(
        "select 100 * share_of_a from overlap where metric = 'abs' and fraction = 0.05 and "
        "site = 'mlp' and layer is null and task_a = 'code' and task_b = 'prose'"
    ).fetchall()[0]
    of_mlp = text[text.index("Percent of the top 5.0% mlp") :]
    code = next(line for line in of_mlp.splitlines() if line.startswith("│ code"))
    assert [cell.strip() for cell in code.split("│")][2::2] == ["", f"{shared:.1f}"]
    layer, neuron, score = run.store.sql(
        "select layer, neuron, score from selections where metric = 'abs' and fraction = 0.05 "
        "and site = 'attn' and task = 'numbers' and rank = 1"
    ).fetchall()[0]
    assert f"│ numbers │ attn │ {layer}.{neuron} ({score:.1f}), " in text
    assert text.endswith(f"store {root(run)}\n")


def test_summary_shows_the_metric_and_fraction_asked_for(run: Run, actlake: Actlake) -> None:
    actlake("analyse", root(run), "--metrics", "rms,std", "--fractions", "0.1,0.2")
    shown = actlake("summary", root(run), "--metric", "std", "--fraction", "0.2")
    title = "Percent of the top 20.0% mlp neurons shared (std against mixed; chance 20.0%)"
    assert title in shown.out.splitlines()
    usual = actlake("summary", root(run)).out
    assert "Percent of the top 10.0% mlp" in usual
    assert "(rms against mixed; chance 10.0%)" in usual


def test_nothing_is_cut_from_tables_that_are_wider_than_the_terminal(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    text_folder: Path,
    actlake: Actlake,
) -> None:
    names = [f"a-very-long-name-of-task-{index}" for index in range(5)]
    tasks = {name: {"files": f"{text_folder}/code/00{index}.txt"} for index, name in
             enumerate(names)}  # fmt: skip
    study = write_study(tasks=tasks, reference=names[0], capture={"tokens": 16, "max_length": 24})
    done = capture_locally(study)
    assert actlake("analyse", root(done), "--fractions", "0.1").status == 0
    lines = actlake("summary", root(done)).out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    assert "…" not in "".join(lines)
    accuracy = [line for line in lines if line.startswith("│ a-very-long-name-of-task-0")]
    assert len(accuracy) == 1


def test_one_task_beside_its_reference_has_no_overlap_to_show(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    text_folder: Path,
    actlake: Actlake,
) -> None:
    tasks = {name: {"files": f"{text_folder}/{name}/*.txt"} for name in ("code", "prose")}
    done = capture_locally(write_study(tasks=tasks, reference="prose"))
    assert actlake("analyse", root(done), "--fractions", "0.1").status == 0
    shown = actlake("summary", root(done))
    assert shown.status == 0
    assert "Percent of the top" not in shown.out
    assert "│ code │ mlp  │" in shown.out


def test_a_study_names_its_analyses(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], actlake: Actlake
) -> None:
    analyses = [
        {"metrics": ["freq"], "fractions": [0.1]},
        {"metrics": ["mean"], "fractions": [0.2], "within": "layer"},
    ]
    study = write_study(analyses=analyses)
    done = capture_locally(study)
    made = actlake("analyse", root(done), "--study", study)
    assert made.status == 0
    assert len(made.err.splitlines()) == 2
    rows = done.store.sql("select distinct metric, within from selections order by all").fetchall()
    assert rows == [("freq", "model"), ("mean", "layer")]
    refused = actlake("analyse", root(done), "--study", study, "--seed", "1")
    assert one_sentence(refused) == (
        "--seed cannot be given beside --study, which says what to compute: leave one of the two "
        "out."
    )


def test_a_study_without_analyses_cannot_name_any(
    write_study: Callable[..., Path], run: Run, actlake: Actlake
) -> None:
    study = write_study()
    refused = actlake("analyse", root(run), "--study", study)
    assert one_sentence(refused) == (
        f"the study {study} has no analyses: add some, or pass --metrics."
    )


def test_run_captures_analyses_and_shows_in_one_command(
    write_study: Callable[..., Path],
    capture_locally: Callable[..., Run],
    actlake: Actlake,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    study = write_study(analyses=[{"metrics": ["abs"], "fractions": [0.1]}])
    calls: list[tuple[str, bool]] = []

    def capture_without_ray(settings: Any, store: str, *, new_run: bool) -> Run:
        calls.append((settings.name, new_run))
        return capture_locally(study, Path(store))

    monkeypatch.setattr(capture_commands, "capture", capture_without_ray)
    done = actlake("run", study, "--store", tmp_path / "lake")
    assert done.status == 0
    assert calls == [("tiny", False)]
    assert " made: rows of importance" in done.err
    assert "Percent of the top 10.0% mlp neurons" in done.out
    assert done.out.endswith(f"store {tmp_path}/lake\n")


@pytest.fixture
def run_study(
    capture_locally: Callable[..., Run],
    actlake: Actlake,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., SimpleNamespace]:
    """`actlake run` with the capture in this process."""

    def run(study: Path, *options: object) -> SimpleNamespace:
        monkeypatch.setattr(
            capture_commands,
            "capture",
            lambda settings, store, *, new_run: capture_locally(study, Path(store)),
        )
        return actlake("run", study, "--store", tmp_path / "lake", *options)

    return run


def test_a_reference_that_changed_since_the_run_began_is_the_one_scored_against(
    write_study: Callable[..., Path], run_study: Any, actlake: Actlake, tmp_path: Path
) -> None:
    analyses = [{"metrics": ["abs"], "fractions": [0.1]}]
    first = run_study(write_study(analyses=analyses))
    assert "(abs against mixed; chance" in first.out
    changed = write_study(analyses=analyses, reference="prose", file_name="changed.yaml")
    second = run_study(changed)
    assert "(abs against prose; chance" in second.out
    assert " made: rows of" in second.err
    again = actlake("analyse", tmp_path / "lake", "--study", changed)
    assert " was there already: rows of" in again.err


def test_a_run_without_reference_takes_the_one_that_the_study_names_later(
    write_study: Callable[..., Path], run_study: Any, actlake: Actlake, tmp_path: Path
) -> None:
    assert run_study(write_study(reference=None)).status == 0
    refused = actlake("analyse", tmp_path / "lake", "--fractions", "0.1")
    assert "named no reference: pass --reference with one of code" in one_sentence(refused)
    analyses = [{"metrics": ["abs"], "fractions": [0.1]}]
    later = run_study(write_study(reference="mixed", analyses=analyses, file_name="later.yaml"))
    assert "(abs against mixed; chance" in later.out


def test_run_shows_the_analysis_of_its_study_and_not_a_later_one(
    write_study: Callable[..., Path], run_study: Any, actlake: Actlake, tmp_path: Path
) -> None:
    study = write_study(analyses=[{"metrics": ["abs"], "fractions": [0.1]}])
    (own,) = re.findall(r"overlap-\w+", run_study(study).out)
    actlake("analyse", tmp_path / "lake", "--fractions", "0.2")
    assert own not in actlake("summary", tmp_path / "lake").out
    assert own in run_study(study).out
    assert own in actlake("summary", tmp_path / "lake", "--analysis", own).out
    refused = one_sentence(actlake("summary", tmp_path / "lake", "--analysis", "overlap-0"))
    assert "has no analysis 'overlap-0' of overlap" in refused


def test_pictures_without_analyses_are_refused_before_the_capture(
    write_study: Callable[..., Path], run_study: Any, tmp_path: Path
) -> None:
    refused = run_study(write_study(), "--plots", tmp_path / "plots")
    assert "--plots draws analyses, and the study" in one_sentence(refused)
    assert not (tmp_path / "lake").exists()


def one_sentence(result: SimpleNamespace) -> str:
    """The message of a refusal: status 2, one line, nothing on standard output."""
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(".")
    return str(line.removeprefix("error: "))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fractions", "0"), "each fraction must be in (0, 1], found 0"),
        (("--fractions", "0.1,1.2"), "each fraction must be in (0, 1], found 1.2"),
        (("--fractions", "nan"), "each fraction must be in (0, 1], found nan"),
        (("--fractions", "0.001"), "fraction 0.001 selects no neuron: 64 neurons of site 'attn' "),
        (("--metrics", "abs,max"), "'abs', 'rms', 'std', 'sqrt', 'freq', 'mean' or 'rand'"),
        (("--sites", "up"), "'mlp' or 'attn'"),
        (("--reference", "verse"), "choose one of code, mixed, numbers, prose."),
        (("--run", "no-such"), "no run 'no-such' in "),
        (("--study", "no-such.yaml"), "no-such.yaml"),
    ],
    ids=str,
)
def test_analyse_refuses_what_it_cannot_do(
    run: Run, actlake: Actlake, options: tuple[str, ...], message: str
) -> None:
    assert message in one_sentence(actlake("analyse", root(run), *options))
    assert run.store.files.list("analyses/**/*") == []


def test_a_run_that_is_not_complete_is_refused_or_analysed_as_part(
    write_study: Callable[..., Path], begin_locally: Callable[..., Run], actlake: Actlake
) -> None:
    begun = begin_locally(write_study())
    message = one_sentence(actlake("analyse", root(begun)))
    assert re.search(r"not complete \(0 of [0-9]+ shards are committed\): finish it, or p", message)
    message = one_sentence(actlake("analyse", root(begun), "--partial"))
    assert "task 'code' of run" in message
    assert message.endswith("has no committed shard yet: capture more first.")


@pytest.mark.parametrize("command", ["summary", "plot"])
def test_a_run_without_analysis_has_nothing_to_show(
    run: Run, actlake: Actlake, tmp_path: Path, command: str
) -> None:
    out = ("--out", tmp_path / "pictures") if command == "plot" else ()
    assert one_sentence(actlake(command, root(run), *out)) == (
        f"run {run.id!r} has no analysis yet: make one with `actlake analyse {root(run)}`."
    )
    assert not (tmp_path / "pictures").exists()


def test_what_the_analysis_does_not_have_is_refused_with_what_it_has(
    run: Run, actlake: Actlake
) -> None:
    actlake("analyse", root(run), "--metrics", "abs,rms", "--fractions", "0.1,0.2")
    assert one_sentence(actlake("summary", root(run), "--metric", "std")) == (
        "metric must be one that the analysis has (abs, rms), found 'std'."
    )
    assert one_sentence(actlake("summary", root(run), "--fraction", "0.3")) == (
        "fraction must be one that the analysis has (0.1, 0.2), found 0.3."
    )


def test_pictures_cannot_go_where_a_file_is(run: Run, actlake: Actlake, tmp_path: Path) -> None:
    actlake("analyse", root(run), "--fractions", "0.1")
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    message = one_sentence(actlake("plot", root(run), "--out", tmp_path / "taken"))
    assert message == (
        f"cannot write pictures to {tmp_path}/taken: File exists. Give a folder that can be "
        "written."
    )


def test_a_folder_that_is_no_store_is_refused(actlake: Actlake, tmp_path: Path) -> None:
    for command in (("analyse", tmp_path), ("summary", tmp_path), ("plot", tmp_path, "--out", "x")):
        assert one_sentence(actlake(*command)).startswith(f"no store at {tmp_path}: ")


def test_overlap_writes_both_tables_in_both_formats(
    actlake: Actlake, scores_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = actlake("overlap", "--scores", scores_file, "--fractions", "0.1,0.5", "--out", out)
    assert (done.status, done.out) == (0, "")
    assert done.err == f"{out}: overlap (36 rows) and selections, each as Parquet and CSV\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "overlap.csv", "overlap.parquet", "selections.csv", "selections.parquet",
    ]  # fmt: skip
    layered = actlake("overlap", "--scores", scores_file, "--within", "layer", "--fractions",
                      "0.1", "--out", out)  # fmt: skip
    assert layered.status == 0
    table = pq.read_table(out / "overlap.parquet")
    assert set(table["within"].to_pylist()) == {"layer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fractions", "0"), "each fraction must be in (0, 1], found 0: give shares such as"),
        (("--fractions", "0.005"), "fraction 0.005 selects no neuron: 100 neurons of site 'given'"),
        (("--scores", "none.parquet"), "there is no scores file none.parquet: give the path"),
        (("--out", "/proc/none"), "cannot make the store /proc/none: "),
    ],
    ids=str,
)
def test_overlap_refuses_what_it_cannot_do(
    actlake: Actlake, scores_file: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    usual = ("--scores", scores_file, "--out", tmp_path / "out")
    assert message in one_sentence(actlake("overlap", *usual, *options))
    assert not (tmp_path / "out" / "overlap.parquet").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("overlap", "--out", "x"), "Missing option '--scores'."),
        (("overlap", "--scores", "x"), "Missing option '--out'."),
        (
            ("overlap", "--scores", "x", "--out", "y", "--fractions", "a,b"),
            "'a,b' is not a list of numbers such as 0.01,0.05",
        ),
        (("analyse", ".", "--within", "head"), "'head' is not one of 'model', 'layer'."),
        (("plot", "."), "Missing option '--out'."),
    ],
    ids=str,
)
def test_wrong_options_are_explained(actlake: Actlake, args: tuple[str, ...], message: str) -> None:
    result = actlake(*args)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
