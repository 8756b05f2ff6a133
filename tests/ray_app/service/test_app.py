"""The contract of the service, against the real application without Ray."""

import csv
import io
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from analysis import AnalysisSettings, analyse_run
from ray_app.service.app import create_app
from ray_app.service.auth import TokenError, read_or_make_token, token_digest
from ray_app.service.jobs import JobDesk
from ray_app.service.settings import ServiceSettings
from service_parts import RUN, TOKEN, FakeRunner
from storage import Store, create_store
from written_runs import importances, write_run


def ask(client: TestClient, query: str, **options: object) -> dict[str, object]:
    answer = client.post("/api/sql", json={"query": query, **options})
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def test_health_needs_no_token(client: TestClient) -> None:
    answer = client.get("/health", headers={"Authorization": ""})
    assert answer.json()["status"] == "ok"


def test_sql_gives_the_rows_of_the_store(client: TestClient, service_store: Store) -> None:
    query = "select * from neuron_stats order by all"
    expected = service_store.table(query).to_pylist()
    found = ask(client, query)
    names = [column["name"] for column in found["columns"]]
    assert [dict(zip(names, row, strict=True)) for row in found["rows"]] == expected
    arrow = client.post("/api/sql", json={"query": query, "format": "arrow"})
    assert pa.ipc.open_stream(arrow.content).read_all().to_pylist() == expected
    text = client.post("/api/sql", json={"query": query, "format": "csv"})
    rows = list(csv.DictReader(io.StringIO(text.text)))
    assert len(rows) == len(expected)
    assert [float(row["abs"]) for row in rows] == [row["abs"] for row in expected]
    for answer in (arrow, text):
        assert answer.headers["X-Actlake-Rows"] == str(len(expected))
        assert answer.headers["X-Actlake-Truncated"] == "no"


@pytest.mark.parametrize(
    ("expression", "sent"),
    [
        ("9007199254740993", "9007199254740993"),
        ("-9007199254740992", -9007199254740992),
        ("9223372036854775807::hugeint * 2", "18446744073709551614"),
        ("1.50::decimal(5, 2)", "1.50"),
        ("'nan'::double", "NaN"),
        ("'-inf'::float", "-Infinity"),
        ("timestamp '2026-01-31 12:00:00.5'", "2026-01-31T12:00:00.500000"),
        ("date '2026-01-31'", "2026-01-31"),
        ("timestamptz '2026-01-31 12:00:00+02'", "2026-01-31T10:00:00+00:00"),
        ("[1, null]", [1, None]),
        ("{'a': [1.5::double]}", {"a": [1.5]}),
        ("map {'a': 1}", [["a", 1]]),
        ("'ab'::blob", "YWI="),
        ("null", None),
        ("true", True),
        ("'\u00fc\u2028'", "\u00fc\u2028"),
        ("interval '1 month 2 days'", "1 months 2 days 0 seconds"),
    ],
)  # fmt: skip
def test_values_are_sent_as_the_contract_says(
    client: TestClient, expression: str, sent: object
) -> None:
    assert ask(client, f"select {expression} as value")["rows"] == [[sent]]


def test_what_cannot_be_sent_says_what_to_do(client: TestClient) -> None:
    answer = client.post(
        "/api/sql", json={"query": "select timestamp '290000-01-01 00:00:00' as t"}
    )
    assert answer.status_code == 400
    assert "cast its column to varchar" in answer.json()["error"]["message"]


def test_parameters_are_bound(client: TestClient) -> None:
    text = "'; drop view runs; --"
    found = ask(client, "select $text as t, $n + 1 as n", params={"text": text, "n": 41})
    assert found["rows"] == [[text, 42]]


def test_answers_are_cut_at_most_rows(client: TestClient) -> None:
    assert ask(client, "from range(10)", max_rows=10)["truncated"] == "no"
    found = ask(client, "from range(11)", max_rows=10)
    assert (found["num_rows"], found["truncated"]) == (10, "rows")
    assert found["rows"] == [[n] for n in range(10)]


@pytest.mark.parametrize("form", ["json", "csv", "arrow"])
def test_answers_are_cut_at_most_bytes(client: TestClient, form: str) -> None:
    asked = {"query": "select repeat('x', 100000) from range(1000)", "format": form}
    answer = client.post("/api/sql", json=asked)
    assert answer.headers["X-Actlake-Truncated"] == "bytes"
    assert int(answer.headers["X-Actlake-Rows"]) in (40, 41)
    assert len(answer.content) < 4.3e6


def test_a_slow_query_ends_in_its_time_and_its_process_serves_again(client: TestClient) -> None:
    query = "select count(*) from range(1000000000000) t(i) where i % 1000003 = 7"
    for _ in range(3):
        since = time.monotonic()
        answer = client.post("/api/sql", json={"query": query, "timeout_seconds": 0.5})
        assert answer.status_code == 408
        assert 0.5 <= time.monotonic() - since < 5
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: ask(client, f"select {n}")["rows"], range(32)))
    assert answers == [[[n]] for n in range(32)]


