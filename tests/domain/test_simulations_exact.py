"""Simulations: a rule set run against past events. Contract: README.md "Simulations", rules-and-events.md 7.6.

The rule that carries all others: a simulation of the rules as they are reproduces what really happened, exactly.
Method: drawn rules meet drawn events in batches of odd sizes, while others do whatever the API lets them do to the same
holders and time goes by, with upkeep coming or not; then every event of the simulation must end as it really did, with
the same evaluation records, digit by digit, from the program's beginning as well as from any moment in between.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db.session import Database, Transaction
from domain import limits, participants, redemptions, state, transfers, wallet
from domain.balances import AdjustRequest, Holder, OperationRequest, adjust, operate
from domain.errors import Refusal
from domain.events import queries
from domain.events.retries import RetryPolicy
from domain.ids import new_id
from domain.redemptions import ConfirmRequest, RedemptionRequest, ReverseRequest
from domain.rules.budgets import BudgetDraft
from domain.transfers import HolderName, TransferRequest, WantedShare
from domain.upkeep import sweep
from domain.wallet import WalletRequest
from tests.builders import make_group
from tests.conftest import SettableClock, Tenant
from tests.domain.events.test_equivalence import PEOPLE, TEMPLATES, Template, placed
from tests.events_support import EventProgram, counter, credit, debit, move, tag
from tests.simulations_support import LONG_AGO, simulate

TO_FAMILY: dict[str, Any] = {"target": {"type": "GROUP", "id": "family"}}
WEEKLY = 'get(participant.counters, "weekly", 0)'

# Beside those of the equivalence test: windows of counters, ends and terms that pass while events come.
MORE: tuple[Template, ...] = (
    ("event.type == 'buy'", [counter("weekly", "event.amount", reset_after="3h")], {}),
    (f"{WEEKLY} > 10", [credit("points", WEEKLY), tag("weekly")], {}),
    ("event.type == 'buy'", [credit("lots", "event.amount", matures_at="1h", expires_at="5h")], {}),
    ("event.amount > 5", [credit("lots", "2", expires_at="2h"), debit("lots", "1")], {}),
    ("event.type == 'give'", [move("HOLD", "lots", "0.5", hold_until="1h", reference_id="event.ref")], {}),
    ("event.type == 'spend'", [credit("points", "3"), move("HOLD", "points", "2", hold_until="90m")], {}),
    ("event.type == 'take'", [move("RELEASE", "points", "1")], {}),
    ("event.amount >= 2", [credit("points", "1", bucket="HELD", hold_until="30m")], {}),
    ("event.type == 'buy'", [credit("cash", "0.5", **TO_FAMILY), move("HOLD", "lots", "0.5", **TO_FAMILY)], {}),
    (
        "event.type == 'buy'",
        [credit("points", "event.amount")],
        {"budgets": [("points", "20")], "schedule": {"schedule_type": "INTERVAL", "interval": "2h"}},
    ),
    ('"gold" in participant.tags', [credit("points", "1")], {}),
    ("has(participant.attributes.city) && participant.attributes.city == 'Rome'", [credit("points", "2")], {}),
    ('get(participant.counters, "given", 0) > 5', [credit("points", "3"), counter("given", "-2")], {}),
    ("participant.status != 'ACTIVE'", [tag("blocked")], {}),
)
RULES = (*TEMPLATES, *MORE)

AGAIN_LATER = RetryPolicy(max_attempts=2, waits_s=(900,))
"""What a later credit may cure waits a quarter of an hour, and then comes before fresh events."""

NOT_BEN = "participant.external_id != 'ben'"
"""A filter: what ben's events really did is done again, and the others' events are simulated."""

AMOUNTS = st.sampled_from(["0.5", "1", "2", "7", "12.34"])
ASSETS = st.sampled_from(["points", "lots", "vouchers", "cash"])
HOLDERS = st.sampled_from([*PEOPLE[:2], "family"])
EVENT = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["buy", "spend", "refund", "give", "take", "mark"]),
        "who": st.sampled_from([*PEOPLE, "cat"]),
        "to": st.sampled_from([*PEOPLE, "cat", "dan"]),
        "recipient": st.sampled_from([None, None, None, *PEOPLE, "dan"]),
        "amount": st.sampled_from([Decimal(n) for n in ("0", "0.5", "2", "7", "12.34", "20")]),
        "ref": st.sampled_from(["r1", "r2"]),
    }
)
STEPS = st.one_of(
    st.tuples(st.just("events"), st.lists(EVENT, min_size=1, max_size=6), st.integers(1, 7)),
    st.tuples(st.just("adjust"), HOLDERS, ASSETS, AMOUNTS, st.sampled_from(["CREDIT", "DEBIT"]), st.booleans()),
    st.tuples(
        st.just("operate"),
        HOLDERS,
        ASSETS,
        st.sampled_from(["HOLD", "HOLD", "RELEASE", "FORFEIT", "VOID_HOLD"]),
        st.sampled_from([None, "0.5", "2"]),
        st.sampled_from([None, None, "r1"]),
    ),
    st.tuples(st.just("wallet"), st.sampled_from(["cash", "vouchers"]), AMOUNTS, st.booleans()),
    st.tuples(st.just("tags"), HOLDERS, st.sampled_from(["gold", "seen", "rich"])),
    st.tuples(st.just("attribute"), HOLDERS, st.sampled_from(["Rome", "Oslo", None])),
    st.tuples(
        st.just("counter"),
        HOLDERS,
        st.sampled_from(["spent", "weekly", "visits", "given"]),
        st.sampled_from([None, "0", "9"]),
    ),
    st.tuples(st.just("status"), st.sampled_from(PEOPLE), st.sampled_from(["ACTIVE", "SUSPENDED"])),
    st.tuples(st.just("other"), st.lists(EVENT, min_size=1, max_size=3)),
    st.tuples(st.just("redeem"), st.sampled_from(PEOPLE[:2]), ASSETS, AMOUNTS, st.sampled_from(["once", "hold"])),
    st.tuples(st.just("resolve"), st.sampled_from(["confirm", "part", "cancel", "reverse"])),
    st.tuples(st.just("transfer"), HOLDERS, HOLDERS, ASSETS, AMOUNTS),
    st.tuples(st.just("wait"), st.sampled_from([20, 61, 200]), st.booleans()),
    st.tuples(st.just("upkeep")),
    st.tuples(st.just("retry")),
)


@given(
    rules=st.lists(st.sampled_from(range(len(RULES))), min_size=4, max_size=14, unique=True),
    steps=st.lists(STEPS, min_size=6, max_size=24),
    policy=st.sampled_from(["CREATE", "CREATE", "REJECT"]),
    page=st.sampled_from([3, 7, 400]),
)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
async def test_the_rules_as_they_are_do_what_they_really_did(
    database: Database,
    new_organization: Callable[[], Tenant],
    clock: SettableClock,
    monkeypatch: pytest.MonkeyPatch,
    rules: list[int],
    steps: list[tuple[Any, ...]],
    policy: str,
    page: int,
) -> None:
    monkeypatch.setattr(limits, "SIMULATION_EVENTS", page)
    monkeypatch.setattr(limits, "OTHERS_FIRST_LOOK", 1)
    town = await Town.open(database, new_organization().id, clock, policy, rules)
    for step in steps:
        await town.take(step)
    await town.take(("events", [_LAST], 3))

    middle = town.moments[len(town.moments) // 2]
    for since, whom in ((LONG_AGO, None), (middle, None), (LONG_AGO, NOT_BEN), (middle, NOT_BEN)):
        if whom is not None:
            # What the events of the others did has its place among those of their batch, so that has to come whole.
            monkeypatch.setattr(limits, "SIMULATION_EVENTS", 400)
        done = await simulate(database, town.organization_id, town.program.id, since=since, participant_filter=whom)
        assert done.differences() == [], (since, whom)
        assert done.results.get("simulated") == done.results.get("actual")
        assert done.results.get("incomplete", 0) == 0


_LAST = {"type": "buy", "who": "ann", "to": "ben", "recipient": None, "amount": Decimal(7), "ref": "r1"}


@dataclass
class Town:
    """An organization with a program, whose holders others deal with, too."""

    database: Database
    organization_id: UUID
    clock: SettableClock
    program: EventProgram
    other: EventProgram
    assets: dict[str, UUID]
    holders: dict[str, Holder]
    moments: list[datetime] = field(default_factory=list)
    open_redemptions: list[UUID] = field(default_factory=list)
    done_redemptions: list[UUID] = field(default_factory=list)

    @classmethod
    async def open(
        cls, database: Database, organization_id: UUID, clock: SettableClock, policy: str, rules: list[int]
    ) -> "Town":
        clock.set(datetime.fromisoformat("2026-03-01T12:00:00Z"))
        program = await EventProgram.open(database, organization_id, on_unknown_participant=policy)
        assets = {
            "points": await program.asset(),
            "cash": await program.asset(issuance_policy="PREFUNDED"),
            "miles": await program.asset(scale=0),
            "lots": await program.asset(inventory_mode="LOT"),
            "vouchers": await program.asset(inventory_mode="LOT", issuance_policy="PREFUNDED"),
        }
        people = [await program.participant(name) for name in PEOPLE]
        async with database.transaction(organization_id) as tx:
            family = await make_group(tx, people[0], people[1])
            other = EventProgram(database, organization_id, await _make_other(tx, list(assets.values())))
        holders = {name: Holder("PARTICIPANT", id_) for name, id_ in zip(PEOPLE, people, strict=True)}
        holders["family"] = Holder("GROUP", family)
        town = cls(database, organization_id, clock, program, other, assets, holders)
        for asset in ("cash", "vouchers"):
            await town.take(("wallet", asset, "30", True))
        for who in (*PEOPLE, "family"):
            for asset in ("points", "lots", "vouchers"):
                await town.take(("adjust", who, asset, "7", "CREDIT", False))
        for number in rules:
            condition, actions, fields = RULES[number]
            mapped = [placed(action, assets, family) for action in actions]
            schedule = fields.get("schedule", {})
            budgets = [BudgetDraft(assets[name], limit, **schedule) for name, limit in fields.get("budgets", [])]
            kept = {name: value for name, value in fields.items() if name not in ("budgets", "schedule")}
            await program.rule(condition, *mapped, name=f"rule {number}", budgets=budgets, **kept)
        for rule in _OTHER_RULES:
            await other.rule(rule[0], *[placed(action, assets, family) for action in rule[1]])
        return town

    async def take(self, step: tuple[Any, ...]) -> None:
        """Do one thing, an instant later than the one before; what is refused is left."""
        self.clock.advance(milliseconds=7)
        self.moments.append(self.clock())
        kind, *details = step
        try:
            await getattr(self, f"_{kind}")(*details)
        except Refusal:
            return

    async def _events(self, events: list[dict[str, Any]], size: int) -> None:
        await self._send(self.program, events)
        while (await self.program.batch(size, AGAIN_LATER)).events:
            self.clock.advance(milliseconds=3)

    async def _other(self, events: list[dict[str, Any]]) -> None:
        await self._send(self.other, events)
        await self.other.settle()

    async def _send(self, program: EventProgram, events: list[dict[str, Any]]) -> None:
        family = str(self.holders["family"].id)
        told = ("type", "to", "amount", "ref")
        await program.ingest(
            [
                program.event(
                    e["who"],
                    recipient=e["recipient"],
                    at=self.clock() + timedelta(days=9_000),
                    family=family,
                    **{name: e[name] for name in told},
                )
                for e in events
            ]
        )

    async def _adjust(self, who: str, asset: str, amount: str, kind: str, negative: bool) -> None:
        async with self._transaction() as tx:
            await adjust(
                tx,
                self.holders[who],
                AdjustRequest(
                    program_id=self.program.id,
                    asset_id=self.assets[asset],
                    type=kind,  # type: ignore[arg-type]
                    amount=amount,
                    description="by hand",
                    allow_negative=negative and kind == "DEBIT",
                    bucket="HELD" if negative and kind == "CREDIT" else "AVAILABLE",
                ),
            )

    async def _operate(self, who: str, asset: str, operation: str, amount: str | None, reference: str | None) -> None:
        has_lots = asset in ("lots", "vouchers")
        async with self._transaction() as tx:
            await operate(
                tx,
                self.holders[who],
                OperationRequest(
                    operation=operation,  # type: ignore[arg-type]
                    program_id=self.program.id,
                    asset_id=self.assets[asset],
                    description="by hand",
                    amount=None if operation == "VOID_HOLD" else amount,
                    bucket="HELD" if reference else "AVAILABLE",
                    reference_id=reference or ("r2" if operation == "VOID_HOLD" else None) if has_lots else None,
                    expires_in=timedelta(hours=1) if operation == "HOLD" and reference else None,
                ),
            )

    async def _wallet(self, asset: str, amount: str, funds: bool) -> None:
        async with self._transaction() as tx:
            request = WalletRequest(program_id=self.program.id, asset_id=self.assets[asset], amount=amount)
            await (wallet.fund if funds else wallet.burn)(tx, request)

    async def _tags(self, who: str, name: str) -> None:
        async with self._transaction() as tx:
            entity = await self._locked(tx, who)
            if name in await state.tags(tx, entity.id):
                await state.remove_tag(tx, entity, name)
            else:
                await state.add_tag(tx, entity, name)

    async def _attribute(self, who: str, value: str | None) -> None:
        async with self._transaction() as tx:
            entity = await self._locked(tx, who)
            if value is None:
                await state.delete_attribute(tx, entity, "city")
            else:
                await state.merge_attributes(tx, entity, {"city": value})

    async def _counter(self, who: str, key: str, value: str | None) -> None:
        async with self._transaction() as tx:
            entity = await self._locked(tx, who)
            if key == "weekly":
                # Windows are known as they are configured now: nobody changes that of this one.
                await state.set_counter(tx, entity, key, value or "1", "3h")
            elif value is None:
                await state.delete_counter(tx, entity, key)
            else:
                await state.set_counter(tx, entity, key, value, None)

    async def _status(self, who: str, status: Any) -> None:
        async with self._transaction() as tx:
            await participants.set_status(tx, self.holders[who].id, status)

    async def _redeem(self, who: str, asset: str, amount: str, how: str) -> None:
        request = RedemptionRequest(
            participant_id=self.holders[who].id,
            program_id=self.program.id,
            asset_id=self.assets[asset],
            amount=amount,
            description="shop",
            requires_confirmation=how == "hold",
        )
        async with self._transaction() as tx:
            if how == "hold":
                self.open_redemptions.append((await redemptions.reserve(tx, request, new_id())).redemption.id)
            else:
                created = await redemptions.create(tx, request)
                assert created is not None
                self.done_redemptions.append(created.redemption.id)

    async def _resolve(self, how: str) -> None:
        async with self._transaction() as tx:
            if how == "reverse" and self.done_redemptions:
                await redemptions.reverse(tx, self.done_redemptions.pop(), ReverseRequest(reason="back"))
            elif how != "reverse" and self.open_redemptions:
                redemption_id = self.open_redemptions.pop()
                if how == "cancel":
                    await redemptions.cancel(tx, redemption_id, "no")
                else:
                    amount = "0.5" if how == "part" else None
                    await redemptions.confirm(tx, redemption_id, ConfirmRequest(amount=amount))

    async def _transfer(self, source: str, target: str, asset: str, amount: str) -> None:
        async with self._transaction() as tx:
            await transfers.create(
                tx,
                TransferRequest(
                    program_id=self.program.id,
                    asset_id=self.assets[asset],
                    source=self._name(source),
                    shares=[WantedShare(self._name(target), amount)],
                    description="gift",
                    idempotency_key=str(new_id()),
                ),
            )

    async def _retry(self) -> None:
        """Queue every failed event again."""
        async with self._transaction() as tx:
            await queries.retry_all(tx, self.program.id, None, None, None)

    async def _wait(self, minutes: int, looked_after: bool) -> None:
        self.clock.advance(minutes=minutes)
        if looked_after:
            await self._upkeep()

    async def _upkeep(self) -> None:
        await sweep(self.database, self.organization_id)

    def _name(self, who: str) -> HolderName:
        holder = self.holders[who]
        return HolderName("group_id" if holder.type == "GROUP" else "participant_id", holder.id)

    def _transaction(self) -> Any:
        return self.database.transaction(self.organization_id)

    async def _locked(self, tx: Transaction, who: str) -> Any:
        holder = self.holders[who]
        return await state.lock(tx, "group" if holder.type == "GROUP" else "participant", holder.id)


_OTHER_RULES: tuple[tuple[str, list[dict[str, Any]]], ...] = (
    ("event.type == 'buy'", [credit("lots", "3", matures_at="1h", expires_at="4h"), counter("given", "2")]),
    ("event.type == 'spend'", [debit("points", "event.amount", allow_negative=True), tag("gold")]),
    ("event.type == 'give'", [credit("lots", "4", bucket="HELD", reference_id="event.ref")]),
    ("event.type == 'take'", [credit("lots", "3", reference_id="event.ref")]),
    ("event.type == 'mark'", [credit("points", "6"), move("HOLD", "points", "2", hold_until="1h")]),
    ("event.type == 'refund'", [counter("weekly", "1", reset_after="3h"), debit("lots", "1")]),
)


async def _make_other(tx: Transaction, asset_ids: list[UUID]) -> UUID:
    from tests.builders import make_program

    program_id = await make_program(tx, name="Other")
    for asset_id in asset_ids:
        await tx.execute(
            "insert into program_asset (organization_id, program_id, asset_id, created_at) values (%s, %s, %s, %s)",
            (tx.organization_id, program_id, asset_id, tx.now),
        )
    return program_id
