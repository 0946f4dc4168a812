"""The books in memory: what is posted shows at once, what is undone leaves no trace."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger.books import SYSTEM_TYPES, Account, Books, require
from tests.builders import d

ASSET = new_id()
PROGRAM = new_id()
HOLDERS = [new_id() for _ in range(3)]
AMOUNTS = st.decimals(min_value="0.000000000000000001", max_value="99999999999999999999", places=18)


def new_books() -> Books:
    books = Books()
    books.add(Account(new_id(), kind, None, ASSET, "AVAILABLE") for kind in SYSTEM_TYPES)
    return books


def credit(books: Books, holder: int, amount: Decimal) -> None:
    account = books.account("PARTICIPANT", HOLDERS[holder], ASSET, "AVAILABLE")
    source = books.system("SYSTEM_ISSUANCE", ASSET)
    books.post("CREDIT", [(source, amount.copy_negate()), (account, amount)], program_id=PROGRAM)


def state(books: Books) -> dict[object, tuple[int, Decimal]]:
    """What anyone can see of the accounts; one that was never posted to is as good as absent."""
    return {key: (a.version, a.balance) for key, a in books.accounts.items() if a.version or a.balance}


def test_a_posting_shows_at_once() -> None:
    books = new_books()

    credit(books, 0, d("10"))
    credit(books, 0, d("2.5"))

    assert books.balance(HOLDERS[0], ASSET, "AVAILABLE") == d("12.5")
    assert [line.balance for entry in books.entries for line in entry.lines] == [None, d("10"), None, d("12.5")]
    assert [line.version for entry in books.entries for line in entry.lines] == [None, 1, None, 2]


@given(
    kept=st.lists(st.tuples(st.integers(0, 2), AMOUNTS), max_size=8),
    undone=st.lists(st.tuples(st.integers(0, 2), AMOUNTS), max_size=8),
)
def test_undo_leaves_no_trace(kept: list[tuple[int, Decimal]], undone: list[tuple[int, Decimal]]) -> None:
    books = new_books()
    for holder, amount in kept:
        credit(books, holder, amount)
    before, entries = state(books), list(books.entries)

    mark = books.mark()
    for holder, amount in undone:
        credit(books, holder, amount)
    books.undo(mark)

    assert state(books) == before
    assert books.entries == entries


@given(st.lists(AMOUNTS, min_size=1, max_size=20))
def test_balances_are_exact_sums(amounts: list[Decimal]) -> None:
    books = new_books()
    for amount in amounts:
        credit(books, 0, amount)

    assert books.balance(HOLDERS[0], ASSET, "AVAILABLE") == exact_sum(amounts)


def exact_sum(amounts: list[Decimal]) -> Decimal:
    total = sum(int(f"{amount:.18f}".replace(".", "")) for amount in amounts)
    return Decimal(f"{total}E-18")


def test_an_entry_must_sum_to_zero() -> None:
    books = new_books()
    account = books.account("PARTICIPANT", HOLDERS[0], ASSET, "AVAILABLE")
    issuance = books.system("SYSTEM_ISSUANCE", ASSET)

    with pytest.raises(AssertionError, match="sum to zero"):
        books.post("CREDIT", [(issuance, d("-1")), (account, d("2"))], program_id=PROGRAM)


def test_what_is_short_is_refused() -> None:
    require(d("10.00"), d("10"))
    with pytest.raises(Refusal) as refused:
        require(d("9.99"), d("10"))
    assert refused.value.code == "insufficient_balance"
