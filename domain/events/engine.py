"""One event against one rule set, in memory: conditions, actions, the record of what happened.

No I/O: everything an event may read or write has been loaded into a `World`, and whatever is missing there is reported
as a `Reference` for the batch to load. A failing event is undone to the last trace. Contract: rules-and-events.md 4, 5.
"""

import decimal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from domain import limits
from domain.clock import format_timestamp
from domain.events.world import Holder, StateJournal
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.books import Books
from domain.ledger.movements import Cause, Position
from domain.money import ZERO, fits_scale, fits_size, format_amount, format_plain
from domain.rules import results
from domain.rules.cel import Activation, EvaluationError, EvaluationLimit, evaluate_condition
from domain.rules.compiled import Action, CompiledRule, RuleSet, Target

BLOCKED_WHEN_INACTIVE = frozenset({"CREDIT", "DEBIT", "HOLD", "RELEASE", "FORFEIT", "COUNTER"})
"""Actions that fail on a SUSPENDED or CLOSED participant. Contract: rules-and-events.md 5.3."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """An event as the queue hands it over; `data` is the payload with Decimals."""

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
    """A participant that an event names, by exactly one of its identifiers."""

    id: UUID | None = None
    external_id: str | None = None


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


@dataclass(slots=True)
class World:
    """Everything loaded for a batch.

    `known` are the references that were looked up, found or not; `missing` those that events reached for beyond them;
    `reached` all that events reached for. `created` are the participants that were made for this batch.
    """

    program: Holder
    participants: dict[UUID, Holder]
    by_external_id: dict[str, Holder]
    known: set[Reference]
    assets: dict[UUID, AssetTerms]
    books: Books
    state: StateJournal = field(default_factory=StateJournal)
    created: set[UUID] = field(default_factory=set)
    missing: set[Reference] = field(default_factory=set)
    reached: set[Reference] = field(default_factory=set)

    def find(self, reference: Reference) -> Holder | None:
        """The participant behind `reference`, None if there is no such one.

        One that was never looked up is noted in `missing` and answered with a phantom, so that a single pass learns of
        everything an event reaches for; what the event did is undone then.
        """
        self.reached.add(reference)
        if reference.id is not None:
            found = self.participants.get(reference.id)
        else:
            assert reference.external_id is not None
            found = self.by_external_id.get(reference.external_id)
        if found is None and reference not in self.known:
            self.missing.add(reference)
            phantom = Holder("PARTICIPANT", new_id(), reference.external_id)
            phantom.open_view(EPOCH)
            return phantom
        return found


class ActionFailed(Exception):
    """An action that can't be done. `curable` when a later credit may cure it, so that a retry makes sense."""

    def __init__(self, cause: str, *, curable: bool = False) -> None:
        super().__init__(cause)
        self.curable = curable


@dataclass(slots=True)
class Outcome:
    """What became of one attempt: its verdict, and the evaluation records as they are stored."""

    event: QueuedEvent
    verdict: Literal["COMPLETED", "FAILED", "RETRY"]
    participant_id: UUID | None = None
    recipient_id: UUID | None = None
    error: str | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    matched: list[UUID] = field(default_factory=list)


def apply_event(world: World, rules: RuleSet, event: QueuedEvent, now: datetime) -> Outcome | None:
    """Apply one event to the world; afterwards the world holds all of its effects or none.

    `now` is the wall clock, for rule windows and counter windows; expressions see the event's own timestamp.
    None when the event reached for a participant that isn't loaded: it must be applied again to a larger world.
    """
    books_mark, state_mark, missing = world.books.mark(), world.state.mark(), len(world.missing)
    outcome = _Evaluation(world, rules, event, now).run()
    if outcome.verdict != "COMPLETED" or len(world.missing) > missing:
        world.books.undo(books_mark)
        world.state.undo(state_mark)
        return None if len(world.missing) > missing else outcome
    for change in world.state.since(state_mark):
        change.holder.show(change, now)
    return outcome


