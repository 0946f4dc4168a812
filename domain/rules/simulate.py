"""A rule tried out on an event that never happened; nothing is persisted. Contract: rules-and-events.md 8.1.

Only the condition decides: window, budgets and the rule's status are not considered. `now` is the wall clock. The
participant is what the caller says, parts left out are empty; program and groups are empty.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

from db.session import Transaction
from db.tables import Rule
from domain import money
from domain.clock import format_timestamp
from domain.durations import format_duration
from domain.errors import Refusal
from domain.rules import results
from domain.rules.actions import Action, parse_actions
from domain.rules.cel import Activation, EvaluationError, ExpressionError, compile_expression, evaluate_condition

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SimulatedState:
    """The participant's state that the simulation assumes; tags lower-case, counters exact."""

    tags: Sequence[str] = ()
    counters: Mapping[str, Decimal] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How it went: `status` is `evaluated` or `condition_failed` (with a `reason`); `results` only when matched."""

    matched: bool
    status: str
    reason: str | None = None
    results: list[Result] | None = None


@dataclass(frozen=True, slots=True)
class _Asset:
    symbol: str
    scale: int


async def simulate_rule(tx: Transaction, rule: Rule, event: Mapping[str, Any], state: SimulatedState) -> Evaluation:
    """What `rule` would do with an event of these data. Reads the symbols and scales of its assets, writes nothing.

    Evaluates in a thread: a hundred actions may each use up the time of an expression, and nobody must wait for that.
    """
    activation = _activation(tx, event, state)
    try:
        actions = await asyncio.to_thread(_match, rule, activation)
    except (ExpressionError, EvaluationError) as error:
        return Evaluation(False, "condition_failed", str(error))
    except Refusal as refusal:
        # Saved under other limits than today's: the rule would not run either.
        return Evaluation(False, "condition_failed", refusal.problems[0].message)
    if actions is None:
        return Evaluation(False, "evaluated")
    run = _Run(activation, state, await _load_assets(tx, actions))
    return Evaluation(True, "evaluated", results=await asyncio.to_thread(run.results, actions))


def _match(rule: Rule, activation: Activation) -> tuple[Action, ...] | None:
    """The rule's actions if its condition is true, else None."""
    matched = evaluate_condition(compile_expression(rule.condition), activation)
    return parse_actions(rule.actions) if matched else None


def _activation(tx: Transaction, event: Mapping[str, Any], state: SimulatedState) -> Activation:
    participant = {
        "tags": sorted(set(state.tags)),
        "counters": dict(state.counters),
        "attributes": dict(state.attributes),
        "tiers": {},
    }
    program: dict[str, Any] = {"tags": [], "counters": {}, "attributes": {}}
    return Activation(event=dict(event), participant=participant, program=program, groups=[], group=None, now=tx.now)


async def _load_assets(tx: Transaction, actions: Sequence[Action]) -> dict[UUID, _Asset]:
    asset_ids = sorted({action.asset_id for action in actions if action.asset_id is not None})
    found = await tx.rows(
        "select id, symbol, scale from asset where organization_id = %s and id = any(%s)",
        [tx.organization_id, asset_ids],
    )
    return {row["id"]: _Asset(row["symbol"], row["scale"]) for row in found}


