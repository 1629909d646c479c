"""What every route works with: the engine's client, the tokenizer, the settings, and whether requests are taken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from paceline.encoders.description import EncoderInfo
from paceline.errors import PacelineError
from paceline.log import get_logger
from paceline.serve.client import EngineClient, ModelInfo
from paceline.serve.errors import ApiError, as_api_error, bad_request, unavailable
from paceline.serve.metrics import Metrics
from paceline.serve.settings import ServerSettings
from paceline.serve.tracing import Tracer
from paceline.tokens.tokenizer import Tokenizer

log = get_logger(__name__)

UNSUPPORTED_TASK = "unsupported_task"  # the code of an error: the model is of the other kind
_POLL_SECONDS = 0.05
_MOST_LOGGED_FIELDS = 256  # a client that makes up names must not fill the memory


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded, as the API sees it. Text begins and ends here."""

    info: ModelInfo
    tokenizer: Tokenizer


class Service:
    """One model behind one API process. `load_tokenizer` runs in a thread once the engine has the model's files;
    `on_ready` is told when requests can be answered.

    `failure`: what ended the start, None if nothing did. `draining`: no request is taken any more.
    `num_in_flight`: requests that are being answered. Raises UsageError where traces cannot be made.
    """

    def __init__(
        self,
        client: EngineClient,
        settings: ServerSettings,
        load_tokenizer: Callable[[], Tokenizer],
        on_ready: Callable[[ModelInfo], None] = lambda info: None,
    ) -> None:
        self.client = client
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics(settings.served_model_names[0], client.status, settings.metrics_alias)
        self.tracer = None if settings.otlp_traces_endpoint is None else Tracer(settings.otlp_traces_endpoint)
        self.failure: Exception | None = None
        self.draining = False
        self.num_in_flight = 0
        self._load_tokenizer = load_tokenizer
        self._on_ready = on_ready
        self._model: ServedModel | None = None
        self._logged_fields: set[str] = set()

    async def start(self) -> None:
        """Load the engine and the tokenizer; what fails is kept in `failure`. Returns once requests can be answered."""
        engine = asyncio.ensure_future(self.client.start())
        try:
            while "resolve" not in self.client.status().startup.phases and not engine.done():
                await asyncio.sleep(_POLL_SECONDS)  # it may have to fetch the model
            if engine.done():
                engine.result()
            # Beside the weights: a tokenizer that cannot be read is told before they are there.
            tokenizer, _ = await asyncio.gather(asyncio.to_thread(self._load_tokenizer), engine)
            info = self.client.info
            self._model = ServedModel(info, tokenizer.for_vocabulary(info.vocab_size))
            self._on_ready(info)
        except Exception as error:
            self.failure = error
            if not isinstance(error, PacelineError):
                log.error("the start failed: a bug in paceline", exc_info=error)
        finally:
            engine.cancel()  # it goes on where this was cancelled, or where the tokenizer failed

    async def close(self, drain_timeout: float = 0.0) -> None:
        self.draining = True
        await self.client.close(drain_timeout)

    # -------------------------------------------------------------------------------------------- asked by routes

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.settings.served_model_names[0]

    @property
    def model(self) -> ServedModel:
        """Raises ApiError 503 before it is loaded."""
        if self._model is None:
            raise unavailable(self.not_ready or "the model is being loaded", "model_loading")
        return self._model

    @property
    def encoder(self) -> EncoderInfo:
        """Raises ApiError 503 before the model is loaded, 400 for one that is no encoder."""
        info = self.model.info
        if info.encoder is None:
            raise bad_request(
                f"{self.model_name} generates text and is no encoder: use /v1/chat/completions or /v1/completions",
                code=UNSUPPORTED_TASK,
            )
        return info.encoder

    def check_generates(self) -> None:
        """Raise ApiError 400 for an encoder, 503 before the model is loaded."""
        encoder = self.model.info.encoder
        if encoder is not None:
            uses = "/v1/embeddings, /v1/score or /v1/rerank" if encoder.task == "embed" else "/v1/classify"
            uses += ", /v1/score or /v1/rerank" if encoder.is_cross_encoder else ""
            raise bad_request(
                f"{self.model_name} is an encoder ({encoder.architecture}) and generates nothing: use {uses}",
                code=UNSUPPORTED_TASK,
            )

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def not_ready(self) -> str | None:
        """Why a request would not be answered now, None where it would."""
        if self.failure is not None:
            return str(as_api_error(self.failure))
        if self.draining:
            return "the server is ending and takes no more requests"
        status = self.client.status()
        if not status.ready:
            return status.reason or f"the engine is {status.state}"
        return None if self.is_loaded else "the tokenizer is being loaded"

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served; None means the one that is."""
        names = self.settings.served_model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"the model '{name}' is not served here; served: {', '.join(names)}",
                param="model",
                code="model_not_found",
            )

    def check_extras(
        self, extras: Mapping[str, Any] | None, refused: Mapping[str, tuple[Any, ...]], inert: Iterable[str]
    ) -> None:
        """Fields that no form declares: those that would change the answer are a 400 that names them, unless their
        value changes nothing; unknown ones are accepted and logged once."""
        for name, value in (extras or {}).items():
            if name in refused:
                if value is not None and value not in refused[name]:
                    raise bad_request(
                        f"{name} is not supported: the answer would ignore it; leave it out",
                        name,
                        "unsupported_parameter",
                    )
            elif name not in inert:
                self._log_once(name)

    def _log_once(self, name: str) -> None:
        if name not in self._logged_fields and len(self._logged_fields) < _MOST_LOGGED_FIELDS:
            self._logged_fields.add(name)
            log.warning("requests hold a field %r, which is not known and changes nothing", name[:64])
