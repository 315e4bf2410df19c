"""The page over HTTP: FastAPI routes around :class:`CaseService`, and what keeps them safe.

Handles in addresses are random; identifiers, texts and filters travel in bodies. Requests of other
sites are refused: by their ``Host``, and by a header that only our own script sends.
"""

import asyncio
import hmac
import logging
import math
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from ctclip.embeddings import EmbeddingError
from ctclip.findings import FINDINGS
from ctclip.retrieval import handout, intake
from ctclip.retrieval.audit import AuditLog
from ctclip.retrieval.intake import Limits, UploadError
from ctclip.retrieval.service import CaseService, NotFoundError, parse

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
LEAST_TOKEN = 16
COOKIE = "ctclip_token"
OWN_HEADER = "x-ctclip"
MAX_QUESTION_BYTES = 64 << 10
KEEP_ALIVE_S = 75
"""A reader thinks longer than uvicorn's five seconds, and a question sent just as the server closes
an idle connection is lost: browsers don't send a POST again."""

KEPT_JOBS = 1000

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self' data: blob:; worker-src 'self' blob:; font-src 'self' data:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Language = Literal["en", "zh"]
Next = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the page is served."""

    host: str = "127.0.0.1"
    """Anything but loopback demands a token."""

    port: int = 8765
    token: str | None = None
    """What a user has to enter; made up and shown once when the host isn't loopback."""

    allowed_hosts: tuple[str, ...] = ()
    """Names under which users reach the page, beside the host itself."""

    user_header: str | None = None
    """Header in which a reverse proxy names the user, for the audit log."""

    audit_log: Path | None = None
    """File that records every query; None records nothing."""

    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii()):
            raise ValueError(f"token must have at least {LEAST_TOKEN} letters, all ASCII")

    @property
    def addresses(self) -> list[str]:
        """Where a browser finds the page; it refuses to be reached under other names."""
        own = "127.0.0.1" if self.host in ANY_ADDRESS else self.host
        # On loopback, other names are those of a proxy, which has an address of its own.
        names = (own,) if self.host in LOOPBACK else (own, *self.allowed_hosts)
        return [f"http://{_bracketed(name)}:{self.port}/" for name in names]


@dataclass
class Job:
    """An upload on its way."""

    state: str = "waiting"
    scan: str | None = None
    code: str | None = None
    detail: str | None = None


class Jobs:
    """Uploads are read one after the other: two cores don't read two scans faster."""

    def __init__(self, service: CaseService, limits: Limits) -> None:
        self._service, self._limits = service, limits
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()

    def waiting(self) -> int:
        """How many uploads haven't finished."""
        with self._lock:
            return sum(job.state not in ("done", "failed") for job in self._jobs.values())

    def submit(self, upload: Path, folder: Path) -> str:
        """Read, analyse and delete an upload; returns the job's handle at once."""
        handle, job = secrets.token_urlsafe(16), Job()
        with self._lock:
            self._jobs[handle] = job
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
        self._pool.submit(self._run, job, upload, folder)
        return handle

    def get(self, handle: str) -> Job:
        """A job by its handle.

        Raises:
            NotFoundError: If there is none.
        """
        with self._lock:
            if handle not in self._jobs:
                raise NotFoundError("no such upload")
            return self._jobs[handle]

    def _run(self, job: Job, upload: Path, folder: Path) -> None:
        config = self._service.scorer.checkpoint.volume_config
        try:
            job.state = "reading"
            scan = intake.prepare(upload, folder, config, self._limits)
            if scan.warnings:
                codes = ", ".join(warning["code"] for warning in scan.warnings)
                logger.warning("an upload is used with warnings: %s", codes)
            job.state = "analysing"
            job.scan = self._service.analyse(scan)
            job.state = "done"
        except UploadError as error:
            job.code, job.detail, job.state = error.code, str(error), "failed"
            logger.warning("an upload was refused: %s", error.code)
        except Exception as error:
            # Whatever it is: a job that never ends keeps its reader waiting and takes up a place.
            job.code, job.detail, job.state = "unreadable", "analysing the scan failed", "failed"
            logger.warning("analysing an upload failed: %s", type(error).__name__)
        finally:
            intake.discard(folder)


