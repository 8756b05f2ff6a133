"""What must not be done through the service, each line with the status that it gets."""

from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from ray_app.service.app import STATUS
from service_parts import TOKEN

ATTACKS = yaml.safe_load((Path(__file__).parent / "attacks.yaml").read_text(encoding="utf-8"))
STATEMENTS = [(group, *line) for group, lines in ATTACKS.items() for line in lines]

AUTHORISED = f"Bearer {TOKEN}"

REQUESTS = [
    # path traversal and odd identifiers, in every parameter of a path
    ("GET", "/static/../app.py", {}, 404),
    ("GET", "/static/%2e%2e/app.py", {}, 404),
    ("GET", "/static/..%2fapp.py", {}, 404),
    ("GET", "/static//etc/passwd", {}, 404),
    ("GET", "/api/runs/..%2f..%2fetc", {}, 404),
    ("GET", "/api/runs/..", {}, 404),
    ("GET", "/api/runs/.hidden", {}, 422),
    ("GET", "/api/runs/small-1%00", {}, 422),
    ("GET", "/api/runs/nothing", {}, 404),
    ("GET", "/api/runs/'; drop view runs --", {}, 422),
    ("GET", "/api/runs/..%2f/neurons/mlp/0/0", {}, 404),
    ("GET", "/api/runs/small-1/neurons/..%5c/0/0", {}, 422),
    ("GET", "/api/runs/small-1/neurons/mlp/-1/0", {}, 422),
    ("GET", "/api/runs/small-1/neurons/mlp/0/999999999999", {}, 422),
    ("GET", "/api/runs/small-1/neurons/mlp/0/20", {}, 404),
    ("GET", "/api/runs/small-1/neurons/nowhere/0/0", {}, 404),
    ("GET", "/api/analyses/..%2fruns/overlap", {}, 404),
    ("GET", "/api/analyses/nothing/overlap", {}, 404),
    ("GET", "/api/analyses/nothing/layers?fraction=nan", {}, 422),
    ("GET", "/api/jobs/..%2f..%2fsecret/log", {}, 404),
    ("GET", "/api/jobs/unknown/log", {}, 404),
    ("GET", "/api/jobs/unknown/log?offset=-1", {}, 422),
    ("DELETE", "/api/jobs/unknown", {}, 404),
    ("POST", "/api/jobs", {"json": {"action": "capture", "study": "../small.yaml"}}, 404),
    ("POST", "/api/jobs", {"json": {"action": "capture", "study": "/etc/passwd"}}, 404),
    ("POST", "/api/jobs", {"json": {"action": "capture", "study": "notes.txt"}}, 404),
    ("POST", "/api/jobs", {"json": {"action": "capture", "study": "link.yaml"}}, 404),
    ("POST", "/api/jobs", {"json": {"action": "capture", "study": "small.yaml\n"}}, 404),
    ("POST", "/api/jobs", {"json": {"action": "verify", "study": "small.yaml"}}, 422),
    # settings of a job that name files, models or code, and shell
    *[
        ("POST", "/api/jobs",
         {"json": {"action": "capture", "study": "small.yaml", "overrides": {key: value}}}, 422)
        for key, value in {
            "model.source": "/etc", "model.revision": "x", "model.site_modules.mlp": "os.system",
            "tasks.code.files": "/etc/*", "tasks.code.dataset": "evil/code", "name": "other",
            "evaluation.data_files": "/etc/passwd", "analyses": "[]", "capture.tokens; rm": "1",
            "capture.tokens": "$(reboot)", "capture.top": "!!python/object:os.system x",
            "seed": "1\n2",
        }.items()
    ],
    ("POST", "/api/jobs", {"json": {"action": "capture", "study": "small.yaml", "tokens": 0}}, 422),
    ("POST", "/api/jobs", {"json": {"action": "analyse", "study": "small.yaml", "run": "-x"}}, 422),
    # tokens
    ("GET", "/api/runs", {"headers": {"Authorization": ""}}, 401),
    ("GET", "/api/runs", {"headers": {"Authorization": "Bearer"}}, 401),
    ("GET", "/api/runs", {"headers": {"Authorization": "Bearer "}}, 401),
    ("GET", "/api/runs", {"headers": {"Authorization": "Bearer wrong"}}, 401),
    ("GET", "/api/runs", {"headers": {"Authorization": "Basic " + AUTHORISED[7:]}}, 401),
    ("GET", "/api/runs", {"headers": {"Authorization": AUTHORISED + "x"}}, 401),
    ("GET", "/api/runs", {"headers": {"Authorization": AUTHORISED[:-1]}}, 401),
    ("GET", "/api/runs?token=" + AUTHORISED[7:], {"headers": {"Authorization": ""}}, 401),
    ("GET", "/metrics", {"headers": {"Authorization": ""}}, 401),
    ("GET", "/openapi.json", {"headers": {"Authorization": ""}}, 401),
    ("POST", "/api/sql", {"headers": {"Authorization": ""}, "content": b"{" * 100}, 401),
    ("GET", "/health/../api/runs", {"headers": {"Authorization": ""}}, 401),
    # hosts: a page of another site whose name was made to point here
    ("GET", "/health", {"headers": {"Host": "evil.example"}}, 421),
    ("GET", "/api/runs", {"headers": {"Host": "testserver.evil.example"}}, 421),
    ("GET", "/api/runs", {"headers": {"Host": ""}}, 421),
    # bodies
    ("POST", "/api/sql", {"content": b'{"query": "select 1'}, 422),
    ("POST", "/api/sql", {"content": b"[" * 100_000}, 422),
    ("POST", "/api/sql", {"content": b"\xff\xfe"}, 422),
    ("POST", "/api/sql", {"json": ["select 1"]}, 422),
    ("POST", "/api/sql", {"json": {"query": 1}}, 422),
    ("POST", "/api/sql", {"json": {"query": ""}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1", "more": 1}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1", "format": "pickle"}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1", "max_rows": 0}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1", "max_rows": 10**12}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1", "timeout_seconds": 1e9}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1", "timeout_seconds": -1}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select $a", "params": {"a": [1]}}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select $a", "params": {"a; --": 1}}}, 422),
    ("POST", "/api/sql", {"json": {"query": "select $a", "params": {"a": 10**40}}}, 422),
    ("POST", "/api/sql", {"content": b'{"query": "select \\ud800"}'}, 422),
    ("POST", "/api/sql", {"content": b'{"query": "select 1", "timeout_seconds": NaN}'}, 422),
    ("POST", "/api/sql", {"json": {"query": "select 1 " + " " * 100_000}}, 422),
    ("POST", "/api/sql", {"json": {"query": "x" * 2_000_000}}, 413),
    ("POST", "/api/sql", {"content": iter([b"x" * 700_000] * 3)}, 413),
    ("POST", "/api/sql", {"json": {"query": "select " + "(" * 40_000 + "1" + ")" * 40_000}}, 400),
    ("POST", "/api/sql", {"json": {"query": "select " + "+".join(["1"] * 30_000)}}, 400),
    # methods and places that there are none of
    ("GET", "/api/sql", {}, 405),
    ("PUT", "/api/runs", {}, 405),
    ("POST", "/health", {}, 405),
    ("GET", "/docs", {}, 404),
    ("GET", "/api/../etc/passwd", {}, 404),
]  # fmt: skip


