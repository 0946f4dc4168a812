"""Responses written as bytes once, without another pass of validation."""

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from db import json

_REPLAYED = {"Idempotent-Replayed": "true"}


class JsonResponse(Response):
    """A response whose body is JSON bytes already."""

    media_type = "application/json"

    def __init__(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(body, status_code=status, headers=headers)


def respond(body: BaseModel, status: int = 200, *, replayed: bool = False) -> JsonResponse:
    """`body` with a status that depends on what happened; `replayed` marks an idempotent replay.

    Contract: README.md "Idempotency" (the header `Idempotent-Replayed`).
    """
    content = body.__pydantic_serializer__.to_json(body)
    return JsonResponse(content, status, _REPLAYED if replayed else None)


def respond_dict(body: dict[str, Any], status: int = 200, *, replayed: bool = False) -> JsonResponse:
    """Like `respond`, for a body that is JSON as it stands, numbers as Decimals: the hot endpoints."""
    return JsonResponse(json.dumps(body), status, _REPLAYED if replayed else None)


def no_content() -> Response:
    """204, without a body."""
    return Response(status_code=204)
