"""What operators ask: /health, /startup, /metrics, /version. Never behind the API key."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from paceline.serve.client import Startup
from paceline.serve.errors import unavailable
from paceline.serve.metrics import CONTENT_TYPE
from paceline.serve.openapi import NOT_READY
from paceline.serve.service import Service
from paceline.serve.version import VERSION

router = APIRouter(tags=["Operations"])


class _StartupState(msgspec.Struct):
    """`seconds`: of the phases that are over, in order; `phase` runs now. Graphs and compilation may follow `ready`."""

    state: str
    ready: bool
    seconds: dict[str, float]
    phase: str | None
    transfer: Any
    reason: str | None


@router.get("/health/live")
async def live() -> Response:
    """200 as long as this process answers. Restart it where it does not."""
    return _json({"status": "live"})


@router.get("/health/ready", responses=NOT_READY)
async def ready(request: Request) -> Response:
    """200 where a request would be answered now: loaded, not draining, and stepping if there is work; else 503."""
    service: Service = request.app.state.service
    reason = service.not_ready
    if reason is not None:
        return unavailable(reason, "not_ready").response()
    return _json({"status": "ready"})


@router.get("/health", responses=NOT_READY)
@router.get("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    """The same as /health/ready, for what knows only one."""
    return await ready(request)


@router.get("/startup")
async def startup(request: Request) -> Response:
    """How far the start is, or where its time went."""
    service: Service = request.app.state.service
    status = service.client.status()
    progress: Startup = status.startup
    return _json(
        _StartupState(
            status.state,
            service.not_ready is None,
            dict(progress.phases),
            progress.phase,
            progress.transfer,
            service.not_ready,
        )
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), 200, media_type=None, headers={"Content-Type": CONTENT_TYPE})


@router.get("/version")
async def version() -> Response:
    """This server's version."""
    return _json({"version": VERSION})


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), 200, media_type="application/json")