def test_a_slow_query_does_not_stop_others(client: TestClient) -> None:
    slow = {"query": "select count(*) from range(1000000000000) t(i) where i % 1000003 = 7",
            "timeout_seconds": 6}  # fmt: skip
    with ThreadPoolExecutor(5) as threads:
        running = threads.submit(client.post, "/api/sql", json=slow)
        time.sleep(0.3)
        answers = list(threads.map(lambda n: ask(client, f"select {n}")["rows"], range(40)))
        assert not running.done()
        assert answers == [[[n]] for n in range(40)]
        assert running.result().status_code == 408


def test_killed_query_processes_are_replaced(
    service_settings: ServiceSettings, service_store: Store
) -> None:
    app = create_app(service_settings.model_copy(update={"slots": 1}))
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        for query, status in (
            ("select 1", 200),
            ("select lpad('', 1000000000, 'x')", 408),  # DuckDB does not interrupt this one.
            ("select 2", 200),
        ):
            answer = client.post("/api/sql", json={"query": query, "timeout_seconds": 0.5})
            assert answer.status_code in (status, 413 if status == 408 else status), answer.text
        assert "actlake_queries_restarts 1.0" in client.get("/metrics").text


def test_too_many_waiting_requests_are_told_when_to_come_back(
    service_settings: ServiceSettings,
) -> None:
    limits = {"slots": 1, "max_waiting": 1, "max_wait_seconds": 30}
    app = create_app(service_settings.model_copy(update=limits))
    slow = {"query": "select count(*) from range(1000000000000) t(i) where i % 1000003 = 7",
            "timeout_seconds": 2}  # fmt: skip
    with (
        TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client,
        ThreadPoolExecutor(6) as threads,
    ):
        sent = [threads.submit(client.post, "/api/sql", json=slow) for _ in range(6)]
        answers = [request.result() for request in sent]
    assert sorted(answer.status_code for answer in answers) == [408, 408, 503, 503, 503, 503]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["Retry-After"] == "2"
    assert refused.json()["error"]["kind"] == "busy"


def test_schema_and_examples_can_be_asked(client: TestClient) -> None:
    views = {view["name"]: view for view in client.get("/api/schema").json()["views"]}
    assert {"name": "layer", "type": "SMALLINT"}.items() <= views["overlap"]["columns"][6].items()
    assert all(view["columns"] and view["purpose"] and view["grain"] for view in views.values())
    examples = client.get("/api/examples").json()["examples"]
    assert len(examples) >= 5
    for example in examples:
        assert ask(client, example["query"])["num_rows"], example["title"]


def test_runs_are_told(client: TestClient) -> None:
    (row,) = client.get("/api/runs").json()["runs"]
    assert (row["run"], row["num_committed"], row["is_complete"]) == (RUN, 3, True)
    run = client.get(f"/api/runs/{RUN}").json()
    assert {"site": "mlp", "layer": 1, "width": 20, "head_dim": None} in run["sites"]
    assert [(task["task"], task["num_committed"]) for task in run["tasks"]] == [
        ("code", 1), ("mixed", 1), ("prose", 1)
    ]  # fmt: skip


def test_a_neuron_is_told(client: TestClient, service_store: Store) -> None:
    found = client.get(f"/api/runs/{RUN}/neurons/mlp/1/13").json()
    values = importances(7)
    assert {row["task"]: row["abs"] for row in found["statistics"]} == {
        task: values[task, "mlp", 1][13] for task in ("code", "mixed", "prose")
    }
    query = (
        "select task, score from scores "
        "where site = 'mlp' and layer = 1 and neuron = 13 and metric = 'abs'"
    )
    scores = dict(zip(*service_store.table(query).to_pydict().values(), strict=True))
    assert {row["task"]: row["score"] for row in found["scores"]["rows"]} == scores
    assert found["examples"] is None
    assert "capture.top" in found["examples_missing"]
    assert found["experts"] == []


def test_overlap_and_layers_are_told(client: TestClient, service_store: Store) -> None:
    (analysis,) = client.get("/api/analyses").json()["analyses"]
    assert (analysis["kind"], analysis["run"]) == ("overlap", RUN)
    name = analysis["analysis"]
    found = client.get(f"/api/analyses/{name}/overlap?fraction=0.25&site=mlp").json()
    (row,) = service_store.table(
        "select share_of_a from overlap where site = 'mlp' and metric = 'abs' and fraction = 0.25 "
        "and layer is null and task_a = 'code' and task_b = 'prose'"
    ).to_pylist()
    a, b = (found["tasks"].index(task) for task in ("code", "prose"))
    assert found["matrix"][a][b] == row["share_of_a"]
    assert found["matrix"][a][a] is None
    layers = client.get(f"/api/analyses/{name}/layers?metric=rms&site=attn").json()
    shares = [row["share"] for row in layers["rows"] if row["task"] == "code"]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1)
    wrong = client.get(f"/api/analyses/{name}/overlap?fraction=0.3")
    assert wrong.status_code == 422


