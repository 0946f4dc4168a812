"""What the expressions of an action come to, checked: the same for processing an event and for simulating a rule.

Contract: rules-and-events.md 5.2, 5.4, 5.5, 5.7, 5.11 and 5.12. Nothing is rounded.
"""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from domain import limits, money
from domain.rules.actions import Action, Target, When
from domain.rules.cel import Activation, EvaluationError, Expression
from domain.rules.cel.functions import to_string
from domain.rules.fields import LONGEST_TERM, parse_uuid, span_or_instant


class BadResult(Exception):
    """An expression gave nothing that the action can use; `str(error)` is the cause, fit for `action X failed: …`."""


def amount(action: Action, activation: Activation, scale: int) -> Decimal:
    """The amount of a balance action that has one, on an asset with `scale` decimals: 0 (a no-op) or positive.

    Raises BadResult for a missing field or another error, for what is not a number, for a negative number, for more
    significant decimals than `scale` and for more than 20 digits before the point.
    """
    assert action.amount is not None, "checked when the rule was saved"
    value = _number(action.amount, "amount", activation)
    if value < 0:
        raise BadResult("amount is negative")
    if not money.fits_size(value):
        raise BadResult("amount is too large")
    if not money.fits_scale(value, scale):
        raise BadResult("amount exceeds asset scale")
    return value.copy_abs()  # a negative zero prints as zero


def reference(action: Action, activation: Activation) -> str | None:
    """The reference_id of a balance action; None for an action without one. Contract: rules-and-events.md 5.5.

    Raises BadResult for an error and for anything but a string of 1 to 255 characters.
    """
    return None if action.reference_id is None else _short_text(action.reference_id, "reference_id", activation)


def instant(when: When, name: str, activation: Activation, start: datetime) -> datetime:
    """The point in time that `when`, the action's field `name`, comes to; it may lie in the past. Contract: 5.5, 5.7.

    `start` is the moment the action runs, from which durations count. Raises BadResult for an error, for what gives
    neither a time nor a duration (nor a string of either form), and for a duration of more than a hundred years.
    """
    value = span_or_instant(_evaluate(when, name, activation)) if isinstance(when, Expression) else when
    if value is None:
        raise BadResult(f"{name} gives neither a time nor a duration")
    if isinstance(value, timedelta):
        if value > LONGEST_TERM:
            raise _too_far(name)
        try:
            return start + value
        except OverflowError:
            raise BadResult(f"{name} is out of range") from None
    return value


def lot_terms(action: Action, activation: Activation, now: datetime) -> tuple[datetime | None, datetime | None]:
    """When the lot that a CREDIT makes at `now` expires and when it matures; None for never, and for at once.

    A maturity that has passed by `now` is returned as it is: such value is available at once. Raises BadResult as
    `instant` does, and for an expiry that is not later than `now` and than the maturity. Contract: 5.5.
    """
    expires_at = matures_at = None
    if action.matures_at is not None:
        matures_at = instant(action.matures_at, "matures_at", activation, now)
    if action.expires_at is not None:
        expires_at = instant(action.expires_at, "expires_at", activation, now)
        if expires_at <= now:
            raise BadResult("expires_at is not in the future")
        if matures_at is not None and expires_at <= matures_at:
            raise BadResult("expires_at is not later than matures_at")
    return expires_at, matures_at


def increment(action: Action, activation: Activation) -> Decimal:
    """What a COUNTER adds, of either sign. Raises BadResult for an error, no number, and one no counter can hold."""
    assert isinstance(action.value, Expression), "checked when the rule was saved"
    value = _number(action.value, "value", activation)
    if not (money.fits_size(value) and money.fits_scale(value, limits.COUNTER_DECIMALS)):
        raise BadResult("counter out of range")
    return value


def attribute(action: Action, activation: Activation) -> str:
    """The string that a SET_ATTRIBUTE stores: a literal, or what `string(value)` gives.

    Raises BadResult for an error, for a map, a list or null, and for a string that is empty or too long.
    """
    assert action.value is not None, "checked when the rule was saved"
    if isinstance(action.value, str):
        return action.value
    value = _evaluate(action.value, "value", activation)
    try:
        text = to_string(value)
    except EvaluationError:
        raise BadResult("value is neither a string nor a number") from None
    if not 0 < len(text) <= limits.ATTRIBUTE_CHARS:
        raise BadResult(f"value must have 1 to {limits.ATTRIBUTE_CHARS} characters")
    return text


def target_text(target: Target, activation: Activation) -> str | None:
    """The external_id or the participant's id that the target's expression gives; None for a target without one.

    Raises BadResult for an error and for anything but a string of 1 to 255 characters.
    """
    if target.external_id is not None:
        return _short_text(target.external_id, "target.external_id", activation)
    if target.participant_id is not None:
        return _short_text(target.participant_id, "target.participant_id", activation)
    return None


def group_id(target: Target, activation: Activation) -> UUID:
    """The id of the GROUP that the target names, literally or by its expression. Contract: rules-and-events.md 5.2.

    Raises BadResult for an error and for anything but a string that is a UUID.
    """
    if target.group_id is None:
        assert target.id is not None, "checked when the rule was saved"
        return target.id
    found = parse_uuid(_short_text(target.group_id, "target.id", activation))
    if found is None:
        raise BadResult("target.id is not a UUID")
    return found


def _too_far(name: str) -> BadResult:
    return BadResult(f"{name} is more than a hundred years ahead")


def _short_text(expression: Expression, name: str, activation: Activation) -> str:
    value = _evaluate(expression, name, activation)
    if type(value) is not str:
        raise BadResult(f"{name} is not a string")
    if not value:
        raise BadResult(f"{name} is empty")
    if len(value) > limits.STATE_KEY_CHARS:
        raise BadResult(f"{name} is too long")
    return value


def _number(expression: Expression, name: str, activation: Activation) -> Decimal:
    value = _evaluate(expression, name, activation)
    if type(value) is not Decimal or not value.is_finite():
        raise BadResult(f"{name} is not a number")
    return value


def _evaluate(expression: Expression, name: str, activation: Activation) -> Any:
    try:
        return expression.evaluate(activation)
    except EvaluationError as error:
        raise BadResult(f"{name}: {error}") from None
