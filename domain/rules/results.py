"""What the expressions of an action come to, checked: the same for processing an event and for simulating a rule.

Contract: rules-and-events.md 5.2, 5.4, 5.11 and 5.12. Nothing is rounded.
"""

from decimal import Decimal
from typing import Any

from domain import limits, money
from domain.rules.actions import Action, Target
from domain.rules.cel import Activation, EvaluationError, Expression
from domain.rules.cel.functions import to_string


class BadResult(Exception):
    """An expression gave nothing that the action can use; `str(error)` is the cause, fit for `action X failed: …`."""


def amount(action: Action, activation: Activation, scale: int) -> Decimal:
    """The amount of a balance action on an asset with `scale` decimals: 0 (a no-op) or positive.

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
    return value


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
    expression = target.external_id or target.participant_id
    if expression is None:
        return None
    name = "target.external_id" if target.external_id else "target.participant_id"
    value = _evaluate(expression, name, activation)
    if type(value) is not str or not value:
        raise BadResult(f"{name} is not a string")
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
