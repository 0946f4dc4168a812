"""Everything that the events of a batch may read and write, in memory.

Loaded under the locks of everybody in it (loading.py), changed by what events do (effects.py), written in bulk at the
end (writing.py). What an event reaches for beyond it is noted, so that the batch can be applied again to a larger
world; what an event that fails has done is undone to the last trace.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple
from uuid import UUID

from domain.automations import NewAutomation
from domain.events.state import Holder, StateJournal
from domain.ids import new_id
from domain.ledger.books import Account, Books
from domain.ledger.shelves import Shelves
from domain.rules.budgets import BudgetBook

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """An event as the queue hands it over; `data` is the payload with Decimals. Without a participant it is one of a
    program-scoped automation.
    """

    id: UUID
    participant_id: UUID | None
    external_id: str | None
    recipient_id: UUID | None
    recipient_external_id: str | None
    event_type: str
    data: dict[str, Any]
    timestamp: datetime
    depth: int
    attempts: int
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Reference:
    """Somebody whom an event names: a participant by exactly one of its identifiers, a group or a program by its id."""

    id: UUID | None = None
    external_id: str | None = None
    kind: Literal["PARTICIPANT", "GROUP", "PROGRAM"] = "PARTICIPANT"


@dataclass(frozen=True, slots=True)
class AssetTerms:
    """What posting needs to know of an asset."""

    id: UUID
    scale: int
    has_lots: bool
    is_prefunded: bool
    is_archived: bool
    is_linked: bool
    max_transaction_amount: Decimal | None


class Membership(NamedTuple):
    """A group of a participant, and the role in it."""

    group: Holder
    role: str


Crowd = tuple[UUID, str]
"""A holder, and what it has too many of: `counter` or `attribute`."""


class Mark(NamedTuple):
    """A point to which a world can go back."""

    books: tuple[int, int, int]
    state: int
    budgets: int
    automations: int


@dataclass(slots=True)
class World:
    """Everything loaded for a batch.

    `known` are the references that were looked up, found or not; `missing` those that events reached for beyond them,
    `misses` times; `reached` all that events reached for. `created` are the participants that were made for this batch.
    `is_stale`: somebody was renamed while locks were waited for, so this is not whom the events name. `crowded` are the
    holders that may get only so many further counters or attributes.
    """

    program: Holder
    participants: dict[UUID, Holder]
    groups: dict[UUID, Holder]
    programs: dict[UUID, Holder]
    by_external_id: dict[str, Holder]
    memberships: dict[UUID, list[Membership]]
    known: set[Reference]
    assets: dict[UUID, AssetTerms]
    books: Books
    shelves: Shelves
    budgets: BudgetBook
    state: StateJournal = field(default_factory=StateJournal)
    automations: list[NewAutomation] = field(default_factory=list)
    created: set[UUID] = field(default_factory=set)
    is_stale: bool = False
    crowded: dict[Crowd, int] = field(default_factory=dict)
    missing: set[Reference] = field(default_factory=set)
    misses: int = 0
    reached: set[Reference] = field(default_factory=set)

    def find(self, reference: Reference) -> Holder | None:
        """Whoever is behind `reference`, None if there is no such one.

        One that was never looked up is noted in `missing` and answered with a phantom, so that a single pass learns of
        everything an event reaches for; what the event did is undone then.
        """
        self.reached.add(reference)
        found = self._loaded(reference)
        if found is None and reference not in self.known:
            self.missing.add(reference)
            self.misses += 1
            phantom = Holder(reference.kind, reference.id or new_id(), reference.external_id, is_phantom=True)
            phantom.open_view(EPOCH)
            return phantom
        return found

    def _loaded(self, reference: Reference) -> Holder | None:
        if reference.external_id is not None:
            return self.by_external_id.get(reference.external_id)
        assert reference.id is not None
        if reference.kind == "GROUP":
            return self.groups.get(reference.id)
        if reference.kind == "PROGRAM":
            return self.programs.get(reference.id)
        return self.participants.get(reference.id)

    def wallet(self, program_id: UUID, asset_id: UUID) -> Account | None:
        """The program's wallet of this asset; None, with the program noted as missing, where that isn't loaded."""
        holder = self.find(Reference(id=program_id, kind="PROGRAM"))
        if holder is None or holder.is_phantom:
            return None
        return self.books.account("PROGRAM", program_id, asset_id, "AVAILABLE")

    def unmet(self) -> int:
        """How often events have reached for what isn't loaded; 0 means that what they did is what they do."""
        return self.misses + self.shelves.misses

    def mark(self) -> Mark:
        """A point to which `undo` can go back."""
        return Mark(self.books.mark(), self.state.mark(), self.budgets.mark(), len(self.automations))

    def undo(self, mark: Mark) -> None:
        """Take back everything that events have done since `mark`."""
        self.books.undo(mark.books)
        self.state.undo(mark.state)
        self.budgets.undo(mark.budgets)
        del self.automations[mark.automations :]
