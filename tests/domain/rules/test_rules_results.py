"""What an action's expressions come to when it runs. Contract: rules-and-events.md 5.2 to 5.7.

The cause in a BadResult is read after `action CREDIT failed: `.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from domain.rules import results
from domain.rules.actions import Action, Target, parse_actions
from domain.rules.cel import Activation

ASSET = "0197f3b4-c1d2-7c3e-8f00-1a2b3c4d5e6f"
GROUP = "0197f3b4-c1d2-7c3e-8f00-000000000001"
NOW = datetime(2025, 1, 15, 10, tzinfo=UTC)
EVENT = {
    "amount": Decimal("1.5"),
    "auth": "auth_1",
    "empty": "",
    "long": "x" * 256,
    "duration": "72h",
    "instant": "2025-02-01T00:00:00Z",
    "group": GROUP,
}


def activation() -> Activation:
    """An event of yesterday: what is counted from `now` and what from the running of the action can be told apart."""
    return Activation(event=EVENT, participant=None, program={}, groups=[], group=None, now=NOW - timedelta(days=1))


def action(action_type: str = "CREDIT", **fields: Any) -> Action:
    return parse_actions([{"type": action_type, "asset_id": ASSET, "amount": "1"} | fields])[0]


def held_until(text: str) -> datetime:
    when = action("HOLD", hold_until=text).hold_until
    assert when is not None
    return results.instant(when, "hold_until", activation(), NOW)


def lot_terms(**fields: str) -> tuple[datetime | None, datetime | None]:
    return results.lot_terms(action(**fields), activation(), NOW)


def group_of(**fields: str) -> UUID:
    target = action("HOLD", target={"type": "GROUP", **fields}).target
    assert isinstance(target, Target)
    return results.group_id(target, activation())


# --- times ------------------------------------------------------------------------------------------------------------


def test_a_duration_counts_from_the_lots_creation() -> None:  # example 17
    assert lot_terms(expires_at="8760h") == (datetime(2026, 1, 15, 10, tzinfo=UTC), None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72h", NOW + timedelta(hours=72)),
        ("2025-02-01T00:00:00+01:00", datetime(2025, 1, 31, 23, tzinfo=UTC)),
        ("event.duration", NOW + timedelta(hours=72)),
        ("event.instant", datetime(2025, 2, 1, tzinfo=UTC)),
        ("duration(event.duration)", NOW + timedelta(hours=72)),
        ("hours(event.amount)", NOW + timedelta(minutes=90)),
        ("timestamp(event.instant) + days(1)", datetime(2025, 2, 2, tzinfo=UTC)),
        ("now + hours(1)", NOW - timedelta(hours=23)),  # `now` is the event's own time
        ("-1h", NOW - timedelta(hours=1)),
        ("876600h", NOW + timedelta(days=36_525)),
    ],
)
def test_a_time_is_a_duration_a_timestamp_or_an_expression_of_either(text: str, expected: datetime) -> None:  # 5.7
    assert held_until(text) == expected


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("event.amount", "hold_until gives neither a time nor a duration"),
        ("event.auth", "hold_until gives neither a time nor a duration"),
        ("event.empty", "hold_until gives neither a time nor a duration"),
        ("event.nothing", "hold_until: no such field: nothing"),
        ("days(event.amount * 24351)", "hold_until is more than a hundred years ahead"),
        ("days(event.amount * -999999)", "hold_until is out of range"),
    ],
)
def test_what_gives_no_usable_time_fails_the_action(text: str, cause: str) -> None:
    with pytest.raises(results.BadResult) as failure:
        held_until(text)

    assert str(failure.value) == cause


def test_a_lot_without_terms_neither_expires_nor_matures() -> None:
    assert lot_terms() == (None, None)


def test_a_lot_matures_before_it_expires() -> None:
    terms = lot_terms(expires_at="event.instant", matures_at="event.duration")

    assert terms == (datetime(2025, 2, 1, tzinfo=UTC), NOW + timedelta(hours=72))


def test_a_maturity_may_have_passed() -> None:  # such value is available at once
    assert lot_terms(matures_at="2020-01-01") == (None, datetime(2020, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"expires_at": "2025-01-15T10:00:00Z"}, "expires_at is not in the future"),
        ({"expires_at": "now"}, "expires_at is not in the future"),
        ({"expires_at": "event.duration", "matures_at": "72h"}, "expires_at is not later than matures_at"),
        ({"expires_at": "event.instant", "matures_at": "720h"}, "expires_at is not later than matures_at"),
        ({"matures_at": "event.amount"}, "matures_at gives neither a time nor a duration"),
    ],
)
def test_a_lot_that_would_never_be_spendable_fails_the_action(fields: dict[str, str], cause: str) -> None:
    with pytest.raises(results.BadResult) as failure:
        lot_terms(**fields)

    assert str(failure.value) == cause


# --- references, groups, amounts --------------------------------------------------------------------------------------


def test_a_reference_is_the_string_that_its_expression_gives() -> None:
    assert results.reference(action("HOLD", reference_id="event.auth"), activation()) == "auth_1"
    assert results.reference(action("HOLD", reference_id="'order-' + event.auth"), activation()) == "order-auth_1"
    assert results.reference(action("HOLD"), activation()) is None


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("event.amount", "reference_id is not a string"),
        ("null", "reference_id is not a string"),
        ("event.empty", "reference_id is empty"),
        ("event.long", "reference_id is too long"),
        ("event.nothing", "reference_id: no such field: nothing"),
    ],
)
def test_a_reference_that_is_no_short_string_fails_the_action(text: str, cause: str) -> None:
    with pytest.raises(results.BadResult) as failure:
        results.reference(action("HOLD", reference_id=text), activation())

    assert str(failure.value) == cause


def test_a_group_is_named_literally_or_by_an_expression() -> None:
    assert group_of(id=GROUP) == UUID(GROUP)
    assert group_of(id="event.group") == UUID(GROUP)
    assert group_of(id="event.group.upperAscii()") == UUID(GROUP)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("event.auth", "target.id is not a UUID"),
        ("event.group.replace('-', '')", "target.id is not a UUID"),
        ("event.amount", "target.id is not a string"),
        ("group.id", "target.id: no such variable here: group"),
    ],
)
def test_a_group_that_is_no_uuid_fails_the_action(text: str, cause: str) -> None:
    with pytest.raises(results.BadResult) as failure:
        group_of(id=text)

    assert str(failure.value) == cause


def test_a_negative_zero_is_zero() -> None:
    assert str(results.amount(action(amount="0 * -event.amount"), activation(), 2)) in ("0", "0.0")
