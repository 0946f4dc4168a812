"""Lots and holds in memory: what an operation takes and makes, and that undoing it leaves no trace. holders.md 6 and 7.

Pure functions over `Books`, without a database: what a batch of events relies on when one of them fails half way.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.books import SYSTEM_TYPES, Account, Books
from domain.ledger.lots import Lot, Selection
from domain.ledger.movements import Cause, HoldTerms, Position
from tests.builders import d

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")
PROGRAM = new_id()
ALICE = Position("PARTICIPANT", new_id(), new_id(), has_lots=True)
BOB = Position("PARTICIPANT", new_id(), ALICE.asset_id, has_lots=False)
CAROL = Position("GROUP", new_id(), ALICE.asset_id, has_lots=True)


def new_books() -> Books:
    books = Books()
    books.add(Account(new_id(), kind, None, ALICE.asset_id, "AVAILABLE") for kind in SYSTEM_TYPES)
    return books


def cause(hour: int = 0, reference_id: str | None = None) -> Cause:
    return Cause(new_id(), PROGRAM, NOON + timedelta(hours=hour), reference_id=reference_id)


def issuance(books: Books) -> Account:
    return books.system("SYSTEM_ISSUANCE", ALICE.asset_id)


def credit(books: Books, amount: str, hour: int = 0, **terms: Any) -> Lot:
    """Alice's new lot."""
    movements.credit(books, ALICE, cause(hour), d(amount), issuance(books), **terms)
    return books.lots.opened[-1]


def hold_all(books: Books, amount: str | None, hour: int = 0) -> list[tuple[Lot, Decimal]]:
    terms = HoldTerms(new_id())
    at = cause(hour, "auth1")
    wanted = None if amount is None else d(amount)
    _, parts = movements.hold(books, ALICE, at, wanted, terms, ALICE.select("AVAILABLE", at.now))
    return [(part.lot, part.amount) for part in parts]


def test_lots_of_one_instant_are_taken_in_the_order_of_their_ids() -> None:
    books = new_books()
    lots = [credit(books, "1") for _ in range(5)]

    parts = books.lots.take(ALICE.select("AVAILABLE", NOON), d("3"))

    assert [part.lot for part in parts] == sorted(lots)[:3]


def test_a_lot_that_was_loaded_keeps_what_was_done_to_it() -> None:
    books = new_books()
    as_stored = replace(credit(books, "10"))
    movements.debit(books, ALICE, cause(), d("4"), allow_negative=False)

    books.lots.add([as_stored])

    assert [part.amount for part in books.lots.take(ALICE.select("AVAILABLE", NOON), None)] == [6]


def test_taking_changes_nothing() -> None:
    books = new_books()
    credit(books, "10")
    before = seen(books)

    books.lots.take(ALICE.select("AVAILABLE", NOON), d("4"))

    assert seen(books) == before


def test_a_lot_expires_at_its_very_instant() -> None:
    books = new_books()
    credit(books, "10", expires_at=NOON + timedelta(hours=1))

    just_before = ALICE.select("AVAILABLE", NOON + timedelta(hours=1) - timedelta(microseconds=1))
    at_once = ALICE.select("AVAILABLE", NOON + timedelta(hours=1))

    assert [len(list(books.lots.matching(selection))) for selection in (just_before, at_once)] == [1, 0]


def test_a_maturity_of_now_is_none() -> None:
    books = new_books()

    assert credit(books, "10", matures_at=NOON).status == "AVAILABLE"
    assert credit(books, "10", matures_at=NOON + timedelta(microseconds=1)).status == "DEFERRED"


def test_a_chain_of_splits_keeps_vintage_and_sum() -> None:
    books = new_books()
    origin = credit(books, "10", expires_at=NOON + timedelta(days=9))
    for hour, amount in enumerate(("7", "3", "2"), start=1):
        hold_all(books, amount, hour)
        movements.release(books, ALICE, cause(hour), d("1"), ALICE.select("HELD", NOON))

    assert books.balance(ALICE.holder_id, ALICE.asset_id, "AVAILABLE") == 1
    assert {(lot.created_at, lot.expires_at) for lot in books.lots.opened} == {(NOON, origin.expires_at)}
    assert sum(lot.remaining for lot in books.lots.opened) == 10


def test_expiries_are_one_entry_per_lot() -> None:
    books = new_books()
    for hour in range(3):
        credit(books, "10", hour, expires_at=NOON + timedelta(hours=5))

    entries = movements.expire_due(books, ALICE, NOON + timedelta(hours=5))

    assert [entry.action_type for entry in entries] == ["EXPIRY"] * 3
    assert movements.expire_due(books, ALICE, NOON + timedelta(hours=6)) == []
    assert books.balance(ALICE.holder_id, ALICE.asset_id, "AVAILABLE") == 0


