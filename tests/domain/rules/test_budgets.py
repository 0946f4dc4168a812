"""Rule budgets in memory. Goal: no period issues more than its limit, and an undone event leaves no trace.

Contract: rules-and-events.md 3.
"""

from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import limits
from domain.cron import Cron
from domain.ids import new_id
from domain.rules.budgets import Budget, BudgetBook, BudgetDraft, Limit, draft_problems, planned, same_terms
from tests.builders import d

RULE, ASSET = new_id(), new_id()
NOON = datetime(2026, 1, 15, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def budget(maximum: str = "100", **fields: Any) -> Budget:
    """A budget that begins at NOON; `cron` or `interval` gives it a schedule."""
    cron, interval = fields.pop("cron", None), fields.pop("interval", None)
    made = Budget(
        rule_id=fields.pop("rule_id", RULE),
        asset_id=fields.pop("asset_id", ASSET),
        maximum=d(maximum),
        schedule_type="CRON" if cron else "INTERVAL" if interval else None,
        cron_expression=cron,
        interval=interval,
        starts_at=NOON,
        consumed=d("0"),
        next_reset_at=None,
        scale=2,
    )
    made.restart(NOON)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def book(*budgets: Budget) -> BudgetBook:
    made = BudgetBook()
    made.add(budgets)
    return made


def try_credit(book: BudgetBook, amount: str, now: datetime = NOON) -> bool:
    """Credit all or nothing, as the engine does; whether it was allowed."""
    is_covered = book.covers(RULE, ASSET, d(amount), now)
    if is_covered:
        book.consume(RULE, ASSET, d(amount), now)
    return is_covered


def stored(budget: Budget) -> tuple[Any, Any]:
    return budget.consumed, budget.next_reset_at


def seen(budget: Budget, now: datetime) -> tuple[Any, Any]:
    return budget.consumed_at(now), budget.next_reset_after(now)


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_a_credit_that_would_go_beyond_the_limit_consumes_nothing() -> None:
    spent = budget("100")
    credits = book(spent)

    assert [try_credit(credits, amount) for amount in ("60", "41", "40", "0.01")] == [True, False, True, False]
    assert spent.consumed == 100


def test_a_rule_without_a_budget_for_the_asset_may_issue_any_amount() -> None:
    credits = book(budget("1", asset_id=new_id()), budget("1", rule_id=new_id()))

    assert try_credit(credits, "1000000")
    assert credits.changed == []


def test_zero_uses_no_budget_and_is_always_covered() -> None:
    credits = book(budget("100", consumed=d("100")))

    assert try_credit(credits, "0")
    assert credits.changed == []


def test_a_limit_lowered_below_what_was_consumed_issues_nothing_more() -> None:
    lowered = budget("50", consumed=d("80"))
    credits = book(lowered)

    assert [try_credit(credits, amount) for amount in ("0.01", "0", "-10", "0.01")] == [False, True, True, False]
    assert lowered.document(NOON)["consumed"] == "70.00"


def test_a_settlement_below_its_authorization_gives_back_but_never_below_zero() -> None:
    spent = budget("100")
    credits = book(spent)
    credits.consume(RULE, ASSET, d("30"), NOON)

    credits.consume(RULE, ASSET, d("-12.5"), NOON)
    assert spent.consumed == d("17.5")

    credits.consume(RULE, ASSET, d("-20"), NOON)
    assert spent.consumed == 0


def test_what_another_period_consumed_gives_nothing_back_in_this_one() -> None:
    spent = budget("100", interval="1h", consumed=d("70"))
    credits = book(spent)

    credits.consume(RULE, ASSET, d("-30"), NOON + HOUR)

    assert stored(spent) == (0, NOON + 2 * HOUR)


def test_charging_what_is_not_covered_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        book(budget("100")).consume(RULE, ASSET, d("100.01"), NOON)


def test_a_budget_is_taken_in_once() -> None:
    with pytest.raises(AssertionError):
        book(budget(), budget())


# --- periods ----------------------------------------------------------------------------------------------------------


def test_a_lifetime_budget_never_resets() -> None:
    spent = budget("100", consumed=d("100"))

    assert spent.next_reset_after(NOON + 900_000 * HOUR) is None
    assert spent.consumed_at(NOON + 900_000 * HOUR) == 100


def test_from_the_reset_on_a_read_sees_zero_and_the_next_reset() -> None:
    spent = budget("100", cron="0 0 1 * *", consumed=d("100"))
    february, march = datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)
    before = february - timedelta(microseconds=1)

    assert seen(spent, before) == (100, february)
    assert seen(spent, february) == (0, march)
    assert spent.consumed == 100, "reading changes nothing"


