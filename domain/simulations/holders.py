"""What a simulation has made of a holder, as it is kept between two batches.

Everything that rules can reach: state, and of the assets that rules take from the balances, open lots and active holds.
Only the ends of what happened are kept, no entries: nobody reads a simulation's ledger.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, cast
from uuid import UUID

from domain.events.state import CounterState
from domain.ledger.books import Bucket
from domain.ledger.holds import Hold
from domain.ledger.lots import Lot
from domain.rules.budgets import Budget

Kind = Literal["PARTICIPANT", "GROUP", "PROGRAM"]


@dataclass(frozen=True, slots=True)
class ReservedPart:
    """Value that a pending redemption reserves, with the terms of the lot that it came from and goes back to."""

    amount: Decimal
    program_id: UUID
    created_at: datetime
    expires_at: datetime | None


@dataclass(slots=True)
class Reservation:
    """What a pending redemption reserves: `parts` make up `amount` on LOT assets, and are empty on SIMPLE ones."""

    asset_id: UUID
    amount: Decimal
    parts: list[ReservedPart] = field(default_factory=list)


@dataclass(slots=True)
class Snapshot:
    """A holder between two batches.

    What others did is in it up to `seen_at` in its state, and up to the versions in `marks` on its real accounts.
    `external_id` only where the simulation itself has made the participant. `budgets` only of the event's own program.
    """

    kind: Kind
    exists_from: datetime
    seen_at: datetime
    external_id: str | None = None
    marks: dict[UUID, int] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    counters: dict[str, CounterState] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    balances: dict[tuple[UUID, Bucket], Decimal] = field(default_factory=dict)
    lots: list[Lot] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    reserved: dict[UUID, Reservation] = field(default_factory=dict)
    budgets: list[Budget] = field(default_factory=list)

    def copy(self) -> "Snapshot":
        """A snapshot of its own, of which nothing changes with this one."""
        return replace(
            self,
            tags=set(self.tags),
            counters=dict(self.counters),
            attributes=dict(self.attributes),
            lots=[replace(lot) for lot in self.lots],
            holds=[replace(hold) for hold in self.holds],
            reserved={hold_id: replace(found, parts=list(found.parts)) for hold_id, found in self.reserved.items()},
        )

    def document(self) -> dict[str, Any]:
        """The snapshot as it is stored; equal snapshots make equal documents."""
        return {
            "kind": self.kind,
            "exists_from": self.exists_from,
            "seen_at": self.seen_at,
            "external_id": self.external_id,
            "marks": {str(account_id): version for account_id, version in sorted(self.marks.items())},
            "tags": sorted(self.tags),
            "counters": {key: list(counter) for key, counter in sorted(self.counters.items())},
            "attributes": dict(sorted(self.attributes.items())),
            "balances": [[*coordinates, amount] for coordinates, amount in sorted(self.balances.items())],
            "lots": [_row(lot, _LOT_FIELDS) for lot in self.lots],
            "holds": [_row(hold, _HOLD_FIELDS) for hold in self.holds],
            "reserved": [
                [hold_id, found.asset_id, found.amount, [_row(part, _PART_FIELDS) for part in found.parts]]
                for hold_id, found in sorted(self.reserved.items())
            ],
            "budgets": [_row(budget, _BUDGET_FIELDS) for budget in self.budgets],
        }

    @classmethod
    def read(cls, entity_id: UUID, document: Mapping[str, Any]) -> "Snapshot":
        """The snapshot of this entity that `document` was made from."""
        kind: Kind = document["kind"]
        return cls(
            kind=kind,
            exists_from=datetime.fromisoformat(document["exists_from"]),
            seen_at=datetime.fromisoformat(document["seen_at"]),
            external_id=document["external_id"],
            marks={UUID(account_id): int(version) for account_id, version in document["marks"].items()},
            tags=set(document["tags"]),
            counters={key: _counter(*stored) for key, stored in document["counters"].items()},
            attributes=dict(document["attributes"]),
            balances={(UUID(asset_id), bucket): amount for asset_id, bucket, amount in document["balances"]},
            lots=[_lot(kind, entity_id, row) for row in document["lots"]],
            holds=[_hold(kind, entity_id, row) for row in document["holds"]],
            reserved={
                UUID(hold_id): Reservation(UUID(asset_id), amount, [_part(row) for row in parts])
                for hold_id, asset_id, amount, parts in document["reserved"]
            },
            budgets=[_budget(row) for row in document["budgets"]],
        )


_LOT_FIELDS = (
    "id",
    "asset_id",
    "program_id",
    "status",
    "amount",
    "remaining",
    "created_at",
    "expires_at",
    "matures_at",
    "reference_id",
    "hold_id",
    "is_provisional",
    "entry_id",
)
_HOLD_FIELDS = (
    "id",
    "program_id",
    "asset_id",
    "kind",
    "amount",
    "remaining",
    "status",
    "reference_id",
    "description",
    "expires_at",
    "on_expiry",
    "carrier",
    "entry_id",
    "created_at",
)
_PART_FIELDS = ("amount", "program_id", "created_at", "expires_at")
_BUDGET_FIELDS = (
    "rule_id",
    "asset_id",
    "maximum",
    "schedule_type",
    "cron_expression",
    "interval",
    "starts_at",
    "consumed",
    "next_reset_at",
    "scale",
)
# How the members of a row are read back; others are as JSON has them.
_IDS = frozenset({"id", "asset_id", "program_id", "hold_id", "entry_id", "rule_id"})
_INSTANTS = frozenset({"created_at", "expires_at", "matures_at", "starts_at", "next_reset_at"})


def _row(item: object, names: Iterable[str]) -> list[Any]:
    return [getattr(item, name) for name in names]


def _fields(names: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    return {name: _value(name, value) for name, value in zip(names, row, strict=True)}


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _IDS:
        return UUID(value)
    return datetime.fromisoformat(value) if name in _INSTANTS else value


def _counter(value: Decimal, reset_after: str | None, last_reset_at: str) -> CounterState:
    return CounterState(value, reset_after, datetime.fromisoformat(last_reset_at))


def _lot(kind: Kind, entity_id: UUID, row: Sequence[Any]) -> Lot:
    return Lot(entity_type=kind, entity_id=entity_id, **_fields(_LOT_FIELDS, row))


def _hold(kind: Kind, entity_id: UUID, row: Sequence[Any]) -> Hold:
    return Hold(entity_type=kind, entity_id=entity_id, **_fields(_HOLD_FIELDS, row))


def _part(row: Sequence[Any]) -> ReservedPart:
    return ReservedPart(**_fields(_PART_FIELDS, row))


def _budget(row: Sequence[Any]) -> Budget:
    found = _fields(_BUDGET_FIELDS, row)
    return Budget(**{**found, "scale": int(cast(Decimal, found["scale"]))})
