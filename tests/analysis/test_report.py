"""The report's rows against the tables, what it leaves out, and the page in a real browser."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from analysis import AnalysisError, AnalysisSettings, analyse_run, compare_runs, page
from analysis.alignment import AlignmentSettings, align_experts
from analysis.experts import ExpertSettings, keep_experts, split_at_random
from analysis.keeping import ComputedTables, keep
from analysis.page import render_page
from analysis.report import make_report
from browser import CHROMIUM, Browser
from storage import TABLES, Store, StoreError, create_store, layout
from written_runs import importances, write_run

NASTY = ("<script>alert(1)", '{{script}}&amp;, "x"', "constructor")
"""Names of tasks that would harm a page that took them for markup, marks or properties."""

SOURCE = "</script><img src=x onerror=alert(1)><!-- \u2028"
"""What a task says that it was read from."""

CURVE = [("score", None, 0.5), ("random", 0, 0.1), ("random", 1, 0.3)]
"""chosen_by, seed and change of the loss of three ablations."""

MASSES = {("truth", 0.1): (0.3, 0.5), ("truth", 0.5): (0.7, 0.8), ("random", 0.1): (0.1, 0.1)}
"""Share of the mass that (router, share) keeps in two layers."""

UNNAMED = """
    [...document.querySelectorAll("svg:not([aria-hidden]), [role=group], input, select, figure")]
    .filter(e => !(e.ariaLabel || e.labels?.length
                   || document.getElementById(e.getAttribute("aria-labelledby"))))
    .map(e => e.outerHTML)
"""
"""What a screen reader would have no name for."""

PRUNING = """
    [...document.querySelectorAll("section section")].find(s => s.innerText.includes("Pruning"))
"""
OVERLAP = """
    [...document.querySelectorAll("figure")].find(f => f.innerText.includes("two tasks share"))