def test_there_are_enough_attacks() -> None:
    assert len(STATEMENTS) >= 60
    assert len(REQUESTS) >= 60


@pytest.mark.parametrize(("group", "statement", "status"), STATEMENTS)
def test_statements_are_refused_or_bounded(
    client: TestClient, group: str, statement: str, status: int
) -> None:
    answer = client.post("/api/sql", json={"query": statement, "timeout_seconds": 8})
    assert answer.status_code == status, answer.text[:500]
    assert len(answer.content) < 30_000
    error = answer.json()["error"]
    assert STATUS[error["kind"]] == status
    assert error["message"]


def _wide(doublings: int) -> str:
    """A query of one row, whose type has as many names as two to the power of the doublings."""
    name = "x" * 2000
    steps = [f"t0 as (select {{'{name}': 1}} as s)"]
    steps += [f"t{n} as (select {{'a': s, 'b': s}} as s from t{n - 1})"
              for n in range(1, doublings + 1)]  # fmt: skip
    return f"with {', '.join(steps)} select s from t{doublings}"


@pytest.mark.parametrize("form", ["json", "csv", "arrow"])
def test_names_and_types_count_as_bytes_of_the_answer(client: TestClient, form: str) -> None:
    answer = client.post("/api/sql", json={"query": _wide(3), "format": form})
    assert answer.status_code == 200
    answer = client.post("/api/sql", json={"query": _wide(12), "format": form})
    assert len(answer.content) < 5 << 20
    if form != "csv":  # There these names are in the rows.
        assert answer.status_code == 413, answer.text[:500]


def test_long_messages_are_cut(client: TestClient) -> None:
    answer = client.post("/api/sql", json={"query": "select repeat('x', 1000000)::int"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "Conversion Error" in message
    assert message.endswith("x ...")
    assert len(message) < 2100


@pytest.mark.parametrize(("method", "path", "options", "status"), REQUESTS)
def test_requests_are_refused(
    client: TestClient, method: str, path: str, options: dict[str, object], status: int
) -> None:
    answer = client.request(method, path, **options)  # type: ignore[arg-type]
    assert answer.status_code == status, answer.text[:500]
    assert answer.json()["error"]["message"]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_the_store_answers_after_all_attacks(client: TestClient) -> None:
    answer = client.post("/api/sql", json={"query": "select count(*) as n from neuron_stats"})
    assert answer.json()["rows"] == [[3 * 56]]


def test_a_wrong_status_would_be_noticed(client: TestClient) -> None:
    assert client.post("/api/sql", json={"query": "select 1"}).status_code == 200
    assert client.get("/api/runs").status_code == 200