def test_new_runs_are_seen_without_a_restart(
    service_settings: ServiceSettings, tmp_path: Path
) -> None:
    store = create_store(tmp_path / "store")
    (tmp_path / "store" / "runs").mkdir()
    settings = service_settings.model_copy(update={"store": store.files.root, "slots": 1})
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert ask(client, "select count(*) from neuron_stats")["rows"] == [[0]]
        write_run(store, RUN, importances(1))
        assert ask(client, "select count(*) from neuron_stats")["rows"] == [[168]]
        write_run(store, "small-2", importances(2))
        assert ask(client, "select count(*) from neuron_stats")["rows"] == [[336]]
        analyse_run(store, RUN, AnalysisSettings(metrics=["abs"], fractions=[0.1]))
        assert len(client.get("/api/analyses").json()["analyses"]) == 1


def test_jobs_are_commands_of_studies(client: TestClient, runner: FakeRunner) -> None:
    studies = client.get("/api/studies").json()
    assert studies == {
        "enabled": True,
        "studies": [{"name": "small.yaml", "description": "A study that tests may start."}],
    }
    asked = {
        "action": "run",
        "study": "small.yaml",
        "overrides": {"capture.top": "3"},
        "tokens": 64,
    }
    answer = client.post("/api/jobs", json=asked)
    assert answer.status_code == 201
    job = answer.json()["job"]
    assert (job["state"], job["progress"]) == ("running", None)
    command = runner.commands[job["id"]]
    assert command.endswith("--new-run --set capture.top=3 --set capture.tokens=64")
    assert " -m ray_app run " in command
    runner.logs[job["id"]] = f"choosing samples\nrun {RUN}: 1 of 3 shards committed, 2 to do\n"
    known = client.get(f"/api/jobs/{job['id']}").json()["job"]
    assert known["progress"] == {"done": 3, "total": 3, "unit": "shards"}
    assert client.get("/api/jobs").json()["jobs"] == [known]
    log = client.get(f"/api/jobs/{job['id']}/log?offset=9").json()
    assert log["text"].startswith("samples")
    end = log["next_offset"]
    assert client.get(f"/api/jobs/{job['id']}/log?offset={end}").json() == {
        "text": "", "next_offset": end
    }  # fmt: skip
    assert client.delete(f"/api/jobs/{job['id']}").json()["job"]["state"] == "stopped"


def test_the_log_of_an_ended_job_is_looked_through_once(
    service_settings: ServiceSettings,
) -> None:
    read: list[str] = []

    class CountingRunner(FakeRunner):
        def log(self, job: str) -> str:
            read.append(job)
            return super().log(job)

    desk = JobDesk(service_settings, CountingRunner())
    job = desk.submit("capture", "small.yaml", {}, None, None)["job"]["id"]
    desk.jobs()
    desk.jobs()
    running = len(read)
    assert running >= 3  # It may name its run at any time.
    desk.cancel(job)
    for _ in range(3):
        assert desk.job(job)["job"]["progress"] is None
    assert len(read) == running + 1


def test_jobs_are_off_unless_switched_on(service_settings: ServiceSettings) -> None:
    settings = service_settings.model_copy(update={"studies": None, "slots": 1})
    app = create_app(settings, FakeRunner())
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert client.get("/api/studies").json() == {"enabled": False, "studies": []}
        answer = client.post("/api/jobs", json={"action": "run", "study": "small.yaml"})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (403, "disabled")


def test_tokens_are_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"
    token, is_new = read_or_make_token(path)
    assert is_new
    assert len(token) >= 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_or_make_token(path) == (token, False)
    path.chmod(0o640)
    with pytest.raises(TokenError, match="0640"):
        read_or_make_token(path)
    short = tmp_path / "short"
    descriptor = os.open(short, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(descriptor, b"abc")
    os.close(descriptor)
    with pytest.raises(TokenError, match="at least 20"):
        read_or_make_token(short)
    assert token not in token_digest(token)


def test_a_damaged_store_is_not_the_fault_of_the_query(
    service_settings: ServiceSettings, tmp_path: Path
) -> None:
    store = create_store(tmp_path / "store")
    write_run(store, RUN, importances(1))
    (file,) = store.files.list("runs/*/stats/task=code/*/*.parquet")
    settings = service_settings.model_copy(update={"store": store.files.root, "slots": 1})
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        path = store.files.local(file)
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
        answer = client.post("/api/sql", json={"query": "select sum(n) from stats"})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "internal")
        assert ask(client, "select 1")["rows"] == [[1]]
