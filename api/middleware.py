"""The edge of every request: its id, its limits, its headers, its log line. Plain ASGI, as it runs for every call."""

import time
from collections.abc import MutableMapping
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.context import RateStatus, RequestContext, new_context
from api.errors import BodyTooLarge, error_response
from api.rate_limits import RateLimiter
from domain import limits
from domain.clock import Clock
from settings import Settings

logger = structlog.get_logger("scrip.api")


class EdgeMiddleware:
    """Gives each request an id, bounds its body, and puts the id and the rate headers on whatever is answered.

    An exception that nothing below has turned into an answer becomes a 500 here, logged with its traceback.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, limiter: RateLimiter, clock: Clock) -> None:
        self._app = app
        self._rate = settings.rate_per_second
        self._burst = settings.rate_burst
        self._limiter = limiter
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = new_context(scope)
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(context)]
            await send(message)

        try:
            if _declared_length(scope) > limits.BODY_BYTES:
                refusal = BodyTooLarge()
                context.error_code = refusal.code
                response = error_response(context.request_id, refusal.status, refusal.code, refusal.message)
                await response(scope, receive, send_with_headers)
            else:
                await self._app(scope, _bounded(receive), send_with_headers)
        except Exception:
            logger.exception("request failed", request_id=context.request_id, route=_route(scope))
            if status:
                raise
            context.error_code = "internal_error"
            response = error_response(context.request_id, 500, "internal_error", "an unexpected error occurred")
            await response(scope, receive, send_with_headers)
        finally:
            logger.info(
                "request",
                request_id=context.request_id,
                method=scope["method"],
                route=_route(scope),
                status=status,
                ms=round((time.perf_counter() - started) * 1000, 1),
                organization_id=str(context.organization_id) if context.organization_id else None,
                error=context.error_code,
            )

    def _headers(self, context: RequestContext) -> list[tuple[bytes, bytes]]:
        rate = context.rate or self._address_status(context)
        return [
            (b"x-request-id", context.request_id.encode()),
            (b"x-ratelimit-limit", b"%d" % rate.limit),
            (b"x-ratelimit-remaining", b"%d" % rate.remaining),
            (b"x-ratelimit-reset", b"%d" % rate.reset),
        ]

    def _address_status(self, context: RequestContext) -> RateStatus:
        return self._limiter.status(context.address, self._rate, self._burst, self._clock())


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else limits.BODY_BYTES + 1
    return 0


def _bounded(receive: Receive) -> Receive:
    """`receive`, counting: a body sent in chunks has no declared length."""
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limits.BODY_BYTES:
            raise BodyTooLarge
        return message

    return receive_bounded


def _route(scope: MutableMapping[str, Any]) -> str | None:
    """The template of the route, such as `/v1/programs/{id}`: never the path itself, which may hold personal data."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path