class _Evaluation:
    """One event on its way through the rules."""

    def __init__(self, world: World, rules: RuleSet, event: QueuedEvent, now: datetime) -> None:
        self.world = world
        self.rules = rules
        self.event = event
        self.now = now
        self.now_text = format_timestamp(now)
        self.ends_at = time.monotonic() + limits.EVENT_MS / 1000

    def run(self) -> Outcome:
        event = self.event
        try:
            self.participant = self._resolve(Reference(event.participant_id, event.external_id))
            self.recipient = self._resolve_recipient()
        except ActionFailed as error:
            return Outcome(event, "FAILED", error=str(error))
        outcome = Outcome(
            event,
            "COMPLETED",
            participant_id=self.participant.id,
            recipient_id=self.recipient.id if self.recipient is not self.participant else None,
        )
        self.participant.refresh_windows(self.now)
        self.world.program.refresh_windows(self.now)
        self.activation = Activation(
            event=self._visible_data(),
            participant=self.participant.view,
            program=self.world.program.view,
            groups=[],
            group=None,
            now=event.timestamp,
        )
        for rule in self.rules.candidates(event.data.get("type")):
            matched = self._apply_rule(rule, outcome)
            if outcome.verdict != "COMPLETED" or (matched and rule.stop_after_match):
                break
        return outcome

    def _resolve(self, reference: Reference) -> Holder:
        if reference.id is not None and reference.external_id is not None:
            reference = Reference(id=reference.id)
        found = self.world.find(reference)
        if found is None:
            raise ActionFailed("unknown participant")
        return found

    def _resolve_recipient(self) -> Holder:
        event = self.event
        if event.recipient_id is None and event.recipient_external_id is None:
            return self.participant
        try:
            return self._resolve(Reference(event.recipient_id, event.recipient_external_id))
        except ActionFailed:
            raise ActionFailed("unknown recipient") from None

    def _visible_data(self) -> dict[str, Any]:
        """The payload as expressions see it: with the recipient's identifiers, where the payload has no such key."""
        event = self.event
        if event.recipient_id is None and event.recipient_external_id is None:
            return event.data
        extra: dict[str, Any] = {"recipient_id": str(self.recipient.id)}
        if self.recipient.external_id is not None:
            extra["recipient_external_id"] = self.recipient.external_id
        return extra | event.data

    def _apply_rule(self, rule: CompiledRule, outcome: Outcome) -> bool:
        """Evaluate one rule and run its actions; whether it matched."""
        if not rule.is_open(self.now):
            outcome.evaluations.append(self._record(rule, "SKIPPED", reason="OUTSIDE_TIME_WINDOW"))
            return False
        if time.monotonic() > self.ends_at:
            # A thousand slow rules, each within its own limit, must not hold up everybody else's events.
            outcome.evaluations.append(self._record(rule, "SKIPPED_TIMEOUT", error_message="the event took too long"))
            return False
        try:
            if not evaluate_condition(rule.condition, self.activation):
                return False
        except EvaluationLimit as error:
            outcome.evaluations.append(self._record(rule, "SKIPPED_TIMEOUT", error_message=str(error)))
            return False
        except EvaluationError as error:
            outcome.evaluations.append(self._record(rule, "SKIPPED_ERROR", error_message=str(error)))
            return False
        outcome.matched.append(rule.id)
        ran: list[dict[str, Any]] = []
        for action in rule.actions:
            try:
                ran.append(self._run_action(rule, action))
            except ActionFailed as failure:
                cause = f"action {action.type} failed: {failure}"
                outcome.verdict = "RETRY" if failure.curable else "FAILED"
                outcome.error = cause
                outcome.evaluations.append(self._record(rule, "FAILED", error_message=cause))
                return True
        outcome.evaluations.append(self._record(rule, "SUCCESS", actions=ran))
        return True

    def _record(self, rule: CompiledRule, status: str, **more: Any) -> dict[str, Any]:
        return {
            "id": new_id(),
            "rule_id": rule.id,
            "rule_name": rule.name,
            "rule_history_id": rule.history_id,
            "status": status,
            "created_at": self.now_text,
            **more,
        }

    def _run_action(self, rule: CompiledRule, action: Action) -> dict[str, Any]:
        try:
            holder = self._target(action)
            if holder.status != "ACTIVE" and action.type in BLOCKED_WHEN_INACTIVE:
                raise ActionFailed(f"participant is {holder.status}")
            return _HANDLERS[action.type](self, rule, action, holder)
        except results.BadResult as bad:
            raise ActionFailed(str(bad)) from None

    def _target(self, action: Action) -> Holder:
        target = action.target
        if target is None:
            return self.recipient if action.asset_id is not None else self.participant
        if target.type == "PROGRAM":
            return self.world.program
        return self._target_participant(target)

    def _target_participant(self, target: Target) -> Holder:
        text = results.target_text(target, self.activation)
        if text is None:
            reference = Reference(id=target.id)
        elif target.external_id is not None:
            reference = Reference(external_id=text)
        else:
            reference = Reference(id=_uuid(text))
        found = self.world.find(reference)
        if found is None:
            raise ActionFailed("target participant not found")
        return found

    # --- actions -------------------------------------------------------------------------------------------------

    def _credit(self, rule: CompiledRule, action: Action, holder: Holder) -> dict[str, Any]:
        asset, amount = self._amount(action)
        entry_id = None
        if amount != ZERO:
            position = Position("PARTICIPANT", holder.id, asset.id, asset.has_lots)
            source = self._source(asset, amount)
            entry_id = movements.credit(self.world.books, position, self._cause(rule, action), amount, source).id
        return self._asset_result(action, asset, amount, holder, entry_id)

    def _debit(self, rule: CompiledRule, action: Action, holder: Holder) -> dict[str, Any]:
        asset, amount = self._amount(action)
        entry_id = None
        if amount != ZERO:
            account = self.world.books.account("PARTICIPANT", holder.id, asset.id, "AVAILABLE")
            # What a holder has that isn't loaded yet is unknown: this pass goes on, to learn whom else the event names.
            is_short = account.balance < amount and holder.id in self.world.participants
            if is_short and not action.allow_negative:
                raise ActionFailed("insufficient balance", curable=True)
            position = Position("PARTICIPANT", holder.id, asset.id, asset.has_lots)
            cause = self._cause(rule, action)
            entry_id = movements.debit(self.world.books, position, cause, amount, allow_negative=True).id
        return self._asset_result(action, asset, amount, holder, entry_id)

    def _tag(self, rule: CompiledRule, action: Action, holder: Holder) -> dict[str, Any]:
        assert action.tag is not None
        self.world.state.tag(holder, action.tag, self.event.id, rule.id)
        return {"type": action.type, "tag": action.tag, "target": _target_result(holder)}

    def _untag(self, rule: CompiledRule, action: Action, holder: Holder) -> dict[str, Any]:
        assert action.tag is not None
        self.world.state.untag(holder, action.tag, self.event.id, rule.id)
        return {"type": action.type, "tag": action.tag, "target": _target_result(holder)}

    def _counter(self, rule: CompiledRule, action: Action, holder: Holder) -> dict[str, Any]:
        assert action.key is not None
        amount = results.increment(action, self.activation)
        try:
            value = self.world.state.add_to_counter(
                holder, action.key, amount, action.reset_after, self.now, self.event.id, rule.id
            )
        except decimal.Inexact:
            raise ActionFailed("counter out of range") from None
        if not (fits_size(value) and fits_scale(value, limits.COUNTER_DECIMALS)):
            raise ActionFailed("counter out of range")
        return {
            "type": action.type,
            "key": action.key,
            "value": format_plain(amount),
            "new_value": format_plain(value),
            "target": _target_result(holder),
        }

    def _set_attribute(self, rule: CompiledRule, action: Action, holder: Holder) -> dict[str, Any]:
        assert action.key is not None
        value = results.attribute(action, self.activation)
        self.world.state.set_attribute(holder, action.key, value, self.event.id, rule.id)
        return {"type": action.type, "key": action.key, "value": value, "target": _target_result(holder)}

    # --- values --------------------------------------------------------------------------------------------------

    def _amount(self, action: Action) -> tuple[AssetTerms, Decimal]:
        """The asset and the amount of an asset action, checked. Contract: rules-and-events.md 5.4."""
        assert action.asset_id is not None, "checked when the rule was saved"
        asset = self.world.assets.get(action.asset_id)
        if asset is None or not asset.is_linked:
            raise ActionFailed("asset is not linked to the program")
        if asset.is_archived:
            raise ActionFailed("asset is archived")
        amount = results.amount(action, self.activation, asset.scale)
        if asset.max_transaction_amount is not None and amount > asset.max_transaction_amount:
            raise ActionFailed("amount exceeds max_transaction_amount")
        return asset, amount.copy_abs()  # a negative zero prints as zero

    def _source(self, asset: AssetTerms, amount: Decimal) -> Any:
        """The account a credit is drawn from. Contract: basics.md 6.6."""
        if not asset.is_prefunded:
            return self.world.books.system("SYSTEM_ISSUANCE", asset.id)
        wallet = self.world.books.account("PROGRAM", self.world.program.id, asset.id, "AVAILABLE")
        if wallet.balance < amount:
            raise ActionFailed("insufficient program balance", curable=True)
        return wallet

    def _cause(self, rule: CompiledRule, action: Action) -> Cause:
        return Cause(
            new_id(),
            self.world.program.id,
            self.now,
            description=action.description or rule.name,
            event_id=self.event.id,
            rule_id=rule.id,
            request_id=self.event.request_id,
        )

    def _asset_result(
        self, action: Action, asset: AssetTerms, amount: Decimal, holder: Holder, entry_id: UUID | None
    ) -> dict[str, Any]:
        result = {
            "type": action.type,
            "asset_id": asset.id,
            "amount": format_amount(amount, asset.scale),
            "target": _target_result(holder),
        }
        if entry_id is not None:
            result["journal_entry_id"] = entry_id
        return result


def _target_result(holder: Holder) -> dict[str, Any]:
    return {"type": holder.entity_type, "id": holder.id}


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ActionFailed("target.participant_id is not a UUID") from None


_Handler = Callable[[_Evaluation, CompiledRule, Action, Holder], dict[str, Any]]

_HANDLERS: dict[str, _Handler] = {
    "CREDIT": _Evaluation._credit,
    "DEBIT": _Evaluation._debit,
    "TAG": _Evaluation._tag,
    "UNTAG": _Evaluation._untag,
    "COUNTER": _Evaluation._counter,
    "SET_ATTRIBUTE": _Evaluation._set_attribute,
}