def build(service: CaseService, config: ServeConfig) -> FastAPI:
    """The application.

    Args:
        service: What answers.
        config: How it is served.

    Raises:
        ValueError: If the host isn't loopback and no token is set.
    """
    if config.host not in LOOPBACK and not config.token:
        raise ValueError(
            f"serving on {config.host} needs a token: set token=<at least {LEAST_TOKEN} letters>"
        )
    jobs = Jobs(service, config.limits)
    audit = AuditLog(config.audit_log)
    receiving = 0  # uploads on the line; the event loop alone counts them
    scratch = intake.Scratch()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        scratch.close()

    app = FastAPI(
        title="ctclip", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.mount("/web", StaticFiles(directory=handout.WEB), name="web")
    _guard(app, config)

    @app.exception_handler(NotFoundError)
    def not_found(_: Request, error: NotFoundError) -> Response:
        return _problem(404, "not-found", str(error))

    @app.exception_handler(EmbeddingError)
    @app.exception_handler(ValueError)
    def refused(_: Request, error: ValueError) -> Response:
        return _problem(400, "refused", str(error))

    @app.get("/")
    def index() -> Response:
        return FileResponse(handout.WEB / "index.html")

    @app.get("/api/info")
    def info() -> dict[str, Any]:
        return {
            "findings": FINDINGS,
            "fields": service.fields,
            "size": service.size,
            "model": service.scorer.checkpoint.sha256[:12],
            "pictures": service.cohort is not None,
            "reference": service.reference is not None,
            "upload_mib": config.limits.upload_mib,
        }

    @app.post("/api/studies")
    async def studies(request: Request) -> list[str]:
        asked = await _json(request)
        beginning = str(asked.get("beginning", ""))[:200]
        return await asyncio.to_thread(service.studies, beginning)

    @app.post("/api/scans")
    async def upload(request: Request) -> dict[str, str]:
        nonlocal receiving
        if jobs.waiting() + receiving >= config.limits.waiting:
            raise HTTPException(429, "many scans are waiting; try again in some minutes")
        receiving += 1
        folder = Path(tempfile.mkdtemp(dir=scratch.path))
        is_complete = False
        try:
            transfer = _receive(request, folder / "upload", config.limits.upload_mib << 20)
            await asyncio.wait_for(transfer, config.limits.upload_s)
            is_complete = True
        except asyncio.TimeoutError:
            raise HTTPException(408, "the upload took too long") from None
        finally:
            receiving -= 1
            if not is_complete:
                intake.discard(folder)
        return {"job": jobs.submit(folder / "upload", folder)}

    @app.get("/api/scans/{handle}")
    def job(handle: str) -> dict[str, Any]:
        return vars(jobs.get(handle))

    @app.post("/api/search")
    async def search(request: Request) -> dict[str, Any]:
        asked = await _json(request)
        user = _user(request, config)
        question = parse(asked)
        result = await asyncio.to_thread(service.ask, question)
        kinds = [k for k in ("scan", "study", "text", "more", "less") if asked.get(k)]
        named = {"study": question.study, "more": question.more, "less": question.less}
        what = {"by": kinds, **named, "where": asked.get("where", {}), "result": result["id"]}
        audit.record(user, what, _studies(result))
        return result

    def record_saved(request: Request, how: str, handle: str) -> None:
        what = {"by": [how], "result": handle}
        audit.record(_user(request, config), what, _studies(service.result(handle)))

    @app.get("/api/results/{handle}")
    def result(request: Request, handle: str) -> dict[str, Any]:
        record_saved(request, "open", handle)
        return service.result(handle)

    @app.get("/api/results/{handle}/{case}/volume.nii.gz")
    def volume(handle: str, case: str) -> Response:
        return Response(service.volume(handle, _case(case)), media_type="application/octet-stream")

    @app.get("/api/results/{handle}/{case}/thumbnail.png")
    def thumbnail(handle: str, case: str) -> Response:
        return Response(service.thumbnail(handle, _case(case)), media_type="image/png")

    @app.get("/api/results/{handle}/{case}/heat-{finding}.nii.gz")
    def heat_map(handle: str, case: str, finding: int) -> Response:
        data = service.heat_map(handle, _case(case), finding)
        return Response(data, media_type="application/octet-stream")

    @app.get("/api/results/{handle}/result.html")
    def as_html(request: Request, handle: str, language: Language = "en") -> Response:
        record_saved(request, "html", handle)
        text = handout.as_html(service, handle, language)
        headers = {"Content-Disposition": 'attachment; filename="similar-cases.html"'}
        return Response(text, media_type="text/html", headers=headers)

    @app.get("/api/results/{handle}/result.pdf")
    def as_pdf(request: Request, handle: str, language: Language = "en") -> Response:
        record_saved(request, "pdf", handle)
        data = handout.as_pdf(service, handle, language)
        headers = {"Content-Disposition": 'attachment; filename="similar-cases.pdf"'}
        return Response(data, media_type="application/pdf", headers=headers)

    return app


def serve(service: CaseService, config: ServeConfig) -> None:
    """Serve until interrupted."""
    import uvicorn
    from rich.console import Console

    console = Console()
    if config.host not in LOOPBACK and not config.token:
        from dataclasses import replace

        config = replace(config, token=secrets.token_urlsafe(24))
        console.print(f"token (enter it in the browser): {config.token}", highlight=False)
    app = build(service, config)
    console.print(f"similar cases: {'  '.join(config.addresses)}  (Ctrl-C ends it)", soft_wrap=True)
    if config.host not in LOOPBACK:
        console.print(
            "other names or addresses of this machine are refused: "
            "allow them with serve.allowed_hosts=[name]",
            markup=False,
        )
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
    )


