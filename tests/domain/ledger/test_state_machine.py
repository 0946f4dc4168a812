"""The ledger does what a ledger in plain Python does, whatever operations meet in whatever order.

Goal: no sequence of operations on lots, holds, wallets and overdrafts may end where the contract doesn't say. Method: a
Hypothesis state machine drives the real ledger on Postgres and `reference.py`, one operation after another on a SIMPLE
or LOT, UNLIMITED or PREFUNDED asset with a participant, a group and two programs. After every operation both must have
refused it with the same code or must show the same buckets, lots, holds and wallets; after every run the invariants of
every ledger must hold. Contract: holders.md 6, 7, 8.2, redemptions.md 5.2.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from db.session import Database
from domain.balances import Holder
from domain.errors import Refusal
from domain.ledger.journal import load_accounts
from domain.upkeep import sweep
from tests.builders import make_asset, make_group, make_participant, make_program
from tests.conftest import SettableClock, Tenant
from tests.domain.ledger.reference import ANY, Choice, Reference, RefHold, RefHolder, Refused
from tests.holdings_support import Desk
from tests.ledger_invariants import assert_ledger_invariants

START = datetime.fromisoformat("2025-01-15T12:00:00+00:00")
TICK = timedelta(seconds=1)
HOUR = timedelta(hours=1)

# Most choices narrow nothing: operations that find something to do lead further than ones that are refused.
AMOUNTS = st.sampled_from(["0.01", "1", "2.5", "5", "7", "10", "25"])
SMALL = st.sampled_from([None, None, "0.01", "1", "2.5", "5", "12"])
REFERENCES = st.sampled_from(["auth1", "auth2"])
MAYBE_REFERENCES = st.sampled_from(["auth1", "auth1", "auth2", None])
NARROWING_REFERENCES = st.sampled_from([None, None, None, "auth1", "auth1", "auth2"])
HOLDERS = st.sampled_from([0, 0, 1])
PROGRAMS = st.integers(0, 1)
LATER = st.sampled_from([None, None, None, 1, 3, 6])
# Which lots, as positions in the list of all there are; and a span of hours in which they were earned.
PICKS = st.sampled_from([None, None, None, None, None, [0, 1], [1, 2, 3], [0, 2, 5, 7]])
SPANS = st.sampled_from([None, None, None, None, None, (0, 1), (1, 9), (3, 4)])


class Bench:
    """What all runs share: an event loop, a connection, a clock."""

    def __init__(self, url: str, new_organization: Callable[[], Tenant]) -> None:
        self.clock = SettableClock()
        self.new_organization = new_organization
        self.database = Database(url, size=1, timeout_s=5, clock=self.clock)
        self._loop = asyncio.new_event_loop()
        self.run(self.database.open())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.database.close())
        self._loop.close()


class LedgerMachine(RuleBasedStateMachine):
    """The real ledger and the reference, side by side."""

    bench: ClassVar[Bench]

    def __init__(self) -> None:
        super().__init__()
        self.organization = self.bench.new_organization()
        self.bench.clock.set(START)

    @initialize(
        mode=st.sampled_from(["LOT", "LOT", "LOT", "SIMPLE"]), policy=st.sampled_from(["UNLIMITED", "PREFUNDED"])
    )
    def open(self, mode: str, policy: str) -> None:
        self.has_lots, prefunded = mode == "LOT", policy == "PREFUNDED"
        self.reference = Reference(self.has_lots, prefunded, START, [RefHolder(), RefHolder()], [Decimal(0)] * 2)
        self.bench.run(self._open(mode, policy))
        if prefunded:
            for program in range(2):
                self.fund(program, "25")

    async def _open(self, mode: str, policy: str) -> None:
        async with self.bench.database.transaction(self.organization.id) as tx:
            self.programs = [await make_program(tx) for _ in range(2)]
            self.asset_id = await make_asset(tx, *self.programs, inventory_mode=mode, issuance_policy=policy)
            self.holders = [
                Holder("PARTICIPANT", await make_participant(tx)),
                Holder("GROUP", await make_group(tx)),
            ]

    # --- adjust ---

    @rule(holder=HOLDERS, program=PROGRAMS, amount=AMOUNTS, bucket=st.sampled_from(["AVAILABLE", "AVAILABLE", "HELD"]))
    def adjust_credit(self, holder: int, program: int, amount: str, bucket: Any) -> None:
        model, value = self.reference.holders[holder], Decimal(amount)
        self.compare(
            self.desk(holder, program).credit(amount, bucket=bucket),
            lambda: (
                self.reference.credit_held(model, program, value)
                if bucket == "HELD"
                else self.reference.credit(model, program, value)
            ),
        )

    @rule(holder=HOLDERS, program=PROGRAMS, amount=AMOUNTS, allow_negative=st.booleans())
    def adjust_debit(self, holder: int, program: int, amount: str, allow_negative: bool) -> None:
        model, value = self.reference.holders[holder], Decimal(amount)
        self.compare(
            self.desk(holder, program).debit(amount, allow_negative=allow_negative),
            lambda: self.reference.debit(model, value, allow_negative=allow_negative),
        )

    @precondition(lambda self: any(holder.holds for holder in self.reference.holders))
    @rule(holder=HOLDERS, amount=st.sampled_from(["0.01", "1", "6"]))
    def adjust_debit_held(self, holder: int, amount: str) -> None:
        model, value = self.reference.holders[holder], Decimal(amount)
        self.compare(self.desk(holder).debit(amount, bucket="HELD"), lambda: self.reference.debit_held(model, value))

    # --- hold, release, forfeit, void ---

    @rule(
        holder=HOLDERS,
        program=PROGRAMS,
        amount=SMALL,
        reference=MAYBE_REFERENCES,
        picks=PICKS,
        span=SPANS,
        ends_in=LATER,
        on_expiry=st.sampled_from(["RELEASE", "FORFEIT"]),
    )
    def hold(
        self,
        holder: int,
        program: int,
        amount: str | None,
        reference: str | None,
        picks: list[int] | None,
        span: tuple[int, int] | None,
        ends_in: int | None,
        on_expiry: str,
    ) -> None:
        model, reference = self.reference.holders[holder], reference if self.has_lots else None
        choice, fields = self.choose(holder, None, picks, span)
        end: dict[str, Any] = {}
        if ends_in is not None:
            end = {"expires_in": ends_in * HOUR, "on_expiry": on_expiry}
        ends_at = None if ends_in is None else self.reference.now + TICK + ends_in * HOUR
        self.compare(
            self.desk(holder, program).hold(amount, **{**fields, "reference_id": reference}, **end),
            lambda: self.reference.hold(
                model, program, number(amount), reference, choice, ends_at, on_expiry if end else None
            ),
        )

    @precondition(lambda self: any(holder.holds for holder in self.reference.holders))
    @rule(holder=HOLDERS, amount=SMALL, reference=NARROWING_REFERENCES, picks=PICKS, span=SPANS)
    def release(
        self,
        holder: int,
        amount: str | None,
        reference: str | None,
        picks: list[int] | None,
        span: tuple[int, int] | None,
    ) -> None:
        model = self.reference.holders[holder]
        choice, fields = self.choose(holder, reference, picks, span)
        self.compare(
            self.desk(holder).release(amount, **fields), lambda: self.reference.release(model, number(amount), choice)
        )

    @rule(
        holder=HOLDERS,
        bucket=st.sampled_from(["AVAILABLE", "HELD"]),
        amount=SMALL,
        reference=NARROWING_REFERENCES,
        picks=PICKS,
        span=SPANS,
    )
    def forfeit(
        self,
        holder: int,
        bucket: str,
        amount: str | None,
        reference: str | None,
        picks: list[int] | None,
        span: tuple[int, int] | None,
    ) -> None:
        model = self.reference.holders[holder]
        choice, fields = self.choose(holder, reference, picks, span)
        self.compare(
            self.desk(holder).forfeit(amount, bucket=bucket, **fields),
            lambda: self.reference.forfeit(model, bucket, number(amount), choice),
        )

    @precondition(lambda self: any(lot.provisional for holder in self.reference.holders for lot in holder.lots))
    @rule(holder=HOLDERS, program=PROGRAMS, reference=REFERENCES)
    def void(self, holder: int, program: int, reference: str) -> None:
        model = self.reference.holders[holder]
        self.compare(self.desk(holder, program).void(reference), lambda: self.reference.void(model, reference))

    @precondition(lambda self: any(holder.holds for holder in self.reference.holders))
    @rule(which=st.integers(0, 30), operation=st.sampled_from(["RELEASE", "FORFEIT"]), amount=SMALL)
    def end_by_id(self, which: int, operation: Any, amount: str | None) -> None:
        holder = 0 if self.reference.holders[0].holds else 1
        model = self.reference.holders[holder]
        position = which % len(model.holds)
        desk = self.desk(holder)
        hold_id = self.bench.run(desk.hold_rows())[position]["id"]
        hold = in_order(model.holds)[position]
        self.compare(
            desk.end(hold_id, operation, amount), lambda: self.reference.end(model, hold, operation, number(amount))
        )

    # --- transfers, from one to the other ---

    @rule(source=HOLDERS, program=PROGRAMS, amounts=st.lists(AMOUNTS, min_size=1, max_size=3))
    def transfer(self, source: int, program: int, amounts: list[str]) -> None:
        recipient = 1 - source
        self.compare(
            self.desk(source, program).transfer(self.holders[recipient], *amounts),
            lambda: self.reference.transfer(
                self.reference.holders[source],
                program,
                [(self.reference.holders[recipient], Decimal(amount)) for amount in amounts],
            ),
        )

    # --- what rules do ---

    @rule(holder=HOLDERS, program=PROGRAMS, amount=AMOUNTS, expires_in=LATER, matures_in=LATER)
    def grant(self, holder: int, program: int, amount: str, expires_in: int | None, matures_in: int | None) -> None:
        model, terms = self.reference.holders[holder], self.terms(expires_in, matures_in)
        self.compare(
            self.desk(holder, program).grant(amount, **terms),
            lambda: self.reference.credit(model, program, Decimal(amount), **terms),
        )

    @precondition(lambda self: self.has_lots)
    @rule(holder=HOLDERS, program=PROGRAMS, amount=AMOUNTS, reference=MAYBE_REFERENCES, expires_in=LATER)
    def provision(self, holder: int, program: int, amount: str, reference: str | None, expires_in: int | None) -> None:
        model, expires_at = self.reference.holders[holder], self.terms(expires_in, None).get("expires_at")
        self.compare(
            self.desk(holder, program).provision(amount, reference, expires_at),
            lambda: self.reference.credit_held(model, program, Decimal(amount), reference, expires_at),
        )

    @precondition(lambda self: self.has_lots)
    @rule(holder=HOLDERS, program=PROGRAMS, amount=AMOUNTS, reference=REFERENCES, expires_in=LATER, matures_in=LATER)
    def settle(
        self,
        holder: int,
        program: int,
        amount: str,
        reference: str,
        expires_in: int | None,
        matures_in: int | None,
    ) -> None:
        model, terms = self.reference.holders[holder], self.terms(expires_in, matures_in)
        self.compare(
            self.desk(holder, program).settle(amount, reference, **terms),
            lambda: self.reference.settle(model, program, Decimal(amount), reference, **terms),
        )

    # --- wallets and time ---

    @precondition(lambda self: self.reference.prefunded)
    @rule(program=PROGRAMS, amount=AMOUNTS)
    def fund(self, program: int, amount: str) -> None:
        self.compare(self.desk(0, program).fund(amount), lambda: self.reference.fund(program, Decimal(amount)))

    @precondition(lambda self: self.reference.prefunded)
    @rule(program=PROGRAMS, amount=AMOUNTS)
    def burn(self, program: int, amount: str) -> None:
        self.compare(self.desk(0, program).burn(amount), lambda: self.reference.burn(program, Decimal(amount)))

    @rule(hours=st.integers(1, 4))
    def wait(self, hours: int) -> None:
        self.reference.now += hours * HOUR
        self.bench.clock.set(self.reference.now)

    @rule(hours=st.integers(0, 4))
    def upkeep(self, hours: int) -> None:
        self.wait(hours)
        self.compare(sweep(self.bench.database, self.organization.id), self.reference.sweep)

    # --- comparing ---

    @invariant()
    def both_show_the_same(self) -> None:
        if hasattr(self, "reference"):
            self.bench.run(self._assert_same())

    def teardown(self) -> None:
        self.bench.run(self._assert_sound())

    async def _assert_same(self) -> None:
        model = self.reference
        async with self.bench.database.transaction(self.organization.id) as tx:
            entities = [*self.programs, *(holder.id for holder in self.holders)]
            books = await load_accounts(tx, entities, [self.asset_id])
        for wallet, program_id in zip(model.wallets, self.programs, strict=True):
            assert books.balance(program_id, self.asset_id, "AVAILABLE") == wallet
        for number, (holder, expected) in enumerate(zip(self.holders, model.holders, strict=True)):
            shown = tuple(books.balance(holder.id, self.asset_id, b) for b in ("AVAILABLE", "HELD", "DEFERRED"))
            assert shown == model.buckets(expected)
            desk = self.desk(number)
            assert [lot_of(row) for row in await desk.lot_rows()] == [vars_of(lot) for lot in model.fifo(expected)]
            assert [hold_of(row) for row in await desk.hold_rows()] == [
                (hold.status, hold.amount, hold.remaining, hold.ends_at) for hold in in_order(expected.holds)
            ]

    async def _assert_sound(self) -> None:
        async with self.bench.database.transaction(self.organization.id) as tx:
            await assert_ledger_invariants(tx.connection, self.organization.id)
            if not hasattr(self, "reference"):
                return
            rows = await tx.rows(
                "select a.entity_type, sum(p.amount) as balance from posting p join account a"
                " on a.organization_id = p.organization_id and a.id = p.account_id"
                " where p.organization_id = %s and a.entity_id is null group by a.entity_type",
                (self.organization.id,),
            )
        system = {row["entity_type"]: row["balance"] for row in rows}
        assert system.get("SYSTEM_ISSUANCE", 0) == -self.reference.issued
        assert system.get("SYSTEM_BREAKAGE", 0) == self.reference.broken

    def compare(self, real: Coroutine[Any, Any, Any], model: Callable[[], None]) -> None:
        """Do the same to both, a second later than the last operation; both must take it or refuse it alike."""
        self.reference.now += TICK
        self.bench.clock.set(self.reference.now)
        expected = actual = None
        try:
            model()
        except Refused as refused:
            expected = refused.code
        try:
            self.bench.run(real)
        except Refusal as refusal:
            actual = refusal.code
        assert actual == expected

    def desk(self, holder: int, program: int = 0) -> Desk:
        return Desk(
            self.bench.database, self.organization.id, self.programs[program], self.asset_id, self.holders[holder]
        )

    def terms(self, expires_in: int | None, matures_in: int | None) -> dict[str, Any]:
        """When a lot that is made with the next tick expires and matures; only lots do, and after they mature."""
        if not self.has_lots:
            return {}
        now = self.reference.now + TICK
        terms: dict[str, Any] = {}
        if matures_in is not None:
            terms["matures_at"] = now + matures_in * HOUR
        if expires_in is not None:
            terms["expires_at"] = now + (expires_in + (matures_in or 0)) * HOUR
        return terms

    def choose(
        self, holder: int, reference: str | None, picks: list[int] | None, span: tuple[int, int] | None
    ) -> tuple[Choice, dict[str, Any]]:
        """The same choice of lots for both; none on SIMPLE assets, where it is refused."""
        if not self.has_lots:
            return ANY, {}
        fields: dict[str, Any] = {"reference_id": reference}
        numbers = None
        lots = self.reference.fifo(self.reference.holders[holder])
        if picks is not None and lots:
            chosen = {pick % len(lots) for pick in picks}
            rows = self.bench.run(self.desk(holder).lot_rows())
            fields["lot_ids"] = [rows[position]["id"] for position in chosen]
            numbers = {lots[position].number for position in chosen}
        if span is not None:
            low, high = sorted(span)
            fields |= {"earned_from": START + low * HOUR, "earned_to": START + high * HOUR}
        earned = (fields.get("earned_from"), fields.get("earned_to"))
        return Choice(reference, numbers, *earned), fields


def number(amount: str | None) -> Decimal | None:
    return None if amount is None else Decimal(amount)


def in_order(holds: list[RefHold]) -> list[RefHold]:
    return sorted(holds, key=lambda hold: (hold.created_at, hold.number))


def lot_of(row: dict[str, Any]) -> tuple[Any, ...]:
    names = (
        "status",
        "amount",
        "remaining",
        "created_at",
        "expires_at",
        "matures_at",
        "reference_id",
        "is_provisional",
    )
    return tuple(row[name] for name in names)


def vars_of(lot: Any) -> tuple[Any, ...]:
    names = ("status", "amount", "remaining", "created_at", "expires_at", "matures_at", "reference", "provisional")
    return tuple(getattr(lot, name) for name in names)


def hold_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["status"], row["amount"], row["remaining"], row["expires_at"]


@pytest.fixture
def bench(database_url: str, new_organization: Callable[[], Tenant]) -> Iterator[Bench]:
    bench = Bench(database_url, new_organization)
    yield bench
    bench.close()


def test_the_ledger_is_what_the_reference_says(bench: Bench) -> None:
    class Machine(LedgerMachine):
        pass

    Machine.bench = bench
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
