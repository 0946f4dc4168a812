"""One event against one rule set, in memory: conditions, actions, the record of what happened.

No I/O: everything an event may read or write has been loaded into a `World`, and whatever is missing there is noted in
it for the batch to load. A failing event is undone to the last trace. Contract: rules-and-events.md 4, 5.
"""

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from domain import limits
from domain.clock import format_timestamp
from domain.events.effects import ActionFailed, Call, perform
from domain.events.state import Holder
from domain.events.world import QueuedEvent, Reference, World
from domain.ids import new_id
from domain.rules import results
from domain.rules.cel import Activation, EvaluationError, EvaluationLimit, evaluate_condition
from domain.rules.compiled import Action, CompiledRule, RuleSet, Target
from domain.rules.fields import parse_uuid

_NEEDS_NOBODY = frozenset({"SCHEDULE_EVENT", "BROADCAST"})
_MADE = ("journal_entry_id", "hold_id", "automation_id")


@dataclass(slots=True)
class Outcome:
    """What became of one attempt: its verdict, and the evaluation records as they are stored; how many actions ran."""

    event: QueuedEvent
    verdict: Literal["COMPLETED", "FAILED", "RETRY"]
    participant_id: UUID | None = None
    recipient_id: UUID | None = None
    error: str | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    matched: list[UUID] = field(default_factory=list)
    actions: int = 0


def apply_event(world: World, rules: RuleSet, event: QueuedEvent, now: datetime) -> Outcome | None:
    """Apply one event to the world; afterwards the world holds all of its effects or none.

    `now` is the wall clock, for rule windows, budgets and counter windows; expressions see the event's own timestamp.
    None when the event reached for what isn't loaded: it must be applied again to a larger world.
    """
    mark, unmet = world.mark(), world.unmet()
    outcome = _Evaluation(world, rules, event, now).run()
    if world.unmet() > unmet:
        world.undo(mark)
        return None
    if outcome.verdict != "COMPLETED":
        world.undo(mark)
        _forget_effects(outcome)
        return outcome
    world.state.show(mark.state, now)
    return outcome


def _forget_effects(outcome: Outcome) -> None:
    """The records of a failed attempt stay, but what they named has never come to be."""
    for record in outcome.evaluations:
        for result in record.get("actions", ()):
            for name in _MADE:
                result.pop(name, None)


