"""The state that a batch of events reads and writes, in memory: tags, counters and attributes of participants, groups
and programs.

Actions change the stored state at once, yet an event's expressions see the state as it was before that event: the
`view`, which is brought up to date only when the event has succeeded. Every change is kept in a list, which is the undo
journal, the source of the state history, and what is written at the end. Contract: rules-and-events.md 4, holders.md 5.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple
from uuid import UUID

from domain.durations import parse_duration
from domain.money import EXACT, ZERO, format_plain

StateType = Literal["tag", "counter", "attribute"]


class CounterState(NamedTuple):
    """A counter as it is stored; whether its window has elapsed is a question of the time it is read at."""

    value: Decimal
    reset_after: str | None
    last_reset_at: datetime

    def effective(self, now: datetime) -> Decimal:
        """The value at `now`: 0 once the window has elapsed; at exact equality not yet. Contract: holders.md 5.4."""
        return ZERO if self.is_elapsed(now) else self.value

    def is_elapsed(self, now: datetime) -> bool:
        """Whether more time than `reset_after` has passed since the window began."""
        return self.reset_after is not None and now - self.last_reset_at > _window(self.reset_after)


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one tag, counter or attribute. `old` and `new` are the stored forms, None for absent."""

    holder: "Holder"
    state_type: StateType
    key: str
    old: Any
    new: Any
    event_id: UUID
    rule_id: UUID
    is_reset: bool = False


@dataclass(slots=True, eq=False)
class Holder:
    """The rule-visible state of one participant, group or program.

    A phantom stands for one that hasn't been loaded: what is done to it is undone again.
    """

    entity_type: Literal["PARTICIPANT", "GROUP", "PROGRAM"]
    id: UUID
    external_id: str | None = None
    status: str = "ACTIVE"
    name: str | None = None
    is_phantom: bool = False
    tags: set[str] = field(default_factory=set)
    counters: dict[str, CounterState] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    view: dict[str, Any] = field(default_factory=dict)
    _windowed: set[str] = field(default_factory=set)

    def open_view(self, now: datetime) -> None:
        """Build the view that expressions read from the stored state."""
        self.view = {
            "id": str(self.id),
            "external_id": self.external_id,
            "status": self.status,
            "tags": sorted(self.tags),
            "counters": {key: counter.effective(now) for key, counter in self.counters.items()},
            "attributes": dict(self.attributes),
            "tiers": {},
        }
        self._windowed = {key for key, counter in self.counters.items() if counter.reset_after is not None}

    def as_group(self, role: str) -> dict[str, Any]:
        """This group as expressions see it in `groups`, with the role that the participant has in it."""
        seen = {name: self.view[name] for name in ("id", "tags", "counters", "attributes", "tiers")}
        return seen | {"name": self.name, "role": role}

    def refresh_windows(self, now: datetime) -> None:
        """Let the view see counters whose window has elapsed by `now`."""
        for key in self._windowed:
            self.view["counters"][key] = self.counters[key].effective(now)

    def show(self, state_type: StateType, key: str, now: datetime) -> None:
        """Bring the view up to date with what is stored under this key; of tags with all of them."""
        if state_type == "tag":
            self.view["tags"] = sorted(self.tags)
        elif state_type == "attribute":
            self.view["attributes"][key] = self.attributes[key]
        else:
            counter = self.counters[key]
            self.view["counters"][key] = counter.effective(now)
            if counter.reset_after is None:
                self._windowed.discard(key)
            else:
                self._windowed.add(key)


@dataclass(slots=True)
class StateJournal:
    """Every state change of a batch in order; the newest ones can be undone."""

    changes: list[Change] = field(default_factory=list)

    def mark(self) -> int:
        """A point to which `undo` can go back."""
        return len(self.changes)

    def undo(self, mark: int) -> None:
        """Take back every change since `mark`, newest first."""
        while len(self.changes) > mark:
            change = self.changes.pop()
            _store(change.holder, change.state_type, change.key, change.old)

    def show(self, mark: int, now: datetime) -> None:
        """Let expressions see the changes made since `mark`: what was changed often is brought up to date once."""
        changed = {(c.holder, c.state_type, "" if c.state_type == "tag" else c.key) for c in self.changes[mark:]}
        for holder, state_type, key in changed:
            holder.show(state_type, key, now)

    def tag(self, holder: Holder, tag: str, event_id: UUID, rule_id: UUID) -> None:
        """Add a tag; one that is there already is left alone. Contract: rules-and-events.md 5.10."""
        if tag not in holder.tags:
            self._change(Change(holder, "tag", tag, None, tag, event_id, rule_id))

    def untag(self, holder: Holder, tag: str, event_id: UUID, rule_id: UUID) -> None:
        """Remove a tag; an absent one is left alone. Contract: rules-and-events.md 5.10."""
        if tag in holder.tags:
            self._change(Change(holder, "tag", tag, tag, None, event_id, rule_id))

    def set_attribute(self, holder: Holder, key: str, value: str, event_id: UUID, rule_id: UUID) -> None:
        """Set an attribute; the same value again leaves no trace. Contract: rules-and-events.md 5.12."""
        old = holder.attributes.get(key)
        if old != value:
            self._change(Change(holder, "attribute", key, old, value, event_id, rule_id))

    def add_to_counter(
        self,
        holder: Holder,
        key: str,
        amount: Decimal,
        reset_after: str | None,
        now: datetime,
        event_id: UUID,
        rule_id: UUID,
    ) -> Decimal:
        """Add `amount` to a counter and return its new value. Contract: rules-and-events.md 5.11, holders.md 5.4.

        `reset_after` configures the window when given, `""` removes it, None leaves it.
        """
        old = holder.counters.get(key)
        if old is not None and old.is_elapsed(now):
            reset = CounterState(ZERO, old.reset_after, now)
            self._change(Change(holder, "counter", key, old, reset, event_id, rule_id, is_reset=True))
            old = reset
        window = (old.reset_after if old else None) if reset_after is None else (reset_after or None)
        new = CounterState(EXACT.add(old.value if old else ZERO, amount), window, old.last_reset_at if old else now)
        if new != old:
            self._change(Change(holder, "counter", key, old, new, event_id, rule_id))
        return new.value

    def _change(self, change: Change) -> None:
        _store(change.holder, change.state_type, change.key, change.new)
        self.changes.append(change)


def history_value(state_type: StateType, stored: Any) -> str | None:
    """A stored value as the state history shows it."""
    if stored is None:
        return None
    return format_plain(stored.value) if state_type == "counter" else str(stored)


def history_operation(change: Change) -> str:
    """The operation that the state history names. Contract: holders.md 5.5."""
    if change.is_reset:
        return "auto_reset"
    if change.state_type == "tag":
        return "remove" if change.new is None else "add"
    return "set"


def _store(holder: Holder, state_type: StateType, key: str, stored: Any) -> None:
    if state_type == "tag":
        if stored is None:
            holder.tags.discard(key)
        else:
            holder.tags.add(key)
        return
    values: dict[str, Any] = holder.counters if state_type == "counter" else holder.attributes
    if stored is None:
        values.pop(key, None)
    else:
        values[key] = stored


_WINDOWS: dict[str, timedelta] = {}


def _window(reset_after: str) -> timedelta:
    window = _WINDOWS.get(reset_after)
    if window is None:
        if len(_WINDOWS) > 1_000:
            _WINDOWS.clear()
        window = _WINDOWS[reset_after] = parse_duration(reset_after)
    return window