def test_a_transfer_is_one_entry_with_a_posting_and_a_lot_per_share() -> None:
    books = new_books()
    old, young = credit(books, "4"), credit(books, "10", hour=1)

    entry = movements.transfer(books, ALICE, cause(2), [(CAROL, d("3")), (CAROL, d("2"))])

    assert [(line.account.entity_id, line.amount) for line in entry.lines] == [
        (ALICE.holder_id, d("-5")),
        (CAROL.holder_id, d("3")),
        (CAROL.holder_id, d("2")),
    ]
    assert (old.status, young.status, young.remaining) == ("CONSUMED", "AVAILABLE", d("9"))
    for lot, amount in zip(books.lots.opened[-2:], (d("3"), d("2")), strict=True):
        assert (lot.entity_type, lot.amount, lot.remaining) == ("GROUP", amount, amount)
        assert (lot.created_at, lot.expires_at, lot.entry_id) == (NOON + timedelta(hours=2), None, entry.id)


def test_shares_repay_an_overdraft_one_after_the_other() -> None:
    books = new_books()
    credit(books, "20")
    movements.debit(books, CAROL, cause(), d("7"), allow_negative=True)

    movements.transfer(books, ALICE, cause(), [(CAROL, d("5")), (CAROL, d("5")), (CAROL, d("5"))])

    assert [lot.remaining for lot in books.lots.opened[-3:]] == [d("0"), d("3"), d("5")]
    assert books.balance(CAROL.holder_id, CAROL.asset_id, "AVAILABLE") == 8


def test_a_transfer_between_simple_holdings_makes_no_lots() -> None:
    books = new_books()
    dave = replace(BOB, holder_id=new_id())
    movements.credit(books, BOB, cause(), d("5"), issuance(books))

    movements.transfer(books, BOB, cause(), [(dave, d("5"))])

    assert books.lots.opened == []
    assert books.balance(dave.holder_id, dave.asset_id, "AVAILABLE") == 5


def test_what_is_refused_leaves_no_trace() -> None:
    books = new_books()
    credit(books, "10", expires_at=NOON + timedelta(hours=1))
    before = seen(books)
    everything = ALICE.select("HELD", NOON)

    for refused in (
        lambda: movements.debit(books, ALICE, cause(), d("10.01"), allow_negative=False),
        lambda: movements.debit(books, ALICE, cause(2), d("1"), allow_negative=False),
        lambda: movements.debit_held(books, ALICE, cause(), d("1")),
        lambda: hold_all(books, "10.01"),
        lambda: hold_all(books, None, 2),
        lambda: movements.release(books, ALICE, cause(), None, everything),
        lambda: movements.forfeit(books, ALICE, cause(), d("11"), ALICE.select("AVAILABLE", NOON)),
        lambda: movements.forfeit_held(books, ALICE, cause(), None, everything),
        lambda: movements.void_hold(books, ALICE, cause(), everything, {}),
        lambda: movements.release(books, BOB, cause(), d("1"), BOB.select("HELD", NOON)),
        lambda: movements.transfer(books, ALICE, cause(), [(CAROL, d("5")), (CAROL, d("5.01"))]),
        lambda: movements.transfer(books, ALICE, cause(2), [(CAROL, d("1"))]),
        lambda: movements.transfer(books, BOB, cause(), [(CAROL, d("1"))]),
    ):
        with pytest.raises(Refusal) as refusal:
            refused()
        assert refusal.value.code == "insufficient_balance"
        assert seen(books) == before


def test_a_settle_that_the_wallet_cannot_pay_leaves_no_trace() -> None:
    books = new_books()
    wallet = books.account("PROGRAM", PROGRAM, ALICE.asset_id, "AVAILABLE")
    books.post("FUND", [(issuance(books), d("-10")), (wallet, d("10"))], program_id=PROGRAM)
    movements.credit_held(books, ALICE, cause(0, "auth1"), d("10"), wallet, HoldTerms(new_id()))
    selection = ALICE.select("HELD", NOON, reference_id="auth1", only_provisional=True)
    before = seen(books)

    with pytest.raises(Refusal) as refused:
        movements.settle(books, ALICE, cause(), d("10.01"), wallet, selection, {PROGRAM: wallet})

    assert refused.value.code == "insufficient_program_balance"
    assert seen(books) == before


# --- Undo ------------------------------------------------------------------------------------------------------------

Step = Callable[[Books, Decimal, int], object]


def _void(books: Books, amount: Decimal, hour: int) -> object:
    selection = ALICE.select("HELD", NOON, reference_id="auth2", only_provisional=True)
    return movements.void_hold(books, ALICE, cause(hour), selection, {PROGRAM: issuance(books)})


def _settle(books: Books, amount: Decimal, hour: int) -> object:
    selection = ALICE.select("HELD", NOON, reference_id="auth2", only_provisional=True)
    sources = {PROGRAM: issuance(books)}
    return movements.settle(books, ALICE, cause(hour), amount, issuance(books), selection, sources)


