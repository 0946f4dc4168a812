"""Past events in the order in which they took effect.

Events that were processed together carry the same instant; `processed_at` and `seq` say which batches came after which,
and the ids of the evaluation records, which grow with the time they were made, in which order a batch took its events:
those whose wait had ended came before fresh ones, whatever their `seq`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

from db.session import Transaction
from domain import limits
from domain.events.world import QueuedEvent

_NEVER_APPLIED = "processing "
"""How the error of an event begins that could not be processed at all, whatever the rules (domain/events/drain.py)."""

_READ = """
select e.id, e.participant_id, e.external_id, e.recipient_id, e.recipient_external_id, e.event_type, e.event_data,
       e.event_timestamp, e.depth, e.attempts, e.request_id,
       e.seq, e.processed_at, e.status = 'COMPLETED', e.error_message, e.evaluations, j.first, j.last
from (
    select * from event
    where organization_id = %(organization_id)s and program_id = %(program_id)s and processed_at is not null
      and (processed_at, seq) > (%(after_at)s, %(after_seq)s) and processed_at <= %(until)s
    order by processed_at, seq limit %(limit)s
) e
cross join lateral (
    select min(sequence) as first, max(sequence) as last from journal_entry
    where organization_id = e.organization_id and event_id = e.id
) j
order by e.processed_at, e.seq
"""

_COUNT = """
select count(*) from event
where organization_id = %s and program_id = %s and processed_at >= %s and processed_at <= %s
"""

_HAS_EARLIER = """
select exists (select from event where organization_id = %s and program_id = %s and processed_at < %s)
"""


@dataclass(frozen=True, slots=True)
class PastEvent:
    """An event that has ended, and what really became of it. The sequences are those of its journal entries."""

    event: QueuedEvent
    seq: int
    processed_at: datetime
    is_completed: bool
    error: str | None
    evaluations: list[dict[str, Any]]
    first_sequence: int | None
    last_sequence: int | None

    @property
    def was_applied(self) -> bool:
        """Whether the rules were tried on it; not, if it ended FAILED because it brought down whoever tried."""
        return self.is_completed or self.error is None or not self.error.startswith(_NEVER_APPLIED)


@dataclass(frozen=True, slots=True)
class Place:
    """A place between the entries of the ledger: before `sequence` where that is known, else just after an instant."""

    at: datetime
    sequence: int | None = None

    def is_after(self, at: datetime, sequence: int) -> bool:
        """Whether the entry with this instant and sequence lies before this place."""
        return sequence < self.sequence if self.sequence is not None else at <= self.at


@dataclass(frozen=True, slots=True)
class PastBatch:
    """Events that took effect in one transaction, in their order. Their entries lie side by side in the ledger."""

    events: Sequence[PastEvent]

    @property
    def at(self) -> datetime:
        """The instant of the transaction."""
        return self.events[0].processed_at

    @property
    def place(self) -> Place:
        """Where the ledger stood when it began."""
        return Place(
            self.at, min((e.first_sequence for e in self.events if e.first_sequence is not None), default=None)
        )

    @property
    def end(self) -> Place:
        """Where the ledger stood when it was over."""
        last = max((e.last_sequence for e in self.events if e.last_sequence is not None), default=None)
        return Place(self.at, None if last is None else last + 1)

    @property
    def last_seq(self) -> int:
        """The highest place of acceptance in it."""
        return max(event.seq for event in self.events)


async def read_past(tx: Transaction, program_id: UUID, after: tuple[datetime, int], until: datetime) -> list[PastBatch]:
    """The next batches of the program's finished events after (processed_at, seq), up to `until`; none at the end.

    A batch comes whole, unless it has more events than any real one.
    """
    most = limits.SIMULATION_EVENTS
    params = {
        "organization_id": tx.organization_id,
        "program_id": program_id,
        "after_at": after[0],
        "after_seq": after[1],
        "until": until,
        "limit": most + 1,
    }
    rows = await (await tx.execute(_READ, params)).fetchall()
    events = [_past_event(row) for row in rows]
    if len(events) > most:
        # The one too many says which batch may go on beyond what was read.
        whole = [event for event in events if event.processed_at != events[-1].processed_at]
        events = whole or events[:most]
    return [PastBatch(_in_order(list(group))) for _, group in groupby(events, key=lambda e: e.processed_at)]


async def count_past(tx: Transaction, program_id: UUID, since: datetime, until: datetime) -> int:
    """How many finished events the range has; both instants are inclusive."""
    row = await (await tx.execute(_COUNT, (tx.organization_id, program_id, since, until))).fetchone()
    assert row is not None
    return int(row[0])


async def has_earlier(tx: Transaction, program_id: UUID, instant: datetime) -> bool:
    """Whether an event of the program ended before this instant."""
    row = await (await tx.execute(_HAS_EARLIER, (tx.organization_id, program_id, instant))).fetchone()
    assert row is not None
    return bool(row[0])


def _past_event(row: Sequence[Any]) -> PastEvent:
    seq, processed_at, is_completed, error, evaluations, first, last = row[11:]
    return PastEvent(QueuedEvent(*row[:11]), seq, processed_at, is_completed, error, evaluations or [], first, last)


def _in_order(events: list[PastEvent]) -> list[PastEvent]:
    """The events of a batch, which come by `seq`, as the batch took them.

    One that left no record had no effect, so it may stay behind the one that was accepted before it.
    """
    places: dict[UUID, str] = {}
    place = ""
    for past in events:
        place = past.evaluations[0]["id"] if past.evaluations else place
        places[past.event.id] = place
    return sorted(events, key=lambda past: (places[past.event.id], past.seq))
