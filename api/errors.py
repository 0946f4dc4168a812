"""Every error as the contract's body: `{code, message, request_id, details?}`. Contract: basics.md 2.6 and 2.7."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

from api.context import context_of
from api.rate_limits import TooManyRequests
from api.responses import JsonResponse
from db.session import DatabaseUnavailable, OutcomeUnknown
from domain import limits
from domain.errors import Problem, Refusal
from domain.exact_json import JsonError

_SHOWN_PROBLEMS = 50
_SHOWN_CHARS = 100


class BodyTooLarge(Refusal):
    """413: the body has more than 8 MiB. Contract: README.md "Money"."""

    def __init__(self) -> None:
        super().__init__("bad_request", f"the body is larger than {limits.BODY_BYTES // 1024**2} MiB")

    @property
    def status(self) -> int:
        """413, although the code is `bad_request`."""
        return 413


class FieldProblem(BaseModel):
    """One field that is wrong."""

    field: str = Field(description="Dotted path of the field, or the name of the parameter.")
    expected: str = Field(description="The kind of value wanted, such as `uuid`.")
    message: str = Field(description="For people; may change.")
    reason: str = Field(description="`required` or `invalid`.")
    received: str | None = Field(description="What was sent, cut to 100 characters; null when nothing was.")


class ErrorDetails(BaseModel):
    """The first problem, and the list of all of them."""

    field: str = Field(description="Field of the first problem.")
    expected: str = Field(description="What it should have been.")
    received: str | None = Field(description="What it was.")
    reason: str = Field(description="`required` or `invalid`.")
    fields: list[FieldProblem] = Field(description="Every problem, the first one included; at most 50.")


class ErrorBody(BaseModel):
    """The body of every error."""

    code: str = Field(description="Stable machine code, snake_case.", examples=["bad_request"])
    message: str = Field(description="For people; may change.", examples=["Invalid request parameters"])
    request_id: str = Field(description="Also in the header `X-Request-Id`.", examples=["req_0197f3b4c1d27c3e8f"])
    details: ErrorDetails | None = Field(default=None, description="Which fields are wrong, if that is the reason.")


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in statuses}


_DESCRIPTIONS = {
    400: "A parameter or the body is malformed: `bad_request`, `invalid_scale`, `self_transfer`.",
    401: "`unauthorized`: the key is missing, invalid or revoked.",
    404: "`not_found`: no such id in this organization.",
    409: "The state of something forbids it; `code` says which.",
    413: "`bad_request`: the body is larger than 8 MiB.",
    422: "Understood and refused by a business rule; `code` says which.",
    429: "`too_many_requests`: see `Retry-After`.",
    500: "`internal_error`.",
    503: "`service_unavailable`: the database or Temporal is out of reach. Nothing was done, unless the message says"
    " that the outcome is unknown: repeat the call with the same `idempotency_key`.",
}
ERROR_RESPONSES = _documented(400, 401, 404, 409, 413, 422, 429, 500, 503)
"""What every endpoint under /v1 may answer, for the OpenAPI document."""


def error_response(
    context_request_id: str,
    status: int,
    code: str,
    message: str,
    problems: Iterable[Problem] = (),
    headers: Mapping[str, str] | None = None,
) -> JsonResponse:
    """The contract's error body. `problems` fill `details`, which is absent without any."""
    body: dict[str, Any] = {"code": code, "message": message, "request_id": context_request_id}
    fields = [_field(problem) for problem in list(problems)[:_SHOWN_PROBLEMS]]
    if fields:
        first = fields[0]
        body["details"] = {name: first[name] for name in ("field", "expected", "received", "reason")}
        body["details"]["fields"] = fields
    return JsonResponse(orjson.dumps(body), status, dict(headers or {}))


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every refusal, and every complaint of the framework, in the contract's form."""
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(JsonError, _on_json_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(DatabaseUnavailable, _on_database_unavailable)
    app.add_exception_handler(OutcomeUnknown, _on_outcome_unknown)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_refusal(request: Request, refusal: Exception) -> JsonResponse:
    assert isinstance(refusal, Refusal)
    headers = {"Retry-After": str(refusal.retry_after_s)} if isinstance(refusal, TooManyRequests) else None
    return _answer(request, refusal.status, refusal.code, refusal.message, refusal.problems, headers)


async def _on_json_error(request: Request, error: Exception) -> JsonResponse:
    assert isinstance(error, JsonError)
    problem = Problem(error.field, error.message, expected="JSON")
    return _answer(request, 400, "bad_request", f"{error.field}: {error.message}"[:500], [problem])


async def _on_invalid_request(request: Request, invalid: Exception) -> JsonResponse:
    assert isinstance(invalid, RequestValidationError)
    return _answer(request, 400, "bad_request", "Invalid request parameters", problems_of(invalid.errors()))


async def _on_database_unavailable(request: Request, error: Exception) -> JsonResponse:
    return _answer(request, 503, "service_unavailable", "the database is out of reach; nothing was done")


async def _on_outcome_unknown(request: Request, error: Exception) -> JsonResponse:
    message = (
        "the outcome is unknown, because the database did not say in time whether this was done: repeat the call with"
        " the same idempotency_key; if it had none, look whether it was done before repeating it"
    )
    return _answer(request, 503, "service_unavailable", message)


async def _on_http_exception(request: Request, error: Exception) -> JsonResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _answer(request, 404, "not_found", f"no such route: {request.method} {request.url.path[:200]}")
    if error.status_code == 405:
        message = f"method {request.method} is not allowed here"
        return _answer(request, 405, "bad_request", message, headers=error.headers)
    return _answer(request, error.status_code, "bad_request", str(error.detail))


def _answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    problems: Iterable[Problem] = (),
    headers: Mapping[str, str] | None = None,
) -> JsonResponse:
    context = context_of(request.scope)
    context.error_code = code
    return error_response(context.request_id, status, code, message, problems, headers)


