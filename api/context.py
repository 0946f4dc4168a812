"""What the edge knows about one request, from its first byte to its log line."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from domain.ids import new_id

_SCOPE_KEY = "scrip.request"


@dataclass(frozen=True, slots=True)
class RateStatus:
    """A token bucket as the three `X-RateLimit-*` headers show it; `reset` is in Unix seconds."""

    limit: int
    remaining: int
    reset: int


@dataclass(slots=True)
class RequestContext:
    """The identity and outcome of one request. Contract: basics.md 2.5."""

    request_id: str
    address: str
    organization_id: UUID | None = None
    api_key_id: UUID | None = None
    rate: RateStatus | None = None
    error_code: str | None = None


def new_context(scope: MutableMapping[str, Any]) -> RequestContext:
    """Give the request in `scope` its id and remember both there."""
    client = scope.get("client")
    context = RequestContext(f"req_{new_id().hex}", client[0] if client else "unknown")
    scope[_SCOPE_KEY] = context
    return context


def context_of(scope: MutableMapping[str, Any]) -> RequestContext:
    """The context that the outermost middleware put into `scope`."""
    context: RequestContext = scope[_SCOPE_KEY]
    return context
