"""Figures per rule, counted from evaluation records: the same way for simulated events and for what really happened."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from domain.money import EXACT, ZERO

_MATCHED = frozenset({"SUCCESS", "FAILED"})
_ERRORS = frozenset({"SKIPPED_ERROR", "SKIPPED_TIMEOUT"})


@dataclass(slots=True)
class Tally:
    """What a rule did. Only what holds is counted as done: nothing of an event that failed.

    `matches` are events in which its condition was true; `failed` those of them that ended FAILED, by whichever rule;
    `skipped_budget` those in which a spent budget suppressed a credit. `errors` are conditions without a value.
    `issued` is what it credited per asset (a settle counts its delta). `scheduled_events` and `broadcasts` are those it
    asked for.
    """

    matches: int = 0
    failed: int = 0
    skipped_budget: int = 0
    errors: int = 0
    scheduled_events: int = 0
    broadcasts: int = 0
    issued: dict[str, Decimal] = field(default_factory=dict)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Tally":
        """The tally that `document` was made from."""
        counts = {name: int(document[name]) for name in _COUNTS}
        return cls(**counts, issued=dict(document["issued"]))

    def document(self) -> dict[str, Any]:
        """The tally as it is stored."""
        return {**{name: getattr(self, name) for name in _COUNTS}, "issued": self.issued}

    def _add(self, record: Mapping[str, Any], *, holds: bool) -> None:
        if record["status"] in _ERRORS:
            self.errors += 1
            return
        is_over_budget = record.get("reason") == "BUDGET_EXCEEDED"
        if record["status"] not in _MATCHED and not is_over_budget:
            return
        self.matches += 1
        if not holds:
            self.failed += 1
            return
        self.skipped_budget += is_over_budget
        for action in record.get("actions", ()):
            self._add_action(action)

    def _add_action(self, action: Mapping[str, Any]) -> None:
        if action["type"] == "CREDIT":
            asset_id = str(action["asset_id"])
            self.issued[asset_id] = EXACT.add(self.issued.get(asset_id, ZERO), _issued(action))
        elif action["type"] == "SCHEDULE_EVENT":
            self.scheduled_events += 1
        elif action["type"] == "BROADCAST":
            self.broadcasts += 1


def issues_of(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[UUID, UUID, Decimal]]:
    """What rules have issued by these records of an event that is COMPLETED: rule, asset, amount."""
    for record in records:
        for action in record.get("actions", ()):
            if action["type"] == "CREDIT":
                yield UUID(str(record["rule_id"])), UUID(str(action["asset_id"])), _issued(action)


def _issued(credit: Mapping[str, Any]) -> Decimal:
    """What a CREDIT drew from its source; negative where a settle gave back."""
    return Decimal(credit["settle"]["delta"] if "settle" in credit else credit["amount"])


_COUNTS = ("matches", "failed", "skipped_budget", "errors", "scheduled_events", "broadcasts")


@dataclass(slots=True)
class Tallies:
    """The tallies of all rules, by the rule's id as text, and how many events ended how."""

    completed: int = 0
    failed: int = 0
    rules: dict[str, Tally] = field(default_factory=dict)

    @classmethod
    def read(cls, document: Mapping[str, Any] | None) -> "Tallies":
        """The tallies that `document` was made from; empty ones for None."""
        if document is None:
            return cls()
        rules = {rule_id: Tally.read(tally) for rule_id, tally in document["rules"].items()}
        return cls(int(document["completed"]), int(document["failed"]), rules)

    def document(self) -> dict[str, Any]:
        """The tallies as they are stored."""
        rules = {rule_id: tally.document() for rule_id, tally in self.rules.items()}
        return {"completed": self.completed, "failed": self.failed, "rules": rules}

    def count(self, records: Iterable[Mapping[str, Any]], *, is_completed: bool) -> None:
        """Count one finished event by its evaluation records."""
        if is_completed:
            self.completed += 1
        else:
            self.failed += 1
        for record in records:
            self.rules.setdefault(str(record["rule_id"]), Tally())._add(record, holds=is_completed)

    def issued(self) -> dict[str, Decimal]:
        """What all rules together have issued, per asset."""
        sums: dict[str, Decimal] = {}
        for tally in self.rules.values():
            for asset_id, amount in tally.issued.items():
                sums[asset_id] = EXACT.add(sums.get(asset_id, ZERO), amount)
        return sums
