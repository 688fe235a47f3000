"""The HTTP side of the endpoint: OpenAI's routes inside the gateway, retries, and errors of OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.llm._internal.common.errors import VLLM_CLIENT_ERRORS
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ModelCard,
    ModelList,
    OpenAIHTTPException,
)
from ray.llm._internal.serve.core.ingress import ingress as ray_ingress
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress, make_fastapi_ingress
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve._private.http_util import session_id_from_headers
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.v1.engine.exceptions import EngineDeadError

from ft_ray.gateway import VERSION, Gateway
from ft_ray.request_rules import Refused
from ft_ray.serve_args import Limits
from ft_ray.serve_metrics import RequestMetrics

__all__ = ["ROUTES", "Ingress", "ingress_class"]

log = logging.getLogger("ft_ray.serving")

_LATER = 60.0  # seconds after the gateway's own timeout, which comes first
_HELD_PAUSE = 0.1
# A replica that is known to be dead fails at once. One that dies this long after it was asked may have died of it.
_DEATH_SECONDS = 0.1
_DEATHS = 2  # of which a request may be the reason: the next one would take what is left
_BUSY = (BackPressureError, DeploymentUnavailableError, EngineDeadError, RayActorError)

ROUTES: dict[str, Any] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
}


def ingress_class(models: list[str], limits: Limits, keys: str | None) -> Any:
    """The class to deploy: Ray's ingress with our routes, guards and errors, and without its CORS."""
    app = FastAPI(
        title="ft-ray",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(Gateway, limits=limits, keys=keys, models=models, observer=RequestMetrics(), named=True),
            Middleware(_Errors),
        ],
    )
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _openai_error)
    return make_fastapi_ingress(Ingress, endpoint_map=ROUTES, app=app)


