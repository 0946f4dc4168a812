"""A request is exactly one transaction, and nobody calls commit.

`TransactionalRoute` authenticates, opens the transaction, runs the endpoint inside it and commits before the answer
leaves. Whatever is raised rolls everything back; a conflict that Postgres reports repeats the whole request.
"""

import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import unquote_plus

import structlog
from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from api.afterwards import Afterwards
from api.backlog import BacklogGauge
from api.context import RequestContext, context_of
from api.errors import ERROR_RESPONSES
from api.rate_limits import RateLimiter
from api.waker import Waker
from db.session import ATTEMPTS, REPEATABLE, Database, DatabaseUnavailable, Login, Transaction
from domain import exact_json
from domain.clock import Clock
from domain.errors import Refusal, bad_field
from settings import Settings
from workflows.gateway import Gateway

logger = structlog.get_logger("scrip.api")

_KEY_CHARS = 200


@dataclass(frozen=True, slots=True)
class ApiServices:
    """What every request needs, hung on `app.state.services`."""

    settings: Settings
    database: Database
    limiter: RateLimiter
    gateway: Gateway
    waker: Waker
    backlog: BacklogGauge
    clock: Clock


class ApiRequest(Request):
    """A request whose body has been read, and is parsed exactly: numbers are Decimals."""

    def __init__(self, scope: Scope, receive: Receive, body: bytes) -> None:
        # The body is JSON whatever its Content-Type says.
        headers = [header for header in scope["headers"] if header[0] != b"content-type"]
        super().__init__({**scope, "headers": headers}, receive)
        self._bytes = body
        self._value: Any = None

    def parse(self) -> None:
        """Parse the body. Raises JsonError naming the field."""
        if self._bytes:
            self._value = exact_json.loads(self._bytes)

    async def body(self) -> bytes:
        """The body as it was sent."""
        return self._bytes

    async def json(self) -> Any:
        """The body's value."""
        return self._value


class TransactionalRoute(APIRoute):
    """A route whose endpoint runs inside the transaction of the caller's organization (`Tx`)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler of this route into login, transaction and repetition."""
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def handle_in_transaction(request: Request) -> Response:
            # The body comes first: a slow client must not hold a connection.
            body = await _read(request)
            api_request = ApiRequest(request.scope, request.receive, body)
            services: ApiServices = request.app.state.services
            context = context_of(request.scope)
            key_hash = hash_of_key(request)
            if key_hash is None:
                raise _unauthorized(services, context)
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    async with services.database.login(key_hash, context.request_id) as session:
                        if session is None:
                            raise _unauthorized(services, context)
                        tx, login = session
                        if attempt == 1:
                            _admit(services, context, login, tx)
                            _refuse_nul(request)
                            if takes_body:
                                api_request.parse()
                        api_request.state.tx = tx
                        response = await handle(api_request)
                    return await response.work() if isinstance(response, Afterwards) else response
                except REPEATABLE as error:
                    logger.info("request repeated", request_id=context.request_id, attempt=attempt, reason=str(error))
            raise DatabaseUnavailable("too many conflicting transactions")

        return handle_in_transaction


async def current_transaction(request: Request) -> Transaction:
    """The transaction of this request; a dependency of endpoints on a `TransactionalRoute`."""
    tx: Transaction = request.state.tx
    return tx


Tx = Annotated[Transaction, Depends(current_transaction)]
"""The open transaction, as an endpoint's parameter."""


def make_router(tag: str) -> APIRouter:
    """A router under /v1 whose endpoints are transactional and document their errors."""
    return APIRouter(
        prefix="/v1",
        tags=[tag],
        route_class=TransactionalRoute,
        responses=ERROR_RESPONSES,
        strict_content_type=False,
    )


def hash_of_key(request: Request) -> bytes | None:
    """The SHA-256 of the API key that was sent, or None where none of the right form was.

    `Authorization: Bearer` wins over `X-API-Key` as soon as it is present. Contract: basics.md 3.
    """
    key = request.headers.get("authorization")
    if key is not None:
        scheme, _, key = key.partition(" ")
        if scheme.lower() != "bearer":
            return None
        key = key.strip()
    else:
        key = request.headers.get("x-api-key")
    if key is None or not key.startswith("sk_") or len(key) > _KEY_CHARS:
        return None
    return hashlib.sha256(key.encode()).digest()


def _admit(services: ApiServices, context: RequestContext, login: Login, tx: Transaction) -> None:
    """Take a token from the organization's bucket. Raises TooManyRequests."""
    context.organization_id = login.organization_id
    context.api_key_id = login.api_key_id
    owner, rate, burst = login.organization_id, login.rate_per_second, login.rate_burst
    try:
        context.rate = services.limiter.take(owner, rate, burst, tx.now)
    except Refusal:
        context.rate = services.limiter.status(owner, rate, burst, tx.now)
        raise


def _unauthorized(services: ApiServices, context: RequestContext) -> Refusal:
    """The refusal of a request without a valid key: 401, or 429 once its address has no tokens left."""
    settings = services.settings
    now = services.clock()
    try:
        context.rate = services.limiter.take(context.address, settings.rate_per_second, settings.rate_burst, now)
    except Refusal as refusal:
        return refusal
    return Refusal("unauthorized", "invalid or revoked API key")


async def _read(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise bad_field("body", "the connection closed before the body was complete") from None


def _refuse_nul(request: Request) -> None:
    """Refuse NUL characters in the path and the query: Postgres has no text with them. Contract: README.md "Money"."""
    for name, value in request.path_params.items():
        if "\x00" in str(value):
            raise bad_field(name, "contains a NUL character", expected="text")
    query: bytes = request.scope["query_string"]
    if b"%00" not in query and b"\x00" not in query:
        return
    for pair in query.decode("latin-1").split("&"):
        if "\x00" in unquote_plus(pair):
            raise bad_field(unquote_plus(pair.partition("=")[0])[:100], "contains a NUL character", expected="text")