def _field(problem: Problem) -> dict[str, Any]:
    return {
        "field": problem.field,
        "expected": problem.expected,
        "message": problem.message,
        "reason": problem.reason,
        "received": _shown(problem.received),
    }


def _shown(value: Any) -> str | None:
    """What was received, short, and never a container's content: that may be large or private."""
    if value is None or isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, dict):
        text = "object"
    elif isinstance(value, list):
        text = "array"
    elif isinstance(value, Decimal | int):
        # A Decimal writes any number of digits; an int refuses thousands.
        text = str(Decimal(value))
    else:
        text = type(value).__name__
    return text[:_SHOWN_CHARS] if text is not None else None


def problems_of(errors: Iterable[Any]) -> list[Problem]:
    """Pydantic's errors as the contract's problems, in order."""
    return [_problem(error) for error in errors]


def _problem(error: Mapping[str, Any]) -> Problem:
    """A pydantic error as the contract's problem."""
    kind = error["type"]
    required = kind == "missing"
    message = "This field is required" if required else error["msg"].removeprefix("Value error, ")
    received = None if required else error.get("input")
    context = error.get("ctx") or {}
    reason = "required" if required else context.get("reason", "invalid")
    # A rule about several fields has no place of its own: it names the field in its context.
    field = context.get("field") or _path(error["loc"])
    return Problem(field, message, reason, _expected(kind, context), received)


def _path(location: Iterable[str | int]) -> str:
    path = ""
    for index, part in enumerate(location):
        if index == 0 and part in ("body", "query", "path", "header"):
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path[:300] or "body"


_EXPECTED = {
    "missing": "present",
    "string_type": "string",
    "model_attributes_type": "object",
    "model_type": "object",
    "dict_type": "object",
    "list_type": "array",
    "string_too_short": "a longer string",
    "string_too_long": "a shorter string",
}


_BOUNDS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
}


def _expected(kind: str, context: Mapping[str, Any]) -> str:
    if "expected" in context:
        return str(context["expected"])
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    name = kind.split("_", 1)[0]
    names = {"int": "integer", "uuid": "uuid", "bool": "boolean", "datetime": "timestamp", "decimal": "decimal string"}
    return names.get(name, "<any>")