class Ingress(OpenAiIngress):
    """Ray's OpenAI routes, which list the adapters as well, over whichever version of the model is active.

    `rollout` changes the active deployment through the ingress' user_config, which Serve keeps, hands to every
    replica without a restart, and to new ones when they start.
    """

    def __init__(self, *, adapters: list[str], timeout: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Ray would give up a plain answer, and the first event of a stream, by itself: with a 408, after 600 seconds.
        ray: Any = ray_ingress
        ray.DEFAULT_LLM_ROUTER_HTTP_TIMEOUT = timeout + _LATER
        self._adapters = adapters
        self._active, self._version, self._held = "", "", False
        self._retired: list[Any] = []
        self._in_flight: Counter[str] = Counter()

    def reconfigure(self, routing: dict[str, Any]) -> None:
        """Sends requests from now on to the deployment `routing` names. Those in flight end where they began.

        With `held` new requests, and those that would be asked again, wait here within their timeout.
        """
        self._version, self._held = str(routing["version"] or ""), bool(routing.get("held"))
        if routing["active"] == self._active:
            return
        self._active = routing["active"]
        (model,) = self._model_cards
        handle = serve.get_deployment_handle(self._active, serve.get_replica_context().app_name)
        self._retired = [*self._retired[-1:], self._configured_serve_handles]  # requests in flight still use them
        self._default_serve_handles = {model: handle}
        self._configured_serve_handles = {}

    def active(self) -> str:
        """The deployment that new requests go to; '' while they are held."""
        return "" if self._held else self._active

    def in_flight(self, deployment: str) -> int:
        """Requests that went to `deployment` and have not ended."""
        return self._in_flight[deployment]

    async def _get_response(self, **request: Any) -> AsyncGenerator[Any, None]:
        """Asks again when a replica died before it answered anything; the next one may have to start first.

        Once only after one that died with the request: it may be the request that kills them.
        """
        raw, deaths = request.get("raw_request"), 0
        for pause in (0.0, 2.0, 5.0, None):
            while self._held:
                await asyncio.sleep(_HELD_PAUSE)
            begun, target, asked, answer = False, self._active, time.monotonic(), None
            self._in_flight[target] += 1
            if raw is not None:
                raw.scope[VERSION] = self._version
            try:
                answer = await self._ask(**request)
                async for response in answer:
                    begun = True
                    yield response
                return
            except (asyncio.CancelledError, GeneratorExit):
                # The gateway's timeout. Ray cancels what a request has asked for when its own task is cancelled, as
                # when a client leaves, and not when a part of it is: the engine would generate to the end for nobody.
                # An answer that is not streamed is there as a whole with its first part, and Ray asks for no second.
                whole = begun and not getattr(request.get("body"), "stream", False)
                if answer is not None and not whole:
                    with contextlib.suppress(Exception):  # what has failed already says so again
                        answer.cancel()
                raise
            except (RayActorError, DeploymentUnavailableError, EngineDeadError) as error:
                unasked = isinstance(error, DeploymentUnavailableError)
                deaths += not unasked and time.monotonic() - asked > _DEATH_SECONDS
                if begun or pause is None or deaths >= _DEATHS:
                    raise
            finally:
                self._in_flight[target] -= 1
            await asyncio.sleep(pause)  # a replica whose engine died is still listed until it is found unhealthy

    async def _ask(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> DeploymentResponseGenerator[Any]:
        """What Ray's own `_get_response` asks of a replica. That one keeps the response to itself, and with it the only
        way to cancel what was asked."""
        handle = self._get_configured_serve_handle(await self._get_model_id(body.model))
        info = None
        if raw_request is not None:
            info = RawRequestInfo.from_starlette_request(raw_request)
            session = session_id_from_headers(dict(raw_request.headers))
            handle = handle.options(session_id=session) if session else handle
        if isinstance(body, ChatCompletionRequest):
            body = _sanitize_chat_completion_request(body)
        response: DeploymentResponseGenerator[Any] = getattr(handle, call_method).remote(body, info)
        return response

    async def model(self, model_id: str) -> ModelCard | None:
        if model_id in self._adapters:
            return self._model_cards[model_id.partition(":")[0]].model_copy(update={"id": model_id})
        return await super().model(model_id)

    async def models(self) -> ModelList:
        return ModelList(data=[await self.model(name) for name in [*self._model_cards, *self._adapters]])


class _Errors:
    """ASGI middleware: whatever a route raises becomes an error of OpenAI's shape.

    Starlette handles the classes it has handlers for, but leaves `Exception` to a layer outside of all
    middleware, which the gateway could not add its headers to. vLLM's errors for bad requests arrive here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await (await _openai_error(Request(scope), error))(scope, receive, send)


_CODES = {404: "not_found", 408: "timeout", 500: "internal_error", 503: "unavailable", 504: "timeout"}
# Where vLLM reads a request's messages, and where its validators of a request's fields stand.
_RENDERING = ("/vllm/entrypoints/chat_utils.py", "/vllm/renderers/")
_VALIDATORS = "protocol.py"


def _while_parsing(error: BaseException) -> bool:
    """Whether vLLM broke on a request before any engine saw it: its validators and its rendering of messages expect
    fields and types that a body need not hold. What a template makes of them is the request's fault too. A replica's
    error arrives with its frames as text.
    """
    if isinstance(error, RayTaskError):
        return any(part in str(error) for part in _RENDERING)
    names = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    rendering = any(part in name for name in names for part in _RENDERING)
    return rendering or (bool(names) and names[-1].endswith(_VALIDATORS))


async def _openai_error(request: Request, error: Exception) -> Response:
    """OpenAI's shape. The log gets the kind of error alone: its text may hold a prompt."""
    status, message, param = 500, "the server failed to answer this request.", None
    if isinstance(error, RequestValidationError):
        first = (error.errors() or [{"msg": "invalid request", "loc": ()}])[0]
        param = ".".join(str(p) for p in first["loc"] if p != "body") or None
        status, message = 422, f"{first['msg']} ({param})"
    elif isinstance(error, OpenAIHTTPException):
        status, message = error.status_code, error.message
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, (ValidationError, *VLLM_CLIENT_ERRORS)):
        status, message = 400, str(getattr(error, "cause", None) or error).splitlines()[0][:500]
    elif _while_parsing(error):
        status, message = 422, "a field of the request is missing or has a value of the wrong type."
    elif isinstance(error, _BUSY):
        status, message = 503, "no replica can take this request now: try again."
    if status >= 500:
        log.error("request %s failed: %s", request.headers.get("x-request-id"), type(error).__name__)
    refused = Refused(status, _CODES.get(status, "invalid_value"), message, param)
    return JSONResponse(refused.body(), status_code=status)
