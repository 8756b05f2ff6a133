"""The web page, end to end: a real server, a real store and a real browser."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.request import urlopen

import pyarrow as pa
import pytest
import uvicorn

from analysis import AnalysisSettings, analyse_run
from analysis.experts import ExpertSettings, keep_experts, split_at_random
from browser import CHROMIUM, Browser, Page
from ray_app.service.app import create_app
from ray_app.service.auth import token_digest
from ray_app.service.jobs import Runner, State
from ray_app.service.settings import ServiceSettings
from service_parts import TOKEN, FakeRunner
from storage import TABLES, Store, create_store, layout
from written_runs import importances, samples, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")

PAGE = Path(__file__).parents[3] / "ray_app" / "service" / "page"
SHARED = Path(__file__).parents[3] / "analysis" / "web" / "shared"

NASTY = "<script>alert(1)"
"""The name of a task: text that would harm a page that took it for markup."""

MARKED = "<script>alert(2)</script>"
"""The token that excites a neuron most."""

SOURCE = "\"><img src=x onerror=alert(1)>' --"
"""Where a sample comes from."""

BEFORE, AFTER = '<b>"', "'&amp;</pre>"
"""Tokens around the one that is marked."""

TASKS = (NASTY, "code", "mixed")

NAMED = {
    "button", "checkbox", "combobox", "image", "link", "radio", "searchbox", "slider",
    "spinbutton", "textbox",
}  # fmt: skip
"""Roles that a screen reader must have a name for."""


def write_examples(store: Store, run: str, task: str, tokens: list[str]) -> None:
    """One more shard, whose sample holds the extrema of every MLP neuron of layer 0.

    The highest is at position 2, the lowest at 3, of five.
    """
    sample = samples(7, 3).to_pylist()[0] | {
        "sample": 1, "shard": 1, "source": SOURCE, "tokens": tokens,
    }  # fmt: skip
    places = {"highest_sample": [1], "highest_position": [2]}
    places |= {"lowest_sample": [1], "lowest_position": [3]}
    top = [
        {"shard": 1, "site": "mlp", "layer": 0, "neuron": neuron, "head": None, "k": 1}
        | {"highest": [7.5], "lowest": [-3.25]} | places
        for neuron in range(20)
    ]  # fmt: skip
    files = [
        store.files.put_table(
            layout.samples_path(run, task, 1), "samples",
            pa.Table.from_pylist([sample], schema=TABLES["samples"].schema),
        ),
        store.files.put_table(
            layout.part_path(run, "top", task, 1, 0), "top",
            pa.Table.from_pylist(top, schema=TABLES["top"].schema),
        ),
    ]  # fmt: skip
    counts = {"num_samples": 1, "num_tokens": 5, "num_counted": 3}
    store.commit(run=run, task=task, shard=1, counts=counts, files=files)


def describe(
    store: Store, run: str, *, top: int, shards: list[tuple[str, int]], modality: str = "language"
) -> None:
    """What a captured run says of itself beyond `write_run`."""
    record = store.run_record(run)
    record["model"] |= {"modality": modality, "fingerprint": "none", "settings": {}}
    record["capture"] = {"top": top, "tokens": 5}
    record["shards"] = [{"task": task, "shard": shard} for task, shard in shards]
    for task in record["tasks"]:
        task["num_shards"] = sum(name == task["task"] for name, _ in shards)
    store.files.put_json(layout.run_path(run), record)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An analysed run with examples and experts, one that is neither whole nor analysed, one of
    images."""
    made = create_store(tmp_path_factory.mktemp("page") / "store")
    write_run(made, "run-a", importances(0, tasks=TASKS))
    shards = [(task, 0) for task in TASKS]
    describe(made, "run-a", top=1, shards=[*shards, (NASTY, 1)])
    write_examples(made, "run-a", NASTY, ["s", BEFORE, MARKED, AFTER, "e"])
    analyse_run(made, "run-a", AnalysisSettings(metrics=["abs", "rms"], fractions=[0.15, 0.3]))
    settings = ExpertSettings(clusters=4, method="random")
    keep_experts(
        made, made.run_record("run-a"), settings,
        lambda: [split_at_random(20, settings, layer) for layer in (0, 1)],
    )  # fmt: skip
    write_run(made, "run-b", importances(1), commit=False)
    describe(made, "run-b", top=0, shards=[(task, 0) for task in ("code", "mixed", "prose")])
    write_run(made, "run-c", importances(2, tasks=["digits"]), reference=None)
    describe(made, "run-c", top=1, shards=[("digits", 0), ("digits", 1)], modality="image")
    write_examples(
        made, "run-c", "digits", ["[CLS]", *[f"[PATCH 0,{place}]" for place in range(4)]]
    )
    return made