def test_intervals_are_counted_from_the_start_however_late_one_looks() -> None:
    spent = budget("100", interval="24h", consumed=d("100"))

    assert spent.next_reset_after(NOON) == NOON + 24 * HOUR
    assert spent.next_reset_after(NOON + 24 * HOUR) == NOON + 48 * HOUR
    assert spent.next_reset_after(NOON + 77 * HOUR) == NOON + 96 * HOUR


@pytest.mark.parametrize(("schedule", "period"), [({"interval": "1us"}, timedelta(microseconds=1)),
                                                  ({"cron": "* * * * *"}, timedelta(minutes=1))])  # fmt: skip
def test_millions_of_missed_periods_cost_no_more_than_one(
    schedule: dict[str, str], period: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = budget("100", **schedule)
    steps: list[datetime] = []
    next_after = Cron.next_after

    def counted(cron: Cron, moment: datetime) -> datetime:
        steps.append(moment)
        return next_after(cron, moment)

    monkeypatch.setattr(Cron, "next_after", counted)
    century_later = NOON + timedelta(days=36_525)

    assert spent.next_reset_after(century_later) == century_later + period
    assert len(steps) <= 1


def test_the_first_credit_of_a_new_period_stores_that_period() -> None:
    spent = budget("100", interval="1h", consumed=d("100"))
    credits = book(spent)

    assert not try_credit(credits, "1", NOON + HOUR - timedelta(microseconds=1))
    assert try_credit(credits, "80", NOON + HOUR)
    assert not try_credit(credits, "21", NOON + HOUR)
    assert stored(spent) == (80, NOON + 2 * HOUR)


def test_a_reset_by_hand_begins_a_whole_interval_and_keeps_the_calendar() -> None:
    lifetime, monthly, hourly = budget(), budget(cron="0 0 1 * *"), budget(interval="1h")
    for spent in (lifetime, monthly, hourly):
        spent.consumed = d("70")
        spent.restart(NOON + timedelta(minutes=40))

    assert [spent.consumed for spent in (lifetime, monthly, hourly)] == [0, 0, 0]
    assert lifetime.next_reset_at is None
    assert monthly.next_reset_at == datetime(2026, 2, 1, tzinfo=UTC)
    assert hourly.next_reset_at == NOON + timedelta(minutes=100)


def test_a_clock_that_is_behind_sees_the_period_that_was_stored() -> None:
    spent = budget("100", interval="1h", consumed=d("40"))

    assert seen(spent, NOON - 5 * HOUR) == (40, NOON + HOUR)


def test_a_budget_is_shown_at_its_assets_scale_with_the_schedule_it_has() -> None:
    later = NOON + 2 * HOUR
    assert budget("10000").document(NOON) == {
        "asset_id": str(ASSET),
        "limit": "10000.00",
        "schedule_type": None,
        "consumed": "0.00",
        "next_reset_at": None,
    }
    assert budget("5", interval="1h", consumed=d("3")).document(later) == {
        "asset_id": str(ASSET),
        "limit": "5.00",
        "schedule_type": "INTERVAL",
        "interval": "1h",
        "consumed": "0.00",
        "next_reset_at": "2026-01-15T15:00:00Z",
    }


# --- undo -------------------------------------------------------------------------------------------------------------


def test_an_event_that_fails_gives_back_what_it_consumed_and_the_period_it_began() -> None:
    spent = budget("100", interval="1h", consumed=d("60"))
    credits = book(spent)
    mark = credits.mark()

    assert try_credit(credits, "90", NOON + HOUR)
    assert credits.changed == [spent]
    credits.undo(mark)

    assert stored(spent) == (60, NOON + HOUR)
    assert credits.changed == []


def test_only_what_came_after_the_mark_is_undone() -> None:
    spent = budget("100")
    credits = book(spent)
    try_credit(credits, "10")
    mark = credits.mark()
    try_credit(credits, "20")
    try_credit(credits, "30")

    credits.undo(mark)

    assert spent.consumed == 10
    assert credits.changed == [spent]
    assert try_credit(credits, "90")


def test_changed_budgets_are_listed_once_in_the_order_of_their_locks() -> None:
    ids = sorted(new_id() for _ in range(4))
    budgets = [budget(rule_id=ids[r], asset_id=ids[a]) for r in (1, 0) for a in (3, 2)]
    credits = book(*budgets)
    for _ in range(2):
        for each in budgets[:3]:
            credits.consume(each.rule_id, each.asset_id, d("1"), NOON)

    assert [(b.rule_id, b.asset_id) for b in credits.changed] == [(ids[0], ids[3]), (ids[1], ids[2]), (ids[1], ids[3])]


AMOUNTS = st.decimals(Decimal("-50"), Decimal("50"), places=2)
MINUTES = st.integers(0, 90)


@given(
    st.sampled_from([{}, {"interval": "1h"}, {"cron": "*/30 * * * *"}]),
    st.lists(st.tuples(st.lists(st.tuples(AMOUNTS, MINUTES), max_size=4), st.booleans()), max_size=8),
)
def test_no_period_consumes_more_than_its_limit_and_undone_events_leave_no_trace(
    schedule: dict[str, str], events: list[tuple[list[tuple[Decimal, int]], bool]]
) -> None:
    spent = budget("60", **schedule)
    credits = book(spent)
    issued: dict[datetime | None, Decimal] = {}
    now = NOON
    for amounts, fails in events:
        mark, before, kept = credits.mark(), deepcopy(spent), dict(issued)
        for amount, minutes in amounts:
            now += timedelta(minutes=minutes)
            if not credits.covers(RULE, ASSET, amount, now):
                continue
            credits.consume(RULE, ASSET, amount, now)
            period = spent.next_reset_after(now)
            issued[period] = max(Decimal(0), issued.get(period, Decimal(0)) + amount)
            assert 0 <= spent.consumed <= spent.maximum
            assert spent.consumed_at(now) == issued[period]
            assert period is None or period > now
        if fails:
            credits.undo(mark)
            issued = kept
            assert spent == before


# --- what clients ask for ---------------------------------------------------------------------------------------------


def draft(limit: str = "100", asset_id: UUID = ASSET, **schedule: Any) -> BudgetDraft:
    return BudgetDraft(asset_id, limit, **schedule)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (draft("0"), "limit"),
        (draft("-1"), "limit"),
        (draft("1e3"), "limit"),
        (draft("NaN"), "limit"),
        (draft(" 1"), "limit"),
        (draft("1" * 21), "limit"),
        (draft(cron_expression="0 0 1 * *"), "cron_expression"),
        (draft(interval="1h"), "interval"),
        (draft(schedule_type="CRON"), "cron_expression"),
        (draft(schedule_type="CRON", cron_expression=""), "cron_expression"),
        (draft(schedule_type="CRON", cron_expression="0 0 1 * * *"), "cron_expression"),
        (draft(schedule_type="CRON", cron_expression="0 0 31 2 *"), "cron_expression"),
        (draft(schedule_type="CRON", cron_expression="0 0 1 * *", interval="1h"), "interval"),
        (draft(schedule_type="INTERVAL"), "interval"),
        (draft(schedule_type="INTERVAL", interval=""), "interval"),
        (draft(schedule_type="INTERVAL", interval="0s"), "interval"),
        (draft(schedule_type="INTERVAL", interval="1ns"), "interval"),
        (draft(schedule_type="INTERVAL", interval="-1h"), "interval"),
        (draft(schedule_type="INTERVAL", interval="30d"), "interval"),
        (draft(schedule_type="INTERVAL", interval="1h", cron_expression="0 0 1 * *"), "cron_expression"),
        (draft(), "asset_id"),
    ],
)
def test_what_is_wrong_with_a_draft_is_named(wrong: BudgetDraft, field: str) -> None:
    problems = draft_problems([draft(), wrong] if field == "asset_id" else [draft(asset_id=new_id()), wrong])

    assert [problem.field for problem in problems] == [f"budgets[1].{field}"]
    assert problems[0].message


