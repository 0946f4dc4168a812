"""What the CEL tests share: an activation with usual contents, and short ways to evaluate."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from domain.rules.cel import Activation, EvaluationError, compile_expression

NOW = datetime(2025, 1, 15, 10, 30, tzinfo=UTC)


def activation(event: dict[str, Any] | None = None, **changes: Any) -> Activation:
    """An activation for `event`; `changes` replace its other variables."""
    variables: dict[str, Any] = {
        "event": {} if event is None else event,
        "participant": {
            "id": "p-1",
            "external_id": "alice",
            "status": "ACTIVE",
            "tags": ["vip"],
            "counters": {"monthly_spend": Decimal("12.50")},
            "attributes": {"country": "US"},
            "tiers": {"loyalty": {"level": "gold", "rank": Decimal(2), "benefits": {}}},
        },
        "program": {"tags": ["launch"], "counters": {"issued": Decimal(7)}, "attributes": {}},
        "groups": [],
        "group": None,
        "now": NOW,
    }
    return Activation(**(variables | changes))


def evaluate(source: str, event: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The value of `source` for `event`."""
    return compile_expression(source).evaluate(activation(event, **changes))


def failure(source: str, event: dict[str, Any] | None = None, **changes: Any) -> EvaluationError:
    """The error that evaluating `source` ends in."""
    try:
        value = evaluate(source, event, **changes)
    except EvaluationError as error:
        return error
    raise AssertionError(f"{source} gave {value!r}")
