"""Spending in memory: what redeem, reserve and their reversals do to lots, holds and accounts. redemptions.md 1.4, 1.5.

Pure functions over `Books`, without a database.
"""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import movements, spending
from domain.ledger.books import SYSTEM_TYPES, Account, Books
from domain.ledger.lots import Lot, Part
from domain.ledger.movements import Cause, HoldTerms, Position
from domain.ledger.spending import Reserved, Target
from tests.builders import d

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")
PROGRAM = new_id()
ALICE = Position("PARTICIPANT", new_id(), new_id(), has_lots=True)
BOB = Position("PARTICIPANT", new_id(), ALICE.asset_id, has_lots=False)
SHOP = Position("GROUP", new_id(), ALICE.asset_id, has_lots=True)


def new_books() -> Books:
    books = Books()
    books.add(Account(new_id(), kind, None, ALICE.asset_id, "AVAILABLE") for kind in SYSTEM_TYPES)
    return books


def cause(hour: float = 0, reference_id: str | None = None) -> Cause:
    return Cause(new_id(), PROGRAM, NOON + timedelta(hours=hour), reference_id=reference_id)


def credit(books: Books, amount: str, hour: float = 0, position: Position = ALICE, **terms: Any) -> Lot:
    """The holder's new lot."""
    source = books.system("SYSTEM_ISSUANCE", ALICE.asset_id)
    movements.credit(books, position, cause(hour), d(amount), source, **terms)
    return books.lots.opened[-1]


def till(books: Books) -> Target:
    return Target(books.system("SYSTEM_REDEMPTION", ALICE.asset_id))


def shop(books: Books, lot: Lot | None = None) -> Target:
    return Target(SHOP.account(books, "AVAILABLE"), SHOP, lot)


def reserve(books: Books, amount: str, hour: float = 1) -> tuple[HoldTerms, list[Reserved]]:
    terms = HoldTerms(new_id(), NOON + timedelta(days=1), "RELEASE", "WORKFLOW")
    return terms, spending.reserve(books, ALICE, cause(hour, str(terms.hold_id)), d(amount), terms)


def seen(*lots: Lot) -> list[Any]:
    # What is Any compares with plain numbers.
    return [(lot.status, lot.remaining) for lot in lots]


def taken(*parts: Part | Reserved) -> list[Any]:
    """The lots that parts came from, with their amounts."""
    return [(part.lot if isinstance(part, Part) else part.origin, part.amount) for part in parts]


def available(books: Books, position: Position = ALICE) -> Any:
    return books.balance(position.holder_id, position.asset_id, "AVAILABLE")


def held(books: Books) -> Any:
    return books.balance(ALICE.holder_id, ALICE.asset_id, "HELD")


# --- redeem ----------------------------------------------------------------------------------------------------------


def test_redeeming_takes_the_oldest_lots_and_passes_over_what_has_expired_or_has_not_matured() -> None:
    books = new_books()
    expired = credit(books, "10", 0, expires_at=NOON + timedelta(hours=3))
    old = credit(books, "10", 1)
    young = credit(books, "10", 2)
    credit(books, "10", 0.5, matures_at=NOON + timedelta(days=1))

    parts, made = spending.redeem(books, ALICE, cause(3), d("12"), till(books))

    assert taken(*parts) == [(old, 10), (young, 2)]
    assert made is None
    assert seen(expired, old, young) == [("AVAILABLE", 10), ("CONSUMED", 0), ("AVAILABLE", 8)]


@pytest.mark.parametrize("amount", ["20.01", "25"])
def test_redeeming_never_overdraws_nor_spends_what_has_expired(amount: str) -> None:
    books = new_books()
    credit(books, "20")
    credit(books, "5", expires_at=NOON + timedelta(hours=1))

    with pytest.raises(Refusal) as refusal:
        spending.redeem(books, ALICE, cause(1), d(amount), till(books))

    assert refusal.value.code == "insufficient_balance"
    assert available(books) == 25


def test_a_target_with_lots_gets_one_without_expiry() -> None:
    books = new_books()
    credit(books, "10", expires_at=NOON + timedelta(days=1))
    credit(books, "10", 1)

    _, made = spending.redeem(books, ALICE, cause(2), d("15"), shop(books))

    assert made is not None
    assert (made.entity_type, made.entity_id) == ("GROUP", SHOP.holder_id)
    assert (made.amount, made.remaining) == (d("15"), d("15"))
    assert (made.created_at, made.expires_at) == (NOON + timedelta(hours=2), None)