def _guard(app: FastAPI, config: ServeConfig) -> None:
    """Who may ask: a known host name, our own script, and the token where one is set."""
    names = (config.host, *LOOPBACK, *config.allowed_hosts)
    hosts = {_bracketed(name.lower()) for name in names}

    @app.post("/login")
    async def login(request: Request) -> Response:
        given = str((await _json(request)).get("token", ""))
        if config.token and not hmac.compare_digest(given.encode(), config.token.encode()):
            await asyncio.sleep(0.5)  # guessing should take long
            return _problem(401, "token", "this is not the token")
        response = JSONResponse({"ok": True})
        if config.token:
            response.set_cookie(COOKIE, given, httponly=True, samesite="strict")
        return response

    @app.middleware("http")
    async def check(request: Request, call_next: Next) -> Response:
        refusal = _refusal(request, config, hosts)
        try:
            response = refusal or await call_next(request)
        except Exception as error:
            # Left alone, the server would log it with a traceback that may hold what was asked.
            logger.error("answering failed: %s", type(error).__name__)
            response = _problem(500, "failed", "the service failed to answer; its log says how")
        for name, value in SECURITY_HEADERS.items():
            response.headers[name] = value
        if request.url.path.startswith("/web/"):
            response.headers["Cache-Control"] = "max-age=3600"
        return response


def _bracketed(name: str) -> str:
    """A host's name as addresses have it."""
    return f"[{name}]" if name.count(":") > 1 and name[0] != "[" else name


def _refusal(request: Request, config: ServeConfig, hosts: set[str]) -> Response | None:
    name = request.headers.get("host", "").rsplit(":", 1)[0].lower()
    if name not in hosts:
        return _problem(421, "host", "this page is not served under that name")
    if request.method not in ("GET", "HEAD") and OWN_HEADER not in request.headers:
        return _problem(403, "foreign", "the request does not come from this page")
    is_open = request.url.path in ("/", "/login") or request.url.path.startswith("/web/")
    if config.token and not is_open:
        given = request.cookies.get(COOKIE, "")
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not any(
            hmac.compare_digest(value.encode(), config.token.encode()) for value in (given, bearer)
        ):
            return _problem(401, "token", "enter the token first")
    return None


async def _receive(request: Request, path: Path, limit: int) -> None:
    """Write a body to disk, counting; what the sender claims about its length isn't trusted."""
    received = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise HTTPException(413, f"more than {limit >> 20} MiB")
            file.write(chunk)
    if received == 0:
        raise HTTPException(400, "the upload is empty")


async def _json(request: Request) -> dict[str, Any]:
    import json

    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_QUESTION_BYTES:
            raise HTTPException(413, "the question is too long")
    try:
        value = json.loads(body or b"{}", parse_constant=_finite, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise HTTPException(400, "the question holds half a character; type it anew") from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON with finite numbers") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "expected a JSON object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("not finite")
    return value


def _studies(result: Mapping[str, Any]) -> list[str]:
    return [hit["study"] for hit in result["hits"]]


def _case(text: str) -> int | None:
    if text == "query":
        return None
    if not text.isdecimal() or len(text) > 4:
        raise NotFoundError("no such case")
    return int(text)


def _user(request: Request, config: ServeConfig) -> str:
    if config.user_header:
        return request.headers.get(config.user_header, "unknown")[:200]
    return "token" if config.token else "local"


def _problem(status: int, code: str, detail: str) -> Response:
    return JSONResponse({"code": code, "detail": detail}, status_code=status)