def become(runner: FakeRunner, job: str, state: State, log: str) -> None:
    """Let a job reach a state, having written something."""
    runner.logs[job] += log
    runner.states[job] = replace(runner.states[job], state=state)


@contextmanager
def serving(store: Store, runner: Runner | None = None, **settings: Any) -> Iterator[str]:
    """The address of a server of a store."""
    given = {"slots": 2, "freshness_seconds": 0, **settings}
    root, digest = str(store.files.root), token_digest(TOKEN)
    app = create_app(ServiceSettings(store=root, token_sha256=digest, **given), runner)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def until(is_so: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def address(store: Store) -> Iterator[str]:
    with serving(store) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with Browser(folder) as made:
        made.call("Accessibility.enable")
        yield made


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page; a script error, or one of the content security policy, fails the test."""
    browser.errors.clear()
    browser.open(address)
    browser.run("sessionStorage.clear()")
    yield Page(browser, address, TOKEN)
    refused = [error for error in browser.errors if "the server responded with" not in error]
    assert refused == []


def unnamed(browser: Browser) -> list[str]:
    """Controls that a screen reader has no name for."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in nodes if not node["ignored"]]
    assert any(node["role"]["value"] == "heading" for node in shown)
    return [
        str(node)
        for node in shown
        if node["role"]["value"] in NAMED and not node.get("name", {}).get("value", "").strip()
    ]


def ask(page: Page, query: str) -> None:
    """Run a query in the console, and wait for what comes of it."""
    page.browser.run("document.querySelector('.told').textContent = 'not yet asked'")
    page.fill("#query", query)
    page.click("Run")
    page.wait("document.querySelector('.told').textContent !== 'not yet asked'"
              "&& !document.querySelector('.answer[aria-busy]')")  # fmt: skip


def cells(page: Page, selector: str = ".answer tbody tr") -> list[list[str]]:
    """The texts of the cells of a table."""
    rows: list[list[str]] = page.browser.run(
        f"[...document.querySelectorAll({selector!r})].map((row) => "
        "[...row.cells].map((cell) => cell.innerText.trim()))"
    )
    return rows


def test_a_token_opens_the_page_and_a_wrong_one_does_not(page: Page) -> None:
    page.go("#/runs")
    page.wait("document.querySelector('.login')")
    assert page.browser.run("document.querySelector('nav').hidden")
    for wrong in ("not-the-token", "not even ascii é"):
        page.fill("input", wrong)
        page.click("Log in")
        page.wait("document.querySelector('.problem')")
        assert "does not take this token" in page.text(".problem")
        page.browser.run("document.querySelector('.problem').remove()")
    page.fill("input", TOKEN)
    page.click("Log in")
    page.wait("document.querySelector('table')")
    assert page.browser.run("location.hash") == "#/runs"
    assert page.focused() in ("H1", "BODY")
    page.click("Log out")
    page.wait("document.querySelector('.login')")
    assert page.browser.run("sessionStorage.length") == 0


def test_a_token_leaves_the_address_and_one_that_ends_asks_again(page: Page) -> None:
    page.open("#/sql")
    assert TOKEN not in page.browser.run("location.href")
    page.browser.run("sessionStorage.setItem('actlake-token', 'another-token-by-now')")
    page.go("#/runs")
    page.wait("document.querySelector('.login')")
    assert "no longer takes this token" in page.text()


def test_the_console_answers_sql(page: Page, store: Store) -> None:
    page.open("#/sql")
    query = "select task, count(*) as n, sum(abs) as total from neuron_stats group by 1 order by 1"
    ask(page, query)
    expected = store.sql(query).fetchall()
    assert cells(page) == [[task, str(n), f"{total:g}"] for task, n, total in expected]
    assert re.fullmatch(rf"{len(expected)} rows in \d+(\.\d)? m?s\.", page.text(".told"))
    assert parse_qs(page.browser.run("location.hash"))["#/sql?q"] == [query]
    page.wait("document.querySelector('.queries')")
    assert query in page.browser.run("document.querySelector('.side').textContent")

    page.click("total", ".sort")
    page.click("total", ".sort")
    totals = [float(row[2]) for row in cells(page)]
    assert totals == sorted(totals, reverse=True)
    assert page.browser.run("document.querySelector('[aria-sort]').ariaSort") == "descending"

    ask(page, "select range as n, 9007199254740993 as large, null as no from range(2000)")
    assert "Only the first 1,000 rows" in page.text(".notice")
    assert cells(page)[0] == ["0", "9007199254740993", "null"]
    page.browser.run("history.back()")
    page.wait("document.querySelector('#query').value.includes('neuron_stats')")


def test_the_console_tells_what_is_wrong_and_goes_on(page: Page) -> None:
    page.open("#/sql")
    ask(page, "select nothing_of_this_name from runs")
    assert "nothing_of_this_name" in page.text(".answer .problem")
    ask(page, "copy runs to 'stolen.csv'")
    assert "refuses" in page.text(".answer .problem")
    ask(page, "select '<b>' as markup")
    assert cells(page) == [["<b>"]]
    ask(page, "select 1 where false")
    assert "no row answers it" in page.text(".answer")


def test_the_console_is_used_by_keyboard(page: Page) -> None:
    page.open("#/sql")
    page.fill("#query", "select 41 + 1 as n")
    page.browser.run("document.querySelector('#query').focus()")
    page.press("Enter", 13, modifiers=2)
    page.wait("document.querySelector('.answer td, .answer tbody th')")
    assert cells(page) == [["42"]]
    assert page.focused() == "query"
    page.press("Tab", 9)
    assert page.browser.run("document.activeElement.innerText") == "Run"


def test_a_running_query_can_be_cancelled(page: Page) -> None:
    page.open("#/sql")
    page.fill("#query", "select sum(a.range * b.range) from range(10000000) a, range(100000) b")
    page.click("Run")
    page.wait("!document.querySelector('.answer[aria-busy]') === false")
    page.click("Cancel")
    page.wait("document.querySelector('.told').textContent === 'The query was cancelled.'")
    ask(page, "select 1 as n")
    assert cells(page) == [["1"]]


def test_an_answer_is_drawn_and_kept_as_a_file(page: Page, store: Store, tmp_path: Path) -> None:
    page.open("#/sql")
    query = "select layer, task, count(*) as n from selections group by all order by all"
    ask(page, query)
    page.click("Chart", ".choice span")
    page.wait("document.querySelector('.answer svg[role=img]')")
    for kind in ("bars", "line", "points", "heat map"):
        page.fill(".answer select", kind)
        page.wait("document.querySelector('.answer svg[role=img]')")
        assert unnamed(page.browser) == []
    drawn = page.browser.run("document.querySelectorAll('.answer svg[role=img] g').length")
    assert drawn == store.table(query).num_rows

    page.browser.call("Browser.setDownloadBehavior", behavior="allow", eventsEnabled=True,
                      downloadPath=str(tmp_path))  # fmt: skip
    for name, file in {"CSV": "answer.csv", "Arrow": "answer.arrows"}.items():
        page.click(f"Download as {name}", ".files button")
        until((tmp_path / file).is_file)
    header = (tmp_path / "answer.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "layer,task,n"
    with pa.ipc.open_stream((tmp_path / "answer.arrows").read_bytes()) as reader:
        assert reader.read_all().to_pylist() == store.table(query).to_pylist()


def test_tables_and_examples_are_put_into_the_query(page: Page) -> None:
    page.open("#/sql")
    page.wait("document.querySelectorAll('.queries button').length > 2")
    page.browser.run("document.querySelector('.queries button').click()")
    page.wait("document.querySelector('#query').value.includes('from')")
    assert page.focused() == "query"
    page.click("Run")
    page.wait("document.querySelector('.answer table')")
    page.fill("#query", "select ")
    page.browser.run("document.querySelector('#query').setSelectionRange(7, 7)")
    page.wait("document.querySelector('.side input')")
    page.fill(".side input", "num_empty")
    names = page.browser.run(
        "[...document.querySelectorAll('.table:not([hidden]) > summary')].map((s) => s.innerText)"
    )
    assert names == ["tasks"]
    page.click("Insert num_empty", ".table[open] button")
    assert page.browser.run("document.querySelector('#query').value") == "select num_empty"


def test_a_neuron_shows_what_the_store_knows_of_it(page: Page, store: Store) -> None:
    page.open("#/neuron/run-a/mlp/0/3")
    page.wait("document.querySelector('mark')")
    assert page.text("h2") == "mlp neuron 3 of 20 in layer 0"
    where = "run = 'run-a' and site = 'mlp' and layer = 0 and neuron = 3"
    found = store.sql(f"select task, n, abs from neuron_stats where {where} order by 1").fetchall()
    rows = cells(page, "[aria-label='Statistics by task'] tbody tr")
    assert [(row[0], int(row[1]), float(row[4])) for row in rows] == found
    [[score]] = store.sql(
        f"select score from scores where {where} and task = 'code' and metric = 'abs'"
    ).fetchall()
    scored = {row[0]: row for row in cells(page, "[aria-label='Scores and selections'] tbody tr")}
    assert float(scored["code"][2]) == pytest.approx(score, rel=1e-3)
    [expert] = cells(page, "[aria-label='Its experts'] tbody tr")
    assert expert[1:] == ["random", expert[2], "5"]

    assert page.text(".examples mark") == MARKED
    assert page.text(".examples .context") == f"s{BEFORE}{MARKED}{AFTER}e"
    assert page.text(".examples .source") == SOURCE
    assert page.browser.run("document.querySelector('main :is(script, img, b)')") is None
    assert unnamed(page.browser) == []

    page.click("Next neuron")
    page.wait("document.querySelector('h2')?.innerText.includes('neuron 4')")
    assert page.browser.run("location.hash") == "#/neuron/run-a/mlp/0/4"
    assert page.browser.run("document.activeElement.ariaLabel") == "Next neuron"
    page.fill("[name=layer]", "1")
    page.wait("document.querySelector('h2')?.innerText.includes('layer 1')")
    assert "No activation of this neuron was kept" in page.text()
    page.browser.run("history.back()")
    page.wait("document.querySelector('h2')?.innerText.includes('neuron 4 of 20 in layer 0')")


def test_of_an_image_the_patch_is_said(page: Page) -> None:
    page.open("#/neuron/run-c/mlp/0/3")
    page.wait("document.querySelector('mark')")
    highest, lowest = page.browser.run(
        "[...document.querySelectorAll('.context')].map((one) => one.innerText)"
    )
    assert highest == "patch in row 0, column 1 of the image (from 0, top left)"
    assert lowest == "patch in row 0, column 2 of the image (from 0, top left)"


def test_neurons_of_an_answer_lead_to_their_page(page: Page) -> None:
    page.open("#/sql")
    ask(page, "select run, site, layer, neuron from neuron_stats where run = 'run-c' "
              "and site = 'attn' and layer = 1 and neuron = 5")  # fmt: skip
    page.click("5", ".answer a")
    page.wait("document.querySelector('h2')?.innerText === 'attn neuron 5 of 8 in layer 1'")


def test_what_a_store_does_not_have_is_told(page: Page) -> None:
    page.open("#/neuron/run-a/mlp/1/3")
    page.wait("document.querySelector('h2')")
    page.fill("[name=run]", "run-b")
    page.wait("location.hash === '#/neuron/run-b/mlp/0/0'")
    page.wait("document.querySelector('h2')")
    assert "kept no top activations" in page.text()
    assert "actlake analyse STORE --run run-b" in page.text()
    assert "actlake experts STORE --run run-b" in page.text()
    page.go("#/neuron/run-b/mlp/0/20000")
    page.wait("document.querySelector('.problem')")
    assert "neuron must be from 0 to 19" in page.text(".problem")
    page.go("#/nowhere")
    page.wait("document.querySelector('h1').innerText === 'No such page'")


def test_an_empty_store_says_how_to_begin(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with serving(create_store(tmp_path)) as address:
        empty = Page(browser, address, TOKEN)
        empty.open("#/sql")
        commands = {"#/neuron": "capture", "#/runs": "capture", "#/overlap": "analyse"}
        for place, command in commands.items():
            empty.go(place)
            empty.wait(f"document.querySelector('main').innerText.includes('actlake {command}')")


def test_overlap_is_explored(page: Page, store: Store) -> None:
    page.open("#/overlap")
    page.wait("document.querySelectorAll('main svg[role=img]').length === 2")
    assert "site=mlp" in page.browser.run("location.hash")
    assert unnamed(page.browser) == []
    page.browser.run("document.querySelector('[name=fraction]').focus()")
    page.press("ArrowRight", 39)
    page.wait("location.hash.includes('fraction=0.3')")
    page.wait("document.querySelector('output')?.innerText === 'top 30.0 %'")
    page.wait("document.activeElement.name === 'fraction'")
    page.fill("[name=metric]", "rms")
    page.wait("location.hash.includes('metric=rms')")
    page.wait("document.querySelector('main svg[role=img]')?.ariaLabel.includes('rms')")
    page.browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    where = "site = 'mlp' and metric = 'rms' and fraction = 0.3 and layer is null"
    expected = {
        (a, b): f"{100 * share:.1f} %"
        for a, b, share in store.sql(
            f"select task_a, task_b, share_of_a from overlap where {where}"
        ).fetchall()
    }
    [tasks] = [row[1:] for row in cells(page, "main table thead tr") if len(row) == 3]
    shown = {
        (row[0], task): share
        for row in cells(page, "main section:first-of-type tbody tr")[: len(tasks)]
        for task, share in zip(tasks, row[1:], strict=True)
        if row[0] != task
    }
    assert shown == expected
    assert NASTY in tasks


def test_runs_say_how_far_they_are(page: Page) -> None:
    page.open("#/runs")
    page.wait("document.querySelectorAll('tbody tr').length === 3")
    far = {row[0]: row[1] for row in cells(page, "tbody tr")}
    assert far == {"run-a": "4 of 4", "run-b": "2 of 3", "run-c": "2 of 2"}
    page.click("run-a", "a")
    page.wait("document.querySelector('h2')?.innerText === 'run-a'")
    rows = {row[0]: row[1] for row in cells(page, "[aria-label='Tasks'] tbody tr")}
    assert rows == {NASTY: "2 of 2", "code": "1 of 1", "mixed": "1 of 1"}
    assert unnamed(page.browser) == []
    assert page.focused() in ("H1", "BODY")


def test_jobs_that_are_switched_off_say_how_to_switch_them_on(page: Page) -> None:
    page.open("#/jobs")
    page.wait("document.querySelector('.notice')")
    assert "actlake serve STORE --studies FOLDER" in page.text(".notice")
    assert page.text(".start") == ""


def test_a_job_is_started_and_watched_until_it_ends(
    browser: Browser, store: Store, studies: Path
) -> None:
    runner = FakeRunner()
    with serving(store, runner, studies=studies) as address:
        page = Page(browser, address, TOKEN)
        page.open("#/jobs")
        page.wait("document.querySelector('.start')")
        assert "A study that tests may start." in page.text(".start")
        assert unnamed(browser) == []
        page.fill(".start select:has(option[value=analyse])", "capture")
        page.fill(".start input", "1024")
        page.fill(".start textarea", "tasks.code.files=/etc/passwd")
        page.click("Start")
        page.wait("document.querySelector('.problem')")
        assert "found 'tasks.code.files'" in page.text(".problem")
        assert runner.commands == {}
        page.fill(".start textarea", "capture.top=3\nseed=4")
        page.click("Start")
        page.wait("document.querySelector('.log')")
        [job] = runner.commands
        for part in ("capture", "small.yaml", "capture.top=3", "seed=4", "capture.tokens=1024"):
            assert part in runner.commands[job]
        assert page.browser.run("location.hash") == f"#/jobs/{job}"
        become(runner, job, "running", "run run-b: 2 of 3 shards committed, 1 to do\n<i>one</i>\n")
        page.wait("document.querySelector('progress')")
        assert page.text(".progress") == "2 of 3 shards"
        page.wait("document.querySelector('.log').textContent.includes('<i>one</i>')")
        become(runner, job, "succeeded", "\x1b[32mlast line\x1b[0m\n")
        page.wait("document.querySelector('dd .tag')?.innerText === 'succeeded'")
        page.wait("document.querySelector('.log').textContent.endsWith('\\nlast line\\n')")
        assert page.text("[role=status]") == "Job state: succeeded."
        page.wait("![...document.querySelectorAll('button')].some((b) => b.innerText.includes("
                  "'Cancel') && b.checkVisibility())")  # fmt: skip
        assert unnamed(browser) == []


def test_a_job_is_cancelled(browser: Browser, store: Store, studies: Path) -> None:
    runner = FakeRunner()
    with serving(store, runner, studies=studies) as address:
        page = Page(browser, address, TOKEN)
        page.open("#/jobs")
        page.wait("document.querySelector('.start')")
        page.fill(".start select:has(option[value=analyse])", "analyse")
        page.fill(".start select:has(option[value=run-a])", "run-a")
        page.click("Start")
        page.wait("document.querySelector('.log')")
        [job] = runner.commands
        assert runner.commands[job].endswith("--run run-a")
        page.click("Cancel the job")
        page.wait("document.querySelector('dd .tag')?.innerText === 'stopped'")
        page.go("#/jobs")
        page.wait("document.querySelector('tbody tr')")
        [row] = cells(page, "tbody tr")
        assert row[:4] == [job, "stopped", "analyse", "small.yaml"]


@pytest.mark.parametrize("dark", [False, True])
def test_every_view_fits_a_phone(page: Page, dark: bool) -> None:
    views = {
        "#/sql": ".queries", "#/neuron/run-a/mlp/0/3": "mark", "#/overlap": "svg[role=img]",
        "#/runs": "table", "#/runs/run-a": "dl", "#/jobs": ".view-jobs :is(form, p)",
    }  # fmt: skip
    page.open("#/sql", width=360, dark=dark)
    paper = "rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)"
    assert page.browser.run("getComputedStyle(document.body).backgroundColor") == paper
    for place, there in views.items():
        page.go(place)
        page.wait(f"document.querySelector({there!r})")
        assert page.browser.run("document.documentElement.scrollWidth") == 360, place
        assert unnamed(page.browser) == [], place


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2 of '#rrggbb'."""
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(dark: bool) -> None:
    blocks = re.findall(
        r":root \{(.*?)\}", (SHARED / "base.css").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 2
    colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[dark]))
    pairs = [(text, behind) for text in ("ink", "quiet", "link", "bad", "good", "warn")
             for behind in ("paper", "panel")] + [("paper", "link")]  # fmt: skip
    for text, behind in pairs:
        light, deep = sorted(map(luminance, (colours[text], colours[behind])), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, (text, behind)


def test_a_new_version_of_the_page_is_not_mixed_with_an_old_one(address: str) -> None:
    for part in ("main.js", "shared/charts.js", "shared/base.css"):
        with urlopen(f"{address}static/{part}") as answer:
            assert answer.headers["Cache-Control"] == "no-cache"
            assert answer.headers["ETag"]
    with urlopen(address) as answer:
        assert answer.headers["Cache-Control"] == "no-store"


def test_the_page_asks_nothing_of_other_servers() -> None:
    for path in (*PAGE.rglob("*.*"), *SHARED.rglob("*.*")):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"https?://(?!www\.w3\.org/|127\.0\.0\.1)", text) == [], path
