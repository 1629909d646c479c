"""The HTTP application: routes, errors, and what stands before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from paceline.serve import errors, openapi
from paceline.serve.gate import Gate
from paceline.serve.routes import (
    chat,
    classify,
    completions,
    embeddings,
    models,
    operations,
    rerank,
    score,
    tokenize,
)
from paceline.serve.service import Service
from paceline.serve.tasks import cancel
from paceline.serve.version import VERSION


def create_app(service: Service) -> FastAPI:
    """The application of one service. Its lifespan starts the service, in the background: the probes answer at once,
    everything else is a 503 until it is ready; and closes it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.ensure_future(service.start())
        try:
            yield
        finally:
            await cancel(starting)
            await service.close()
            if service.tracer is not None:
                await asyncio.to_thread(service.tracer.close)

    settings = service.settings
    app = FastAPI(
        title="paceline",
        version=VERSION,
        root_path=settings.root_path,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirected POST would lose its body with some clients
    )
    app.state.service = service
    for module in (chat, completions, embeddings, rerank, score, classify, models, tokenize, operations):
        app.include_router(module.router)
    errors.install(app)
    openapi.install(app)
    # The last one added is the outermost: a refusal by the gate has CORS's headers too, or a browser could not read it.
    app.add_middleware(Gate, service=service)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