def test_all_problems_are_found_at_once() -> None:
    wrong = draft("0", schedule_type="CRON", interval="1h")

    fields = [problem.field for problem in draft_problems([wrong])]

    assert fields == ["budgets[0].limit", "budgets[0].cron_expression", "budgets[0].interval"]


def test_a_rule_has_a_largest_number_of_budgets() -> None:
    many = [draft(asset_id=new_id()) for _ in range(limits.BUDGETS_PER_RULE + 1)]

    assert draft_problems(many[1:]) == []
    assert [problem.field for problem in draft_problems(many)] == ["budgets"]


Plan = Callable[[BudgetDraft], Budget]


@pytest.fixture
def replan() -> Plan:
    """Replace a budget of 100 per hour, of which 80 are consumed, twenty minutes into its period."""

    def plan(new: BudgetDraft) -> Budget:
        old = budget("100", interval="1h", consumed=d("80"))
        read = {ASSET: Limit(d(new.limit), 2)}
        (planned_budget,) = planned(RULE, [new], read, [old], NOON + timedelta(minutes=20))
        return planned_budget

    return plan


@pytest.mark.parametrize("limit", ["100", "200", "50"])
def test_an_asset_that_stays_keeps_what_it_consumed_also_above_a_lowered_limit(replan: Plan, limit: str) -> None:
    new = replan(draft(limit, schedule_type="INTERVAL", interval="1h"))

    assert new.maximum == d(limit)
    assert stored(new) == (80, NOON + HOUR)


