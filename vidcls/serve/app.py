"""The HTTP service: POST a video, get its classes; a page to drop one on; health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from vidcls.predict.predictor import Predictor
from vidcls.predict.videos import Job
from vidcls.serve.batching import Batcher
from vidcls.serve.decoding import Decoders, Upload
from vidcls.serve.limits import CONTAINERS, HEAD_BYTES, RefusedError, ServeLimits, container_of
from vidcls.serve.page import PAGE
from vidcls.sharding.decode import Clip

FIELD = "video"
COPY_BYTES = 2**20


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vidcls_requests", "Uploads by outcome", ["outcome"], registry=self.registry)
        self.seconds = Histogram("vidcls_request_seconds", "Time of an answered upload", registry=self.registry)
        buckets = (1, 2, 4, 8, 16, 32, 64)
        self.batches = Histogram("vidcls_batch_clips", "Clips in a forward", buckets=buckets, registry=self.registry)
        self.waiting = Gauge("vidcls_requests_in_work", "Uploads in work or waiting", registry=self.registry)


def create_app(predictor: Predictor, limits: ServeLimits | None = None) -> FastAPI:
    """The service around a loaded model."""
    limits = limits or ServeLimits()
    metrics = Metrics()
    head = predictor.head
    decoders = Decoders(head.settings, limits)
    batcher = Batcher(predictor.scores, limits.batch_size, limits.batch_wait, metrics.batches.observe)
    in_work = 0

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()
        decoders.close()

    app = FastAPI(title="vidcls", lifespan=lifespan)
    app.add_middleware(_BodyLimit, most=limits.upload_bytes, told=metrics.requests.labels("too_large").inc)

    @app.exception_handler(RequestValidationError)
    async def wrong_option(_: Request, error: RequestValidationError) -> JSONResponse:
        metrics.requests.labels("wrong_option").inc()
        told = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
        return _refusal(RefusedError(422, "wrong_option", told))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "head": head.name, "classes": len(head.labels), "label_space": head.labels.fingerprint}

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/predict")
    async def predict(request: Request, top: int = 5, frames: bool = False) -> JSONResponse:
        """multipart/form-data with a file `video`. top: classes told at most. frames: what was looked at, as JPEG."""
        nonlocal in_work
        began = time.perf_counter()
        if in_work >= limits.waiting:
            metrics.requests.labels("busy").inc()
            return _refusal(RefusedError(503, "busy", f"{in_work} uploads are in work; come again"), retry=True)
        in_work += 1
        metrics.waiting.set(in_work)
        try:
            if top < 1:
                raise RefusedError(422, "wrong_option", f"top: {top}; legal: >= 1")
            upload, name = await _receive(request, decoders, limits.upload_seconds)
            clip = Clip(upload.frames, np.array(upload.times), "pyav", (0, 0))
            try:
                prepared = await run_in_threadpool(predictor.prepare, Job(name, head.settings), clip)
            except ValueError as error:  # a frame that is too long and narrow, or more tokens than the model takes
                raise RefusedError(422, "unsuitable", str(error)) from None
            scores_C = await batcher(prepared)
        except RefusedError as error:
            metrics.requests.labels(error.outcome).inc()
            return _refusal(error)
        except ClientDisconnect:
            metrics.requests.labels("gone").inc()
            return _refusal(RefusedError(400, "gone", "the upload was broken off"))
        except Exception:
            metrics.requests.labels("failed").inc()
            raise
        finally:
            in_work -= 1
            metrics.waiting.set(in_work)
        order = np.argsort(-scores_C, kind="stable")[:top].tolist()
        answer: dict[str, Any] = {
            "video": name,
            "seconds": round(upload.seconds, 3),
            "top": [{"class": head.labels.names[i], "score": round(float(scores_C[i]), 6)} for i in order],
        }
        if frames:
            answer["frames"] = base64.b64encode(upload.strip).decode("ascii")
        metrics.requests.labels("answered").inc()
        metrics.seconds.observe(time.perf_counter() - began)
        return JSONResponse(answer)

    return app


async def _receive(request: Request, decoders: Decoders, seconds: float) -> tuple[Upload, str]:
    """The decoded upload, and its name as the sender calls it. Its file is gone afterwards."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RefusedError(415, "wrong_type", f"send multipart/form-data with a file `{FIELD}`")
    try:
        async with asyncio.timeout(seconds):
            form = await request.form(max_files=1, max_fields=8)
    except TimeoutError:
        raise RefusedError(408, "slow_upload", f"the upload took more than {seconds:g} s") from None
    except (UnicodeError, LookupError) as error:
        raise RefusedError(400, "malformed", f"the form cannot be read: {error}") from None
    except (MultiPartException, HTTPException) as error:
        if isinstance(error, HTTPException) and error.status_code == 413:
            raise RefusedError(413, "too_large", str(error.detail)) from None
        detail = error.message if isinstance(error, MultiPartException) else error.detail
        raise RefusedError(400, "malformed", f"the form cannot be read: {detail}") from None
    path = None
    try:
        file = form.get(FIELD)
        if not isinstance(file, UploadFile):
            raise RefusedError(422, "no_file", f"the form has no file `{FIELD}`")
        # Halves of a character, which some charsets of the sender's choice give, could not be answered with.
        name = os.path.basename(file.filename or "video").encode("utf-8", "replace").decode()
        if file.size == 0:
            raise RefusedError(422, "empty", "the file is empty")
        if container_of(await file.read(HEAD_BYTES)) is None:
            raise RefusedError(415, "wrong_type", f"not a video of a known type ({', '.join(CONTAINERS)})")
        await file.seek(0)
        descriptor, path = tempfile.mkstemp(prefix="vidcls-upload-")
        with os.fdopen(descriptor, "wb") as out:
            while part := await file.read(COPY_BYTES):
                await run_in_threadpool(out.write, part)
        return await decoders.decode(path), name
    finally:
        await form.close()
        if path is not None:
            os.unlink(path)


def _refusal(error: RefusedError, *, retry: bool = False) -> JSONResponse:
    headers = {"Retry-After": "1"} if retry else None
    return JSONResponse({"error": error.reason, "kind": error.outcome}, status_code=error.status, headers=headers)


class _BodyLimit:
    """Ends requests whose body has more than `most` bytes, as soon as that is known: 413."""

    def __init__(self, app: Any, most: int, told: Callable[[], None]) -> None:
        self._app, self._most, self._told = app, most, told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reason = f"more than {self._most} bytes; that is the limit"
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            self._told()
            await _refusal(RefusedError(413, "too_large", reason))(scope, receive, send)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:  # sent in pieces, without a length
                raise HTTPException(413, reason)
            return message

        await self._app(scope, counted, send)