def _mature(books: Books, amount: Decimal, hour: int) -> object:
    deferred = list(books.lots.matching(Selection(ALICE.holder_id, ALICE.asset_id, "DEFERRED")))
    return [movements.mature(books, ALICE, lot, NOON + timedelta(hours=hour)) for lot in deferred]


STEPS: list[Step] = [
    lambda b, x, h: credit(b, str(x), h),
    lambda b, x, h: credit(b, str(x), h, expires_at=NOON + timedelta(hours=h + 2)),
    lambda b, x, h: credit(b, str(x), h, matures_at=NOON + timedelta(hours=h + 2)),
    lambda b, x, h: movements.credit_held(b, ALICE, cause(h, "auth2"), x, issuance(b), HoldTerms(new_id())),
    lambda b, x, h: movements.debit(b, ALICE, cause(h), x, allow_negative=False),
    lambda b, x, h: movements.debit(b, ALICE, cause(h), x, allow_negative=True),
    lambda b, x, h: movements.debit_held(b, ALICE, cause(h), x),
    lambda b, x, h: hold_all(b, str(x), h),
    lambda b, x, h: movements.release(b, ALICE, cause(h), x, ALICE.select("HELD", NOON)),
    lambda b, x, h: movements.forfeit(b, ALICE, cause(h), x, ALICE.select("AVAILABLE", NOON)),
    lambda b, x, h: movements.forfeit_held(b, ALICE, cause(h), x, ALICE.select("HELD", NOON)),
    lambda b, x, h: movements.expire_due(b, ALICE, NOON + timedelta(hours=h)),
    _void,
    _settle,
    _mature,
    lambda b, x, h: movements.credit_held(b, BOB, cause(h), x, issuance(b), HoldTerms(new_id())),
    lambda b, x, h: movements.release(b, BOB, cause(h), x, BOB.select("HELD", NOON)),
    lambda b, x, h: movements.transfer(b, ALICE, cause(h), [(CAROL, x), (CAROL, x)]),
    lambda b, x, h: movements.transfer(b, CAROL, cause(h), [(ALICE, x)]),
    lambda b, x, h: movements.debit(b, CAROL, cause(h), x, allow_negative=True),
]
PLANS = st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([d("1"), d("2.5"), d("10")])), max_size=14)


@given(kept=PLANS, undone=PLANS, after=PLANS)
def test_undo_leaves_no_trace_in_lots_and_holds(
    kept: list[tuple[Step, Decimal]], undone: list[tuple[Step, Decimal]], after: list[tuple[Step, Decimal]]
) -> None:
    books = new_books()
    do(books, kept, 0)
    before = seen(books)

    mark = books.mark()
    do(books, undone, len(kept))
    books.undo(mark)

    assert seen(books) == before
    do(books, after, len(kept))
    assert_lots_make_the_buckets(books)


def do(books: Books, plan: list[tuple[Step, Decimal]], hour: int) -> None:
    """The steps that can be done, an hour apart."""
    for number, (step, amount) in enumerate(plan, start=hour):
        try:
            step(books, amount, number)
        except Refusal:
            continue


def seen(books: Books) -> tuple[Any, ...]:
    """Everything that would be written, and everything that later operations would find."""
    lots = books.lots
    return (
        [entry.id for entry in books.entries],
        {key: (a.version, a.balance) for key, a in books.accounts.items() if a.version or a.balance},
        [(lot.id, lot.remaining, lot.status, lot.reference_id, lot.hold_id, lot.is_provisional) for lot in lots.opened],
        [(change.entry_id, change.lot.id, change.delta, change.status) for change in lots.changes],
        [
            lot.id
            for holder in (ALICE, CAROL)
            for status in ("AVAILABLE", "HELD")
            for lot in lots.matching(Selection(holder.holder_id, holder.asset_id, status))
        ],
        [(hold.id, hold.remaining, hold.status) for hold in books.holds.opened],
        [(change.entry_id, change.hold.id, change.delta, change.status) for change in books.holds.changes],
    )


def assert_lots_make_the_buckets(books: Books) -> None:
    for holder in (ALICE, CAROL):
        for status in ("AVAILABLE", "HELD", "DEFERRED"):
            lots = books.lots.matching(Selection(holder.holder_id, holder.asset_id, status))
            total = sum((lot.remaining for lot in lots), d("0"))
            balance = books.balance(holder.holder_id, holder.asset_id, status)
            assert total == max(balance, d("0"))
    for position in (ALICE, BOB):
        held = sum((hold.remaining for hold in books.holds.opened if hold.entity_id == position.holder_id), d("0"))
        assert held == books.balance(position.holder_id, position.asset_id, "HELD")