def test_a_changed_schedule_begins_now_and_keeps_what_was_consumed(replan: Plan) -> None:
    longer = replan(draft(schedule_type="INTERVAL", interval="24h"))
    monthly = replan(draft(schedule_type="CRON", cron_expression="0 0 1 * *"))
    lifetime = replan(draft())

    assert [b.consumed for b in (longer, monthly, lifetime)] == [80, 80, 80]
    assert longer.next_reset_at == NOON + timedelta(hours=24, minutes=20)
    assert monthly.next_reset_at == datetime(2026, 2, 1, tzinfo=UTC)
    assert lifetime.next_reset_at is None


def test_a_changed_schedule_does_not_bring_back_a_period_that_is_over() -> None:
    old = budget("100", interval="1h", consumed=d("80"))

    (new,) = planned(RULE, [draft()], {ASSET: Limit(d("100"), 2)}, [old], NOON + HOUR)

    assert new.consumed == 0


def test_terms_are_the_same_whatever_was_consumed() -> None:
    assert same_terms([budget("1")], [budget("1.00", consumed=d("1"))])
    assert not same_terms([budget("1")], [budget("2")])
    assert not same_terms([budget("1")], [budget("1", interval="1h")])
    assert not same_terms([budget("1")], [])


def test_a_limit_with_many_decimals_is_well_formed() -> None:
    # How many decimals are too many is for the asset to say: then it is invalid_scale.
    assert draft_problems([draft("0." + "0" * 30 + "1")]) == []