class _Evaluation:
    """One event on its way through the rules."""

    def __init__(self, world: World, rules: RuleSet, event: QueuedEvent, now: datetime) -> None:
        self.world = world
        self.rules = rules
        self.event = event
        self.now = now
        self.now_text = format_timestamp(now)
        self.unmet = world.unmet()
        # Computing time of this thread: a worker that stands still for a while must not change what anybody gets.
        self.ends_at = time.thread_time() + limits.EVENT_MS / 1000

    def run(self) -> Outcome:
        event = self.event
        try:
            self.participant = self._resolve(Reference(event.participant_id, event.external_id), "participant")
            self.recipient = self._resolve_recipient()
        except ActionFailed as error:
            return Outcome(event, "FAILED", error=str(error))
        outcome = Outcome(event, "COMPLETED", participant_id=self.participant.id if self.participant else None)
        if self.recipient is not None and self.recipient is not self.participant:
            outcome.recipient_id = self.recipient.id
        self.activation = self._activation()
        for rule in self.rules.candidates(event.data.get("type")):
            if time.thread_time() > self.ends_at:
                # A thousand slow rules, each within its own limit, must not hold up everybody else's events. What the
                # rest of them would have done is unknown, so nothing is done at all.
                outcome.verdict, outcome.error = "FAILED", f"the rules compute for longer than {limits.EVENT_MS} ms"
                break
            matched = self._apply_rule(rule, outcome)
            if outcome.verdict != "COMPLETED" or (matched and rule.stop_after_match):
                break
        return outcome

    def _resolve(self, reference: Reference, what: str) -> Holder | None:
        """Whom the event names, by id where it gives both; None where it names nobody."""
        if reference.id is None and reference.external_id is None:
            return None
        if reference.id is not None:
            reference = Reference(id=reference.id)
        found = self.world.find(reference)
        if found is None:
            raise ActionFailed(f"unknown {what}")
        return found

    def _resolve_recipient(self) -> Holder | None:
        event = self.event
        named = self._resolve(Reference(event.recipient_id, event.recipient_external_id), "recipient")
        return named or self.participant

    def _activation(self) -> Activation:
        world = self.world
        world.program.refresh_windows(self.now)
        groups: list[dict[str, Any]] = []
        if self.participant is not None:
            self.participant.refresh_windows(self.now)
            for group, role in world.memberships.get(self.participant.id, ()):
                group.refresh_windows(self.now)
                groups.append(group.as_group(role))
        return Activation(
            event=self._visible_data(),
            participant=self.participant.view if self.participant is not None else None,
            program=world.program.view,
            groups=groups,
            group=groups[0] if groups else None,
            now=self.event.timestamp,
        )

    def _visible_data(self) -> dict[str, Any]:
        """The payload as expressions see it: with the recipient's identifiers, where the payload has no such key."""
        event = self.event
        if self.recipient is None or (event.recipient_id is None and event.recipient_external_id is None):
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
        self._run_actions(rule, outcome)
        return True

    def _run_actions(self, rule: CompiledRule, outcome: Outcome) -> None:
        """Run the actions of a rule that matched, and record what came of them."""
        ran: list[dict[str, Any]] = []
        for action in rule.actions:
            try:
                self._count_action(outcome)
                holder = self._target(action)
                result = perform(Call(self.world, self.event, rule, action, holder, self.activation, self.now))
            except ActionFailed as failure:
                if self.world.unmet() > self.unmet:
                    # It may have failed for want of what isn't loaded. The pass goes on, to learn what else is wanted.
                    continue
                cause = f"action {action.type} failed: {failure}"
                outcome.verdict = "RETRY" if failure.curable else "FAILED"
                outcome.error = cause
                outcome.evaluations.append(self._record(rule, "FAILED", error_message=cause))
                return
            if result is not None:
                ran.append(result)
        if len(ran) < len(rule.actions):
            record = self._record(rule, "SKIPPED", reason="BUDGET_EXCEEDED", actions=ran)
        else:
            record = self._record(rule, "SUCCESS", actions=ran)
        outcome.evaluations.append(record)

    def _count_action(self, outcome: Outcome) -> None:
        outcome.actions += 1
        if outcome.actions > limits.ACTIONS_PER_EVENT:
            raise ActionFailed(f"more than {limits.ACTIONS_PER_EVENT} actions for one event")

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

    def _target(self, action: Action) -> Holder | None:
        """Whom the action is directed at. Contract: rules-and-events.md 5.2."""
        if action.target is not None:
            return self._named(action.target)
        holder = self.recipient if action.asset_id is not None else self.participant
        if holder is None and action.type not in _NEEDS_NOBODY:
            raise ActionFailed("the event has no participant")
        return holder

    def _named(self, target: Target) -> Holder:
        if target.type == "PROGRAM" and target.id in (None, self.world.program.id):
            return self.world.program
        found = self.world.find(self._reference(target))
        if found is None:
            raise ActionFailed(f"target {target.type.lower()} not found")
        return found

    def _reference(self, target: Target) -> Reference:
        try:
            if target.type == "PROGRAM":
                return Reference(id=target.id, kind="PROGRAM")
            if target.type == "GROUP":
                return Reference(id=target.id or results.group_id(target, self.activation), kind="GROUP")
            text = results.target_text(target, self.activation)
        except results.BadResult as bad:
            raise ActionFailed(str(bad)) from None
        if text is None:
            return Reference(id=target.id)
        if target.external_id is not None:
            return Reference(external_id=text)
        return Reference(id=_uuid(text))


def _uuid(text: str) -> UUID:
    found = parse_uuid(text)
    if found is None:
        raise ActionFailed("target.participant_id is not a UUID")
    return found
