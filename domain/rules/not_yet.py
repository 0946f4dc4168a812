"""What the contract has and this version does not run yet, refused at save with 400 instead of being ignored.

The one place: whoever adds a feature deletes its line here and finds every check that stood for it.
Contract: rules-and-events.md 3 and 5.
"""

from collections.abc import Sequence
from typing import Any

from domain.errors import bad_field

ACTION_TYPES = frozenset({"HOLD", "RELEASE", "FORFEIT", "VOID_HOLD", "SET_TIER", "SCHEDULE_EVENT", "BROADCAST"})
TARGET_TYPES = frozenset({"GROUP"})
BUCKETS = frozenset({"HELD"})
LOT_ACTION_TYPES = frozenset({"DEBIT"})


def message(what: str) -> str:
    """The sentence that says so, the same everywhere."""
    return f"this version does not run {what} yet"


OTHER_PROGRAMS = message("actions on other programs")


def refuse_budgets(budgets: Sequence[Any] | None) -> None:
    """Raises Refusal `bad_request` naming `budgets` unless it is absent or empty."""
    if budgets:
        raise bad_field("budgets", message("rule budgets"), expected="empty array")