def test_what_a_target_owes_is_taken_of_its_new_lot() -> None:
    books = new_books()
    credit(books, "10")
    movements.debit(books, SHOP, cause(), d("4"), allow_negative=True)

    _, made = spending.redeem(books, ALICE, cause(), d("10"), shop(books))

    assert made is not None
    assert (made.amount, made.remaining, available(books, SHOP)) == (d("10"), d("6"), 6)


def test_a_simple_asset_makes_no_lots() -> None:
    books = new_books()
    movements.credit(books, BOB, cause(), d("10"), books.system("SYSTEM_ISSUANCE", BOB.asset_id))
    carol = Position("PARTICIPANT", new_id(), BOB.asset_id, has_lots=False)

    parts, made = spending.redeem(books, BOB, cause(), d("4"), Target(carol.account(books, "AVAILABLE")))

    assert (parts, made) == ([], None)
    assert (available(books, BOB), available(books, carol)) == (6, 4)


# --- reverse ---------------------------------------------------------------------------------------------------------


def test_a_lot_that_was_used_up_is_available_again_with_its_vintage() -> None:
    books = new_books()
    lot = credit(books, "10", expires_at=NOON + timedelta(days=1))
    spending.redeem(books, ALICE, cause(1), d("10"), till(books))

    spending.reverse(books, ALICE, cause(2), d("4"), till(books), [Part(lot, d("4"))])

    assert seen(lot) == [("AVAILABLE", 4)]
    assert (lot.created_at, lot.expires_at) == (NOON, NOON + timedelta(days=1))
    assert len(books.lots.opened) == 1, "no new lot"


def test_a_lot_that_has_expired_is_refilled_in_full_and_expires_again() -> None:
    books = new_books()
    lot = credit(books, "10", expires_at=NOON + timedelta(hours=2))
    spending.redeem(books, ALICE, cause(1), d("6"), till(books))
    movements.expire_due(books, ALICE, NOON + timedelta(hours=3))
    assert seen(lot) == [("EXPIRED", 0)]

    spending.reverse(books, ALICE, cause(4), d("6"), till(books), [Part(lot, d("6"))])

    assert seen(lot) == [("AVAILABLE", 6)]
    assert available(books) == 6
    assert len(movements.expire_due(books, ALICE, NOON + timedelta(hours=4))) == 1
    assert (seen(lot), available(books)) == ([("EXPIRED", 0)], 0)


def test_a_lot_whose_rest_is_held_gets_its_part_back_as_a_twin() -> None:
    books = new_books()
    lot = credit(books, "10", expires_at=NOON + timedelta(days=1))
    spending.redeem(books, ALICE, cause(1), d("4"), till(books))
    movements.hold(books, ALICE, cause(2), None, HoldTerms(new_id()), ALICE.select("AVAILABLE", NOON))

    spending.reverse(books, ALICE, cause(3), d("4"), till(books), [Part(lot, d("4"))])

    twin = books.lots.opened[-1]
    assert seen(lot, twin) == [("HELD", 6), ("AVAILABLE", 4)]
    assert (twin.created_at, twin.expires_at, twin.hold_id) == (lot.created_at, lot.expires_at, None)


def test_an_overdraft_takes_what_it_is_owed_of_what_comes_back_the_oldest_lot_first() -> None:
    books = new_books()
    old, young = credit(books, "10"), credit(books, "10", 1)
    spending.redeem(books, ALICE, cause(2), d("20"), till(books))
    movements.debit(books, ALICE, cause(3), d("4"), allow_negative=True)

    refills = [Part(young, d("10")), Part(old, d("10"))]
    spending.reverse(books, ALICE, cause(4), d("20"), till(books), refills)

    assert available(books) == 16
    assert seen(old, young) == [("AVAILABLE", 6), ("AVAILABLE", 10)]


def test_a_reversal_that_an_overdraft_swallows_leaves_the_lot_used_up() -> None:
    books = new_books()
    lot = credit(books, "10")
    spending.redeem(books, ALICE, cause(1), d("10"), till(books))
    movements.debit(books, ALICE, cause(2), d("25"), allow_negative=True)

    spending.reverse(books, ALICE, cause(3), d("10"), till(books), [Part(lot, d("10"))])

    assert (seen(lot), available(books)) == ([("CONSUMED", 0)], -15)