"""


def keep_rows(
    store: Store, kind: str, parameters: dict[str, Any], lineage: int = 0, **tables: Any
) -> str:
    """An analysis of rows that are given, of run-a; other columns are null, or what they can be."""
    made = ComputedTables()
    for name, rows in tables.items():
        fields = TABLES[name].schema
        rest = {
            field.name: None if field.nullable else pa.scalar(0).cast(field.type).as_py()
            for field in fields
        }
        whole = [rest | {"run": "run-a"} | row for row in rows]
        made[name] = pa.Table.from_pylist(whole, schema=TABLES[name].schema)
    key = {"run": "run-a", "parameters": parameters, "lineage": {"seen": lineage}}
    return keep(store, kind, key, list(tables), lambda: made).id


def keep_ablation(store: Store) -> None:
    of = {"task": NASTY[0], "evaluated": NASTY[0], "kind": "zero"}
    curve = [
        {
            **of, "chosen_by": chosen_by, "fraction": 0.1, "seed": seed,
            "loss_change": change, "loss_change_lower": change - 0.1,
            "loss_change_upper": change + 0.1, "top1_change": -change,
        }
        for chosen_by, seed, change in CURVE
    ]  # fmt: skip
    effect = {**of, "measure": "loss", "fraction": 0.1, "excess": 0.3}
    parameters = {"metrics": ["abs"], "seeds": 2, "iterative": False, "tasks": [NASTY[0]]}
    tables = {"evaluations": curve, "ablation_effects": [effect]}
    for lineage in (0, 1):
        keep_rows(store, "ablation", parameters, lineage, **tables)
    iterative = [row | {"loss_change": 2 * row["loss_change"]} for row in curve]
    keep_rows(
        store, "ablation", parameters | {"iterative": True},
        evaluations=iterative, ablation_effects=[effect],
    )  # fmt: skip
    crossed = [
        {"task": task, "evaluated": other, "ratio": 0.8 if task == other else 0.95}
        for task in NASTY
        for other in NASTY
    ]
    keep_rows(store, "cross", {**parameters, "target": 0.8}, cross_evaluations=crossed)


def keep_routing(store: Store) -> None:
    """Two routers in two layers, beside all experts."""
    of = {"experts": "experts-1", "method": "kmeans", "task": NASTY[1]}
    layers = [
        {**of, "router": router, "share": share, "layer": layer, "mass_kept": kept[layer],
         "mass_ratio": kept[layer] / 0.8}
        for (router, share), kept in MASSES.items()
        for layer in (0, 1)
    ]  # fmt: skip
    whole = {"mean_loss": 2.0, "top1_share": 0.5}
    nothing = dict.fromkeys(("top1_change", "top1_change_lower", "top1_change_upper"), 0.0)
    nothing |= dict.fromkeys(("loss_change", "loss_change_lower", "loss_change_upper"), 0.0)
    rows = [{**of, "router": "all", "share": 1.0, **whole, **nothing}]
    rows += [
        {**of, "router": router, "share": share, "mean_loss": 2.5, "loss_change": 0.5,
         "loss_change_lower": 0.25, "loss_change_upper": 0.75, "top1_share": 0.375,
         "top1_change": -0.125, "top1_change_lower": -0.25, "top1_change_upper": 0.0}
        for router, share in MASSES
    ]  # fmt: skip
    parameters = {"experts": ["experts-1"], "shares": [0.1, 0.5], "layers": [0, 1]}
    keep_rows(store, "routing", parameters, routing=rows, routing_layers=layers)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run and its random twin, with every analysis that the report knows."""
    made = create_store(tmp_path_factory.mktemp("report") / "store")
    tasks = (*NASTY, "mixed")
    settings = AnalysisSettings(metrics=["abs", "rms"], fractions=[0.15, 0.3])
    for seed, (run, init) in enumerate({"run-a": "pretrained", "run-b": "random"}.items()):
        write_run(made, run, importances(seed, tasks=tasks), init=init)
        record = made.run_record(run)
        record["model"] |= {"fingerprint": "none", "settings": {"init_seed": 0}}
        record["tasks"][0]["source"] = SOURCE
        made.files.put_json(layout.run_path(run), record)
        analyse_run(made, run, settings)
    compare_runs(made, "run-a", "run-b", AnalysisSettings(fractions=[0.15, 0.3]))
    experts = ExpertSettings(clusters=4, method="random")
    kept = keep_experts(
        made, made.run_record("run-a"), experts,
        lambda: [split_at_random(20, experts, layer) for layer in (0, 1)],
    )  # fmt: skip
    selection = AnalysisSettings(fractions=[0.15], within="layer", sites=["mlp"])
    align_experts(made, [kept.id], AlignmentSettings(selection=selection, simulations=10))
    keep_ablation(made)
    keep_routing(made)
    return made


@pytest.fixture(scope="module")
def report(store: Store) -> dict[str, Any]:
    return make_report(store)


@pytest.fixture(scope="module")
def html(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(report), encoding="utf-8")
    return path


