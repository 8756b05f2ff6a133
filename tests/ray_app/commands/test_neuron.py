"""``actlake neuron`` on a capture of a tiny model: the page, what is behind it, and bad input."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

from analysis import AnalysisSettings, analyse_run
from analysis.neuron import open_neuron
from analysis.summary import newest_analysis
from ray_app.commands.neuron import _context
from ray_app.run import Run

Actlake = Callable[..., tuple[int, str, str]]


def test_a_page_shows_statistics_scores_and_marked_examples(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], actlake: Actlake
) -> None:
    run = capture_locally(write_study(), None, "capture.tokens=80")
    store, settings = run.store, AnalysisSettings(metrics=["abs"], fractions=[0.1, 0.5])
    analyse_run(store, run.id, settings)
    view = newest_analysis(store, run.id)
    scores = store.sql(
        "select task, layer, neuron, score from scores where site = 'mlp'"
    ).fetchall()
    ranked = {task: sorted(r for r in scores if r[0] == task) for task in ("code", "prose")}
    ranked = {t: sorted(rows, key=lambda r: (-r[3], r[1:3])) for t, rows in ranked.items()}
    # The best of one task is selected in it, and has rank 1.
    _, layer, neuron, score = ranked["code"][0]
    found = open_neuron(store, run.id, site="mlp", layer=layer, neuron=neuron)
    by_task = {row["task"]: row for row in found.scores(view)}
    assert by_task.keys() == {"code", "prose", "numbers"}
    assert (by_task["code"]["rank"], by_task["code"]["score"]) == (1, score)
    assert (by_task["code"]["population"], by_task["code"]["fractions"]) == (144, [0.1, 0.5])
    places = [row[1:3] for row in ranked["prose"]]
    assert by_task["prose"]["rank"] == places.index((layer, neuron)) + 1

    examples = found.examples()
    for kind, best in (("highest", max), ("lowest", min)):
        of_kind = [row for row in examples if row["kind"] == kind]
        assert [row["rank"] for row in of_kind] == [1, 2, 3, 4, 5]
        values = store.sql(
            "select value from top_activations where (site, layer, neuron, kind) = "
            f"('mlp', {layer}, {neuron}, '{kind}') order by value {'desc' * (best is max)} limit 5"
        ).fetchnumpy()["value"]
        np.testing.assert_array_equal([row["value"] for row in of_kind], values)
        extremum = best(row["max" if best is max else "min"] for row in found.statistics())
        assert of_kind[0]["value"] == extremum
    for row in examples:
        tokens = store.sql(
            "select list(token order by position) from tokens where task = $task and sample = $id",
            {"task": row["task"], "id": row["sample"]},
        ).fetchall()[0][0]
        # No sample is longer than what is shown on either side.
        assert row["before"] + row["token"] + row["after"] == "".join(tokens)
        assert row["token"] == tokens[row["position"]]
    alone = found.examples(task="code", per_sample=True)
    assert {row["task"] for row in alone} == {"code"}
    assert len({(row["kind"], row["sample"]) for row in alone}) == len(alone)

    place = "--site", "mlp", "--layer", layer, "--neuron", neuron
    status, out, err = actlake("neuron", store.files.root, *place, "--count", 3)
    assert (status, err) == (0, "")
    assert all(cell_len(line) <= 80 for line in out.splitlines())
    for text in ("Statistics by task", "Scores by abs against mixed", "0.1, 0.5"):
        assert text in out
    assert out.count("«") == 6
    assert f"«{examples[0]['token']}»" in out


def test_what_is_not_there_is_said(
    write_study: Callable[..., Path], capture_locally: Callable[..., Run], actlake: Actlake
) -> None:
    run = capture_locally(write_study(), None, "capture.top=0", "capture.tokens=20")

    def refused(*options: object) -> str:
        place = {"--site": "mlp", "--layer": 1, "--neuron": 5}
        place |= dict(zip(options[::2], options[1::2], strict=True))
        arguments = [part for pair in place.items() for part in pair]
        status, out, err = actlake("neuron", run.store.files.root, *arguments)
        assert (status, out) == (2, "")
        return err

    assert "site must be one that run" in refused("--site", "mpl")
    assert "captured (attn, mlp), found 'mpl'" in refused("--site", "mpl")
    assert "at site 'mlp' (0, 1), found 2." in refused("--layer", 2)
    assert "neuron must be from 0 to 71 at site 'mlp' in layer 1" in refused("--neuron", 72)
    place = ("--site", "mlp", "--layer", "1", "--neuron", "5")
    status, out, err = actlake("neuron", run.store.files.root, *place)
    assert (status, "Statistics by task" in out) == (2, True)
    assert (
        "kept no top activations (it has samples, stats, tokens): capture it again with "
        "--set capture.top=5, or a larger capture.budget_gb if it has one, and --new-run." in err
    )
    run.record["capture"]["top"] = 2
    run.store.files.put_json(f"runs/run={run.id}/run.json", run.record)
    for options, message in {
        ("--count", "3"): "at most 2 activations of each kind",
        ("--task", "cod"): "task must be one of run",
    }.items():
        assert message in actlake("neuron", run.store.files.root, *place, *options)[2]


@pytest.mark.parametrize("width", [40, 81])
def test_a_token_is_shown_whole_and_harmless(width: int) -> None:
    row = {
        "before": "a\x1b[31m " + "文" * 50 + "\n",
        "token": " \x1b[2J\n",
        "after": "\r\u202eb" * 60,
    }
    line = _context(row, width).plain
    assert line.isprintable()
    assert cell_len(line) <= width
    assert "文 « \\x1b[2J\\n» " in line
    assert line.endswith("…")