def test_a_reversal_takes_the_targets_own_lot_first_then_fifo() -> None:
    books = new_books()
    lot = credit(books, "30")
    older = credit(books, "10", 1, SHOP)
    _, own = spending.redeem(books, ALICE, cause(2), d("10"), shop(books))
    assert own is not None
    credit(books, "10", 3, SHOP)

    spending.reverse(books, ALICE, cause(4), d("4"), shop(books, own), [Part(lot, d("4"))])
    assert seen(older, own) == [("AVAILABLE", 10), ("AVAILABLE", 6)]

    movements.debit(books, SHOP, cause(5), d("12"), allow_negative=False)
    assert seen(older, own) == [("CONSUMED", 0), ("AVAILABLE", 4)]
    spending.reverse(books, ALICE, cause(6), d("6"), shop(books, own), [Part(lot, d("6"))])
    assert seen(own) == [("CONSUMED", 0)]
    assert available(books, SHOP) == 8


def test_a_target_that_has_spent_the_money_goes_below_zero_and_keeps_no_lot() -> None:
    books = new_books()
    lot = credit(books, "10")
    _, own = spending.redeem(books, ALICE, cause(1), d("10"), shop(books))
    movements.debit(books, SHOP, cause(2), d("10"), allow_negative=False)
    expiring = credit(books, "3", 3, SHOP, expires_at=NOON + timedelta(hours=4))
    spendable = credit(books, "2", 3, SHOP)

    spending.reverse(books, ALICE, cause(5), d("10"), shop(books, own), [Part(lot, d("10"))])

    assert available(books) == 10
    assert seen(expiring, spendable) == [("EXPIRED", 0), ("CONSUMED", 0)]
    assert available(books, SHOP) == -8


# --- two steps -------------------------------------------------------------------------------------------------------


def test_reserving_holds_lots_fifo_under_the_redemption() -> None:
    books = new_books()
    old, young = credit(books, "10"), credit(books, "10", 0.5)

    terms, reserved = reserve(books, "14")

    assert taken(*reserved) == [(old, 10), (young, 4)]
    assert [part.held is part.origin for part in reserved] == [True, False]
    assert {(part.held.hold_id, part.held.reference_id) for part in reserved} == {(terms.hold_id, str(terms.hold_id))}
    assert books.holds.get(terms.hold_id).kind == "REDEMPTION"
    assert (available(books), held(books)) == (6, 14)


def test_what_goes_back_goes_into_the_lots_it_came_from() -> None:
    books = new_books()
    old, young = credit(books, "10"), credit(books, "10", 0.5)
    terms, reserved = reserve(books, "14")

    spending.give_back_reserved(books, ALICE, cause(2), d("14"), terms.hold_id, reserved, "RELEASED")

    assert seen(old, young, reserved[1].held) == [("AVAILABLE", 10), ("AVAILABLE", 10), ("CONSUMED", 0)]
    assert (old.reference_id, old.hold_id) == (None, None)
    assert books.holds.get(terms.hold_id).status == "RELEASED"
    assert (available(books), held(books)) == (20, 0)


@pytest.mark.parametrize("fate", ["consumed", "expired", "held"])
def test_what_goes_back_finds_its_place_whatever_became_of_the_lot(fate: str) -> None:
    books = new_books()
    lot = credit(books, "10", expires_at=NOON + timedelta(hours=2))
    terms, reserved = reserve(books, "4")
    if fate == "consumed":
        movements.debit(books, ALICE, cause(1), d("6"), allow_negative=False)
    elif fate == "expired":
        movements.expire_due(books, ALICE, NOON + timedelta(hours=3))
    else:
        movements.hold(books, ALICE, cause(1), None, HoldTerms(new_id()), ALICE.select("AVAILABLE", NOON))

    spending.give_back_reserved(books, ALICE, cause(4), d("4"), terms.hold_id, reserved, "EXPIRED")

    own = reserved[0].held
    expected = [("HELD", 6), ("AVAILABLE", 4)] if fate == "held" else [("AVAILABLE", 4), ("CONSUMED", 0)]
    assert seen(lot, own) == expected
    assert available(books) == 4


def test_an_overdraft_takes_what_it_is_owed_of_what_goes_back() -> None:
    books = new_books()
    lot = credit(books, "10")
    terms, reserved = reserve(books, "10")
    movements.debit(books, ALICE, cause(2), d("3"), allow_negative=True)

    spending.give_back_reserved(books, ALICE, cause(3), d("10"), terms.hold_id, reserved, "RELEASED")

    assert (seen(lot), available(books)) == ([("AVAILABLE", 7)], 7)


