"""Refusals: every way in which the business says no, as one typed exception. Contract: basics.md 2.6 and 2.7."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STATUS_BY_CODE: dict[str, int] = {
    "bad_request": 400,
    "invalid_scale": 400,
    "self_transfer": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "idempotency_conflict": 409,
    "conflict": 409,
    "participant_inactive": 409,
    "program_inactive": 409,
    "group_archived": 409,
    "asset_archived": 409,
    "tier_archived": 409,
    "last_admin": 409,
    "redemption_not_pending": 409,
    "redemption_not_confirmed": 409,
    "hold_not_active": 409,
    "not_resendable": 409,
    "endpoint_not_active": 409,
    "insufficient_balance": 422,
    "insufficient_program_balance": 422,
    "max_transaction_amount_exceeded": 422,
    "asset_not_linked": 422,
    "reward_not_available": 422,
    "reward_out_of_stock": 422,
    "participant_limit_exceeded": 422,
    "amount_below_minimum": 422,
    "reversal_exceeds_redemption": 422,
    "already_fully_reversed": 422,
    "too_many_requests": 429,
    "internal_error": 500,
    "service_unavailable": 503,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One field that is wrong. `reason` is `required` or `invalid`; `expected` names the wanted kind."""

    field: str
    message: str
    reason: str = "invalid"
    expected: str = "<any>"
    received: Any = None


class Refusal(Exception):
    """A business refusal: a stable `code`, a message for people, and the fields that are wrong, if any.

    Raised anywhere below the API, it rolls the transaction back; the API answers with the status of its code.
    """

    def __init__(self, code: str, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.problems = tuple(problems)

    @property
    def status(self) -> int:
        """The HTTP status of this code."""
        return STATUS_BY_CODE[self.code]


def bad_field(
    field: str, message: str, *, expected: str = "<any>", received: Any = None, reason: str = "invalid"
) -> Refusal:
    """A 400 `bad_request` that names one field."""
    return Refusal("bad_request", "Invalid request parameters", [Problem(field, message, reason, expected, received)])


def not_found(what: str) -> Refusal:
    """A 404 for an id that this organization doesn't have, whether or not another one has it."""
    return Refusal("not_found", f"{what} not found")