def sections(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {section["title"]: section for part in report["parts"] for section in part["sections"]}


def decoded(column: Any) -> list[Any]:
    if isinstance(column, list):
        return column
    return [None if code is None else column["values"][code] for code in column["codes"]]


def figures_of(section: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of all choices of a section."""
    return [figure for choice in section.get("choices", []) for figure in choice["figures"]]


def rows_of(report: dict[str, Any], figure: str, choice: int = 0) -> list[dict[str, Any]]:
    """The rows of the query of a figure, of one of the choices of its section."""
    found = [
        one["query"]
        for section in sections(report).values()
        for one in figures_of(section)
        if one["title"] == figure
    ]
    query = report["queries"][found[choice]]
    return [
        dict(zip(query["columns"], row, strict=True))
        for row in zip(*map(decoded, query["data"]), strict=True)
    ]


def test_every_figure_has_the_rows_of_the_query_that_it_shows(
    store: Store, report: dict[str, Any]
) -> None:
    assert list(sections(report)) == [
        "Model and tasks", "Overlap of tasks", "Layers", "Pruning curves", "Cross-evaluation",
        "Routing", "Persistence", "Drift", "Alignment by layer", "Experts x tasks",
    ]  # fmt: skip
    for section in sections(report).values():
        assert figures_of(section)
        for figure in figures_of(section):
            query = report["queries"][figure["query"]]
            table = store.table(query["sql"])
            assert query["columns"] == table.column_names
            assert list(map(decoded, query["data"])) == [
                column.to_pylist() for column in table.columns
            ]
            keys = ("panels", "series", "columns", "percent", "present")
            shown = [figure.get(key, []) for key in keys]
            for value in (*figure.get("values", []), *figure.get("picks", [])):
                ends = ("column", "lower", "upper", "spread")
                shown.append([value[key] for key in ends if key in value])
            single = [figure[key] for key in ("row", "column", "value", "x") if key in figure]
            assert {name for names in [*shown, single] for name in names} <= set(query["columns"])


def test_rows_are_those_of_the_tables(store: Store, report: dict[str, Any]) -> None:
    where = "metric = 'abs' and layer is null"
    expected = store.table(f"select * exclude (analysis) from overlap where {where}").to_pylist()
    rows = rows_of(report, "Neurons that two tasks share")
    assert len(rows) == len(expected) == 2 * 2 * 2 * 6  # runs, sites, fractions, pairs
    assert all(any(row.items() <= one.items() for one in expected) for row in rows)

    places = rows_of(report, "Where selected neurons lie")
    for row in places:
        [[count]] = store.sql(
            "select count(*) from selections where run = $run and site = $site and metric = 'abs' "
            "and fraction = $fraction and task = $task and layer = $layer",
            {key: row[key] for key in ("run", "site", "fraction", "task", "layer")},
        ).fetchall()
        assert row["num_selected"] == count
    assert sum(row["share"] for row in places) == pytest.approx(2 * 2 * 2 * 3)

    title = "A task without its own neurons, and without random ones"
    curve = {
        (row["chosen_by"], row["fraction"]): (row["change"], row["lower"], row["upper"])
        for row in rows_of(report, title, choice=1)
        if row["measure"] == "loss (nats)"
    }
    assert curve == {
        ("score", 0): (0, 0, 0), ("score", 0.1): (0.5, 0.4, 0.6),
        ("random", 0): (0, 0, 0), ("random", 0.1): (0.2, 0.1, 0.3),
    }  # fmt: skip


def test_what_is_not_there_is_left_out_with_the_command_that_makes_it(tmp_path: Path) -> None:
    made = create_store(tmp_path / "my store")
    write_run(made, "run-a", importances(1))
    report = make_report(made)
    missing = {
        title: re.findall("`(actlake [^`]+ .*?)`", section["missing"])[-1]
        for title, section in sections(report).items()
        if "missing" in section
    }
    assert missing == {
        "Overlap of tasks": "actlake analyse STORE --run run-a",
        "Layers": "actlake analyse STORE --run run-a",
        "Pruning curves": "actlake ablate STORE --run run-a",
        "Cross-evaluation": "actlake crosseval STORE --run run-a",
        "Routing": "actlake routing STORE EXPERTS",
        "Runs compared": "actlake drift STORE RUN_A RUN_B",
        "Experts": "actlake align STORE EXPERTS",
    }
    [choice] = sections(report)["Model and tasks"]["choices"]
    [note] = choice["notes"]
    assert "model.init=random" in note


def test_folders_of_this_machine_are_not_told(tmp_path: Path) -> None:
    made = create_store(tmp_path / "my store")
    write_run(made, "run-a", importances(1))
    record = made.run_record("run-a")
    record["model"]["source"] = f"{tmp_path}/models/small-llama/"
    record["tasks"][0]["source"] = f"{tmp_path}/a, b/*.txt, {tmp_path}/c.txt, ~/d/*.md, package:e/*"
    record["tasks"][1]["source"] = "someone/texts, ../mine/e.txt, file:///home/me,you/f, ./g/h.txt"
    made.files.put_json(layout.run_path("run-a"), record)
    report = make_report(made)
    assert str(tmp_path) not in render_page(report)
    assert report["store"] == "my store"
    assert rows_of(report, "Model and capture")[0]["model"] == "small-llama"
    first, second, *_ = (task["task"] for task in record["tasks"])
    told = {row["task"]: row["source"] for row in rows_of(report, "Tasks")}
    assert told[first] == "a, b/*.txt, c.txt, *.md, package:e/*"
    assert told[second] == "someone/texts, e.txt, f, h.txt"


def test_routers_are_compared_over_the_share_of_experts(report: dict[str, Any]) -> None:
    rows = rows_of(report, "Mass that routers keep")
    found = {(row["router"], row["share_of_experts"]): row for row in rows}
    assert list(found) == [*MASSES, ("all", 0.1), ("all", 0.5)]
    for place, (first, second) in MASSES.items():
        row = found[place]
        assert row["mass_kept"] == pytest.approx((first + second) / 2)
        assert row["mass_kept_std"] == pytest.approx(abs(first - second) / 2**0.5)
        assert row["mass_ratio"] == pytest.approx((first + second) / 1.6)
        assert [row[f"top1{end}"] for end in ("_lower", "", "_upper")] == [0.25, 0.375, 0.5]
        assert [row[f"loss{end}"] for end in ("_lower", "", "_upper")] == [2.25, 2.5, 2.75]
    for share in (0.1, 0.5):
        row = found["all", share]
        assert (row["top1"], row["loss"], row["mass_kept"]) == (0.5, 2, None)
    [figure, _] = figures_of(sections(report)["Routing"])
    assert figure["present"] == ["mass_kept"]


def test_analyses_with_different_settings_are_choices(store: Store, report: dict[str, Any]) -> None:
    iterative, plain = sections(report)["Pruning curves"]["choices"]
    assert iterative["name"].endswith(": iterative yes")
    assert plain["name"].endswith(": iterative no")
    assert "iterative no; seeds 2; tasks" in plain["notes"][0]
    title = "A task without its own neurons, and without random ones"
    changes = [
        {row["change"] for row in rows_of(report, title, choice) if row["chosen_by"] == "score"}
        for choice in (0, 1)
    ]
    assert changes == [{0, 1, -0.5}, {0, 0.5, -0.5}]

    # The same settings over other data: the newest, which names the other.
    ids = {
        row["analysis"]
        for row in store.table("select distinct analysis from ablation_effects").to_pylist()
    }
    [older] = ids - {choice["name"].partition(":")[0] for choice in (iterative, plain)}
    assert older in plain["notes"][0]
    assert older not in iterative["notes"][0]


def test_each_choice_of_a_run_stands_beside_that_of_its_twin(tmp_path: Path) -> None:
    made = create_store(tmp_path)
    settings = {
        within: AnalysisSettings(fractions=[0.3], within=within) for within in ("model", "layer")
    }
    for seed, (run, init) in enumerate({"run-a": "pretrained", "run-b": "random"}.items()):
        write_run(made, run, importances(seed), init=init)
    for one in settings.values():
        analyse_run(made, "run-a", one)
    twin = analyse_run(made, "run-b", settings["layer"]).id
    choices = sections(make_report(made))["Overlap of tasks"]["choices"]
    assert [choice["name"].partition(": ")[2] for choice in choices] == [
        "within layer", "within model",
    ]  # fmt: skip
    assert twin in choices[0]["notes"][1]
    assert "no analysis like it" in choices[1]["notes"][1]


def test_one_run_is_shown_with_its_twin_or_alone(
    store: Store, report: dict[str, Any], tmp_path: Path
) -> None:
    def titles(made: dict[str, Any]) -> list[str]:
        return [part["title"] for part in made["parts"]][:2]

    compared = "From run-a (A) to run-b (random weights) (B)"
    assert titles(report) == ["run-a and its random twin", compared]
    assert titles(make_report(store, "run-b")) == ["run-b (random weights)", compared]
    with pytest.raises(StoreError, match="no run 'run-c'"):
        make_report(store, "run-c")
    (tmp_path / "runs").mkdir()
    with pytest.raises(AnalysisError, match="has no run to report on"):
        make_report(create_store(tmp_path))


class Tags(HTMLParser):
    """Tags of a page, and the text of its JSON block."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.json = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._is_json = ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self._is_json:
            self.json += data


def test_names_of_a_store_add_no_tag_and_come_back_whole(
    report: dict[str, Any], html: Path
) -> None:
    parsed = Tags()
    text = html.read_text(encoding="utf-8")
    parsed.feed(text)
    parsed.close()
    plain = Tags()
    plain.feed(render_page({}))
    assert parsed.tags == plain.tags
    assert json.loads(parsed.json.rstrip("\n")) == json.loads(json.dumps(report))
    assert re.findall(r"https?://(?!www\.w3\.org/)", text) == []


def test_the_page_holds_its_modules_in_the_order_of_their_imports() -> None:
    web = Path(page.__file__).parent / "web"
    seen: set[str] = set()
    for name in page._MODULES:
        source = (web / name).read_text(encoding="utf-8")
        folder = (web / name).parent
        used = re.findall(r'^import \{[^}]*\} from "(.*)";$', source, flags=re.MULTILINE)
        assert {(folder / one).resolve().relative_to(web).as_posix() for one in used} <= seen
        seen.add(name)
    assert seen >= {f"shared/{one.name}" for one in (web / "shared").glob("*.js")}
    script = render_page({}).rpartition('<script type="module">')[2]
    assert re.findall(r"^(?:import|export)\b.*", script, flags=re.MULTILINE) == []
    declared = re.findall(r"^(?:const|let|function|async function) (\w+)", script, re.MULTILINE)
    assert len(declared) == len(set(declared)) > 50


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
def test_the_page_works_in_a_browser(store: Store, html: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open(html, width=390, dark=True)
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.run(UNNAMED) == []
        assert browser.run("document.querySelectorAll('main svg').length") > 20
        assert NASTY[0] in browser.run("document.querySelector('svg[role=img]').textContent")

        path = f"{PRUNING}.querySelector('polyline').getAttribute('points')"
        before = browser.run(path)
        browser.run(f"""(() => {{
            const list = {PRUNING}.querySelector("select");
            list.value = 1;
            list.dispatchEvent(new Event("change"));
        }})()""")
        assert browser.run(path) != before
        assert "iterative no" in browser.run(f"{PRUNING}.innerText")

        browser.run(f"{OVERLAP}.querySelector('input').focus()")
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight",
                         windowsVirtualKeyCode=39)  # fmt: skip
        assert browser.run(f"{OVERLAP}.querySelector('output').textContent") == "0.3"
        sql = browser.run(f"{OVERLAP}.querySelector('pre').textContent")
        browser.run(f"{OVERLAP}.querySelector('a').click()")
        browser.wait("Browser.downloadProgress", state="completed")
        [download] = tmp_path.glob("report_overlap*.csv")
        with download.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        table = store.table(f"from ({sql}) where fraction = 0.3")
        assert header == table.column_names
        assert len(rows) == table.num_rows == 2 * 2 * 6
        for row, expected in zip(rows, table.to_pylist(), strict=True):
            for text, value in zip(row, expected.values(), strict=True):
                assert text == value if isinstance(value, str) else float(text) == value
        assert browser.errors == []