def test_a_part_is_taken_fifo_and_the_rest_goes_back() -> None:
    books = new_books()
    old, young, third = credit(books, "10"), credit(books, "10", 0.2), credit(books, "10", 0.4)
    terms, reserved = reserve(books, "25")
    taken, rest = spending.split(reserved, d("14"))

    spending.take_reserved(books, ALICE, cause(2), d("14"), terms.hold_id, taken, till(books))
    spending.give_back_reserved(books, ALICE, cause(2), d("11"), terms.hold_id, rest, "SETTLED")

    assert seen(old, young, third) == [("CONSUMED", 0), ("AVAILABLE", 6), ("AVAILABLE", 10)]
    assert books.holds.get(terms.hold_id).status == "SETTLED"
    assert (available(books), held(books)) == (16, 0)


def test_a_confirmed_lot_is_refilled_without_its_hold_and_reference() -> None:
    books = new_books()
    lot = credit(books, "10")
    terms, reserved = reserve(books, "10")
    spending.take_reserved(books, ALICE, cause(2), d("10"), terms.hold_id, reserved, till(books))

    spending.reverse(books, ALICE, cause(3), d("10"), till(books), [Part(lot, d("10"))])

    assert seen(lot) == [("AVAILABLE", 10)]
    assert (lot.hold_id, lot.reference_id) == (None, None)


def test_generic_operations_pass_over_what_is_reserved() -> None:
    books = new_books()
    movements.credit(books, BOB, cause(), d("10"), books.system("SYSTEM_ISSUANCE", BOB.asset_id))
    terms = HoldTerms(new_id(), NOON + timedelta(days=1), "RELEASE", "WORKFLOW")
    spending.reserve(books, BOB, cause(), d("6"), terms)
    movements.hold(books, BOB, cause(1), d("3"), HoldTerms(new_id()), BOB.select("AVAILABLE", NOON))

    with pytest.raises(Refusal):
        movements.debit_held(books, BOB, cause(2), d("4"))
    movements.release(books, BOB, cause(3), None, BOB.select("HELD", NOON))

    assert books.balance(BOB.holder_id, BOB.asset_id, "HELD") == 6
    assert books.holds.get(terms.hold_id).remaining == 6


# --- splitting and undoing -------------------------------------------------------------------------------------------

AMOUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(lots=AMOUNTS, share=st.integers(1, 100))
def test_a_split_loses_nothing_and_keeps_the_order(lots: list[int], share: int) -> None:
    books = new_books()
    for hour, amount in enumerate(lots):
        credit(books, str(amount), hour / 10)
    _, reserved = reserve(books, str(sum(lots)))
    first, rest = spending.split(reserved, min(Decimal(share), Decimal(sum(lots))))

    assert sum(part.amount for part in first) == min(share, sum(lots))
    assert sum(part.amount for part in [*first, *rest]) == sum(lots)
    joined = [part.held for part in first] + [part.held for part in rest if part.held not in [p.held for p in first]]
    assert joined == [part.held for part in reserved]
    assert all(part.amount > 0 for part in [*first, *rest])


@given(lots=AMOUNTS, data=st.data())
def test_redeeming_and_reversing_in_parts_restores_every_lot(lots: list[int], data: st.DataObject) -> None:
    books = new_books()
    made = [credit(books, str(amount), hour) for hour, amount in enumerate(lots)]
    amount = data.draw(st.integers(1, sum(lots)))
    parts, _ = spending.redeem(books, ALICE, cause(9), Decimal(amount), till(books))
    left = [Part(part.lot, part.amount) for part in reversed(parts)]
    while left:
        share = min(left[0].amount, Decimal(data.draw(st.integers(1, 9))))
        spending.reverse(books, ALICE, cause(10), share, till(books), [Part(left[0].lot, share)])
        rest = left[0].amount - share
        left = ([Part(left[0].lot, rest)] if rest else []) + left[1:]

    assert seen(*made) == [("AVAILABLE", Decimal(amount)) for amount in lots]
    assert available(books) == sum(lots)


def test_undoing_leaves_no_trace() -> None:
    books = new_books()
    lot = credit(books, "10")
    before = seen(lot), available(books), held(books), len(books.entries)
    mark = books.mark()
    terms, reserved = reserve(books, "7")
    taken, rest = spending.split(reserved, d("3"))
    spending.take_reserved(books, ALICE, cause(), d("3"), terms.hold_id, taken, shop(books))
    spending.give_back_reserved(books, ALICE, cause(), d("4"), terms.hold_id, rest, "SETTLED")
    spending.reverse(books, ALICE, cause(), d("3"), shop(books), [Part(lot, d("3"))])
    assert available(books) == 10

    books.undo(mark)

    assert (seen(lot), available(books), held(books), len(books.entries)) == before
    assert not books.holds.has(terms.hold_id)
