"""The HTTP face of the service: routes, errors and headers around a pool that answers.

`docs/service.md` holds the contract. No Ray here: `ray_app.service.deployment` serves this.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ray_app.service.jobs import Action, JobDesk, Runner
from ray_app.service.metrics import Metrics
from ray_app.service.pool import Pool, QuestionError
from ray_app.service.settings import ServiceSettings
from ray_app.service.walls import Walls, error_body

__all__ = ["STATUS", "create_app"]

Result = TypeVar("Result")

STATUS = {
    "syntax": 400, "unauthorized": 401, "refused": 403, "disabled": 403, "not_found": 404,
    "timeout": 408, "conflict": 409, "too_large": 413, "invalid": 422, "internal": 500, "busy": 503,
}  # fmt: skip
"""HTTP status of each kind of error."""

_RETRY_SECONDS = "2"
_USUAL_SECONDS = 30.0

_ID = "^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Identifier = Annotated[str, InPath(pattern=_ID, max_length=128)]
Name = Annotated[str | None, Query(min_length=1, max_length=128)]
Index = Annotated[int, InPath(ge=0, lt=2**31)]
Layer = Annotated[int, InPath(ge=0, lt=2**15)]
_LARGEST = 2**63


def _exact(value: str | bool | int | float | None) -> str | bool | int | float | None:
    """Refuse integers that DuckDB would have to round; FastAPI would make floats of them."""
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise ValueError("an integer must have 64 bits: pass it as text and cast it in the query")
    return value


Scalar = Annotated[
    str | bool | int | Annotated[float, Field(allow_inf_nan=False)] | None, AfterValidator(_exact)
]


class Problem(BaseModel):
    """What is wrong with a request."""

    kind: Literal[
        "syntax", "refused", "not_found", "invalid", "too_large", "timeout", "busy",
        "unauthorized", "disabled", "conflict", "internal",
    ] = Field(description="Which kind of error, for programs.")  # fmt: skip
    message: str = Field(description="One sentence for people.")


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: Problem


class SqlRequest(BaseModel):
    """One query."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str = Field(
        min_length=1, max_length=100_000, description="One SELECT-like statement of DuckDB's SQL."
    )
    params: dict[
        Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)], Scalar
    ] = Field(default_factory=dict, max_length=100, description="Values of $name parameters.")
    format: Literal["json", "csv", "arrow"] = Field("json", description="Form of the answer.")
    max_rows: int = Field(1000, ge=1, description="Most rows.")
    timeout_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which the query is stopped; 30 if not given, and if the service "
        "allows as many.",
    )


class Selection(BaseModel):
    """Which selection of an analysis is asked about."""

    metric: str | None = Field(
        None, min_length=1, max_length=128, description="One of its metrics; abs if it has it."
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="One of its fractions; the smallest if not given."
    )
    site: str | None = Field(None, min_length=1, max_length=128, description="One of its sites.")


class JobRequest(BaseModel):
    """A job to start."""

    model_config = ConfigDict(extra="forbid", strict=True)

    action: Action = Field(description="What to do; 'run' captures and analyses.")
    study: str = Field(max_length=128, description="Name of a file that GET /api/studies has.")
    overrides: dict[
        Annotated[str, Field(pattern="^[a-z_]+([.][a-z_]+)*$", max_length=64)],
        Annotated[str, Field(max_length=200)],
    ] = Field(
        default_factory=dict, max_length=20, description="Settings to change: key.path and YAML."
    )
    tokens: int | None = Field(None, ge=1, lt=2**63, description="Counted tokens of each task.")
    run: Annotated[str, Field(pattern=_ID, max_length=128)] | None = Field(
        None, description="Which run to analyse, if the store has several."
    )