@dataclass(frozen=True, slots=True)
class _Run:
    """The results of one simulated event's actions."""

    activation: Activation
    state: SimulatedState
    assets: Mapping[UUID, _Asset]

    def results(self, actions: Sequence[Action]) -> list[Result]:
        """Each action as stored, with its result."""
        return [{"action": action.raw, "result": self._result(action)} for action in actions]

    def _result(self, action: Action) -> Result:
        """The result of one action; `{error}` where something in it cannot be computed."""
        try:
            return _RESULTS[action.type](self, action)
        except results.BadResult as error:
            return {"error": f"action {action.type} failed: {error}"}

    def _credit(self, action: Action) -> Result:
        return self._movement(action, "Credit", "to")

    def _debit(self, action: Action) -> Result:
        return self._movement(action, "Debit", "from")

    def _hold(self, action: Action) -> Result:
        return self._movement(action, "Hold", "of")

    def _release(self, action: Action) -> Result:
        return self._movement(action, "Release", "of")

    def _forfeit(self, action: Action) -> Result:
        return self._movement(action, "Forfeit", "of")

    def _void_hold(self, action: Action) -> Result:
        return {"error": "VOID_HOLD is not supported in simulation"}

    def _movement(self, action: Action, verb: str, preposition: str) -> Result:
        """A balance action; `amount` is absent where everything that matches is meant."""
        assert action.asset_id is not None, "checked when the rule was saved"
        asset = self.assets[action.asset_id]
        shown: Result = {"asset_symbol": asset.symbol}
        what = "all held" if action.bucket == "HELD" or action.type == "RELEASE" else "all"
        if action.amount is not None:
            what = money.format_amount(results.amount(action, self.activation, asset.scale), asset.scale)
            shown["amount"] = what
        terms = "".join(f", {term}" for term in self._terms(action))
        shown["description"] = f"{verb} {what} {asset.symbol} {preposition} {self._whom(action)}{terms}"
        return shown

    def _terms(self, action: Action) -> Iterator[str]:
        """What a balance action says beside asset, amount and holder, counted from now."""
        now = self.activation.now
        if action.bucket == "HELD":
            yield "in HELD"
        reference = results.reference(action, self.activation)
        if reference is not None:
            yield f"reference {reference}"
        expires_at, matures_at = results.lot_terms(action, self.activation, now)
        if matures_at is not None:
            yield f"matures {format_timestamp(matures_at)}"
        if expires_at is not None:
            yield f"expires {format_timestamp(expires_at)}"
        if action.hold_until is not None:
            held_until = results.instant(action.hold_until, "hold_until", self.activation, now)
            yield f"held until {format_timestamp(held_until)}"

    def _counter(self, action: Action) -> Result:
        assert action.key is not None, "checked when the rule was saved"
        value = results.increment(action, self.activation)
        shown: Result = {
            "value": money.format_plain(value),
            "description": f"Add {money.format_plain(value)} to counter {action.key} of {self._whom(action)}",
        }
        if action.target is None:
            current = self.state.counters.get(action.key, money.ZERO)
            shown["current_value"] = money.format_plain(current)
            shown["projected_value"] = money.format_plain(money.add(current, value))
        return shown

    def _tag(self, action: Action) -> Result:
        shown: Result = {"description": f"Add tag {action.tag} to {self._whom(action)}"}
        if action.target is None:
            shown |= {"current_tags": sorted(set(self.state.tags)), "would_add": action.tag not in self.state.tags}
        return shown

    def _untag(self, action: Action) -> Result:
        shown: Result = {"description": f"Remove tag {action.tag} from {self._whom(action)}"}
        if action.target is None:
            shown |= {"current_tags": sorted(set(self.state.tags)), "would_remove": action.tag in self.state.tags}
        return shown

    def _set_attribute(self, action: Action) -> Result:
        assert action.key is not None, "checked when the rule was saved"
        value = results.attribute(action, self.activation)
        shown: Result = {"description": f'Set attribute {action.key} of {self._whom(action)} to "{value}"'}
        if action.target is None:
            current = self.state.attributes.get(action.key)
            shown |= {"current_value": current, "would_change": current != value}
        return shown

    def _schedule_event(self, action: Action) -> Result:
        assert action.delay is not None, "checked when the rule was saved"
        delay = format_duration(action.delay)
        return {"description": f"Schedule event {action.event_name} for {self._whom(action)} in {delay}"}

    def _broadcast(self, action: Action) -> Result:
        return {"description": f"Broadcast event {action.event_name} to every active participant of program"}

    def _whom(self, action: Action) -> str:
        target = action.target
        if target is None:
            return "participant"
        if target.type == "PROGRAM":
            return "program" if target.id is None else f"program {target.id}"
        if target.type == "GROUP":
            return f"group {results.group_id(target, self.activation)}"
        return f"participant {target.id or results.target_text(target, self.activation)}"


_RESULTS: dict[str, Callable[[_Run, Action], Result]] = {
    "CREDIT": _Run._credit,
    "DEBIT": _Run._debit,
    "HOLD": _Run._hold,
    "RELEASE": _Run._release,
    "FORFEIT": _Run._forfeit,
    "VOID_HOLD": _Run._void_hold,
    "TAG": _Run._tag,
    "UNTAG": _Run._untag,
    "COUNTER": _Run._counter,
    "SET_ATTRIBUTE": _Run._set_attribute,
    "SCHEDULE_EVENT": _Run._schedule_event,
    "BROADCAST": _Run._broadcast,
}