def create_app(settings: ServiceSettings, runner: Runner | None = None) -> FastAPI:
    """The ASGI application of one replica.

    Args:
        settings: see `ServiceSettings`.
        runner: what runs jobs; no jobs if not given.
    """
    pool = Pool(settings)
    metrics = Metrics(pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.stop()

    app = FastAPI(
        title="actlake",
        version=version("actlake"),
        description="An activation store over HTTP: SQL, neurons, overlap and jobs.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False, description="The service's token."))],
        responses={
            code: {"model": ErrorBody, "description": "See the error's kind and message."}
            for code in sorted({*STATUS.values()})
        },
    )
    _add_page(app)
    ask = _asking(settings, pool)
    _add_runs(app, ask)
    _add_analyses(app, ask)
    _add_sql(app, settings, pool)
    _add_jobs(app, JobDesk(settings, runner))
    _add_errors(app)

    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters of this replica as Prometheus text."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_middleware(Walls, settings=settings, metrics=metrics)
    return app


def _add_page(app: FastAPI) -> None:
    """The parts that hold no data and need no token."""
    page = StaticFiles(packages=[("ray_app.service", "page")])
    shared = StaticFiles(packages=[("analysis", "web/shared")])

    @app.get("/", include_in_schema=False)
    async def shell(request: Request) -> Response:
        return await page.get_response("index.html", request.scope)

    app.mount("/static/shared", shared)
    app.mount("/static", page)

    @app.get("/health", tags=["service"])
    async def health() -> dict[str, str]:
        """Whether the service answers; needs no token."""
        return {"status": "ok", "version": version("actlake")}


def _add_sql(app: FastAPI, settings: ServiceSettings, pool: Pool) -> None:
    @app.post(
        "/api/sql",
        tags=["store"],
        response_class=Response,
        responses={
            200: {
                "description": "The rows, as JSON, CSV or an Arrow stream.",
                "content": {
                    "application/json": {},
                    "text/csv": {},
                    "application/vnd.apache.arrow.stream": {},
                },
            }
        },
    )
    async def sql(request: Request, asked: SqlRequest) -> Response:
        """Answer one query that only reads; X-Actlake-Truncated says whether rows are missing."""
        if asked.max_rows > settings.max_rows:
            raise QuestionError(
                "invalid", f"max_rows must be at most {settings.max_rows}, found {asked.max_rows}."
            )
        seconds = asked.timeout_seconds or min(_USUAL_SECONDS, settings.max_seconds)
        if seconds > settings.max_seconds:
            raise QuestionError(
                "invalid",
                f"timeout_seconds must be at most {settings.max_seconds:g}, found {seconds:g}.",
            )
        args = {
            "query": asked.query,
            "params": asked.params,
            "form": asked.format,
            "max_rows": asked.max_rows,
        }
        work = pool.ask("sql", args, seconds=seconds)
        answer = await _unless_gone(request, work)
        return Response(
            answer.body,
            media_type=answer.media_type,
            headers={
                "X-Actlake-Rows": str(answer.num_rows),
                "X-Actlake-Truncated": answer.truncated,
                "X-Actlake-Elapsed-Ms": f"{answer.elapsed_ms:.3f}",
            },
        )


def _asking(settings: ServiceSettings, pool: Pool) -> Callable[..., Awaitable[Response]]:
    async def ask(request: Request, question: str, **args: Any) -> Response:
        work = pool.ask(question, args, seconds=settings.max_seconds)
        answer = await _unless_gone(request, work)
        return Response(answer.body, media_type=answer.media_type)

    return ask


def _add_runs(app: FastAPI, ask: Callable[..., Awaitable[Response]]) -> None:
    @app.get("/api/schema", tags=["store"])
    async def schema(request: Request) -> Response:
        """The views that SQL can ask, with their columns."""
        return await ask(request, "schema")

    @app.get("/api/examples", tags=["store"])
    async def examples(request: Request) -> Response:
        """Queries to start from, which have rows in this store."""
        return await ask(request, "examples")

    @app.get("/api/runs", tags=["store"])
    async def runs(request: Request) -> Response:
        """The runs, the newest first."""
        return await ask(request, "runs")

    @app.get("/api/runs/{run}", tags=["store"])
    async def run(request: Request, run: Identifier) -> Response:
        """One run: model, capture, sites and tasks."""
        return await ask(request, "run", run=run)

    @app.get("/api/runs/{run}/neurons/{site}/{layer}/{neuron}", tags=["store"])
    async def neuron(
        request: Request,
        run: Identifier,
        site: Identifier,
        layer: Layer,
        neuron: Index,
        task: Name = None,
        count: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
        per_sample: bool = False,
    ) -> Response:
        """One neuron: statistics, scores, examples and experts."""
        place = {"run": run, "site": site, "layer": layer, "neuron": neuron}
        return await ask(request, "neuron", **place, task=task, count=count, per_sample=per_sample)


def _add_analyses(app: FastAPI, ask: Callable[..., Awaitable[Response]]) -> None:
    @app.get("/api/analyses", tags=["store"])
    async def analyses(request: Request, run: Name = None) -> Response:
        """The analyses of one run or of all, the newest first."""
        return await ask(request, "analyses", run=run)

    @app.get("/api/analyses/{analysis}/overlap", tags=["store"])
    async def overlap(
        request: Request, analysis: Identifier, chosen: Annotated[Selection, Query()]
    ) -> Response:
        """How many selected neurons every two tasks share, as a matrix for one site."""
        return await ask(request, "overlap", analysis=analysis, **chosen.model_dump())

    @app.get("/api/analyses/{analysis}/layers", tags=["store"])
    async def layers(
        request: Request, analysis: Identifier, chosen: Annotated[Selection, Query()]
    ) -> Response:
        """In which layers the selected neurons of each task lie."""
        return await ask(request, "layers", analysis=analysis, **chosen.model_dump())


def _add_jobs(app: FastAPI, desk: JobDesk) -> None:
    """Routes that wait for Ray or the disk: functions, which FastAPI calls in threads."""

    @app.get("/api/studies", tags=["jobs"])
    def studies() -> dict[str, Any]:
        """Whether jobs are taken, and the studies that they can be started for."""
        return desk.studies()

    @app.post("/api/jobs", tags=["jobs"], status_code=201)
    def submit(asked: JobRequest) -> dict[str, Any]:
        """Start a capture, an analysis or both of a study."""
        return desk.submit(asked.action, asked.study, asked.overrides, asked.tokens, asked.run)

    @app.get("/api/jobs", tags=["jobs"])
    def jobs() -> dict[str, Any]:
        """All jobs of this store, the newest first."""
        return desk.jobs()

    @app.get("/api/jobs/{job}", tags=["jobs"])
    def job(job: Identifier) -> dict[str, Any]:
        """One job."""
        return desk.job(job)

    @app.get("/api/jobs/{job}/log", tags=["jobs"])
    def log(job: Identifier, offset: Annotated[int, Query(ge=0, lt=2**53)] = 0) -> dict[str, Any]:
        """What a job has written, from a character on."""
        return desk.log(job, offset)

    @app.delete("/api/jobs/{job}", tags=["jobs"])
    def cancel(job: Identifier) -> dict[str, Any]:
        """End a job; what it has committed stays."""
        return desk.cancel(job)


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives, which is cancelled if the client goes away."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise QuestionError("timeout", "the client went away before the answer was there.")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(QuestionError)
    async def unanswered(request: Request, error: QuestionError) -> Response:
        headers = {"Retry-After": _RETRY_SECONDS} if error.kind == "busy" else None
        return JSONResponse(error_body(error.kind, str(error)), STATUS[error.kind], headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return JSONResponse(error_body("invalid", f"{place}: {first['msg']}."), 422)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 413: "too_large"}.get(error.status_code, "invalid")
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(error_body(kind, message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        # Starlette raises it again after this answer, so the log of the server has its traceback.
        message = "the service failed at this; its log says how."
        return JSONResponse(error_body("internal", message), 500)
