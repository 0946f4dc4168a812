"""The rules of a program as the engine runs them: immutable, compiled once per version, indexed by event type.

Contract: rules-and-events.md 4. A rule set may be shared by threads: nothing in it changes but a cache of tuples.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlmodel import col, select

from db.session import Transaction
from db.tables import Rule
from domain.errors import Refusal
from domain.rules.actions import Action, Target, parse_actions
from domain.rules.budgets import rules_with_budgets
from domain.rules.cel import Expression, ExpressionError, compile_expression

__all__ = ["Action", "CompiledRule", "RuleSet", "Target", "load_rule_set"]

logger = logging.getLogger("scrip.rules")

Bucket = Literal["AVAILABLE", "HELD"]

RULE_SETS_CACHED = 256
TYPES_CACHED = 1_024


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """One version of a rule; `history_id` names that version in evaluations."""

    id: UUID
    name: str
    history_id: UUID
    order: int
    stop_after_match: bool
    active_from: datetime | None
    active_to: datetime | None
    condition: Expression
    actions: tuple[Action, ...]

    def is_open(self, at: datetime) -> bool:
        """Whether the window is open at the wall-clock time `at`. Contract: rules-and-events.md 2.4."""
        return (self.active_from is None or self.active_from <= at) and (self.active_to is None or at < self.active_to)

    def expressions(self) -> Iterable[Expression]:
        """The condition and every expression of the actions."""
        yield self.condition
        for action in self.actions:
            yield from action.expressions()


class RuleSet:
    """The ACTIVE rules of one version of a program, in their order, and what they can reach.

    `has_targets`: some action is directed at somebody whom its target names. `uses_program_state`: some expression
    reads `program`, or some action writes it. `reads_groups`: some expression reads the participant's groups. `keys` says
    which counters and attributes of participants, groups and programs are read or written. `taking` are the (asset,
    bucket) pairs that actions take value from. `budgeted` are the rules that have budgets.
    """

    def __init__(
        self, program_id: UUID, version: int, rules: Iterable[CompiledRule], budgeted: Collection[UUID] = ()
    ) -> None:
        self.program_id = program_id
        self.version = version
        self.budgeted = tuple(sorted(budgeted))
        self.rules = tuple(sorted(rules, key=lambda rule: rule.order))
        self._any_type = tuple(rule for rule in self.rules if rule.condition.event_types is None)
        self._indexed_types = frozenset(
            event_type for rule in self.rules for event_type in rule.condition.event_types or ()
        )
        self._by_type: dict[str, tuple[CompiledRule, ...]] = {}

        actions = [action for rule in self.rules for action in rule.actions]
        paths = {path for rule in self.rules for expression in rule.expressions() for path in expression.references}
        directed: dict[str, list[Action]] = {"PARTICIPANT": [], "GROUP": [], "PROGRAM": []}
        for action in actions:
            directed[action.target.type if action.target is not None else "PARTICIPANT"].append(action)
        self.asset_ids = frozenset(action.asset_id for action in actions if action.asset_id is not None)
        self.taking = frozenset(pair for action in actions for pair in _takes_from(action))
        self.has_targets = any(
            action.target is not None and (action.target.type != "PROGRAM" or action.target.id not in (None, program_id))
            for action in actions
        )
        self.uses_program_state = bool(directed["PROGRAM"]) or any(path[0] == "program" for path in paths)
        self.reads_groups = any(path[0] in ("group", "groups") for path in paths)
        self.keys = {
            "PARTICIPANT": Keys.of(paths, "participant", directed["PARTICIPANT"]),
            "GROUP": Keys.of(paths, "group", directed["GROUP"]),
            "PROGRAM": Keys.of(paths, "program", directed["PROGRAM"]),
        }

    def candidates(self, event_type: object) -> Sequence[CompiledRule]:
        """The rules whose condition could be true for an event of this type, in order.

        An event whose type is no string meets all rules, so that each can say what it misses.
        """
        if not isinstance(event_type, str):
            return self.rules
        if event_type not in self._indexed_types:
            return self._any_type
        found = self._by_type.get(event_type)
        if found is None:
            found = tuple(rule for rule in self.rules if _admits(rule, event_type))
            if len(self._by_type) >= TYPES_CACHED:
                self._by_type.clear()
            self._by_type[event_type] = found
        return found


def _admits(rule: CompiledRule, event_type: str) -> bool:
    types = rule.condition.event_types
    return types is None or event_type in types


_IN_HELD = frozenset({"RELEASE", "VOID_HOLD"})


def _takes_from(action: Action) -> Iterable[tuple[UUID, Bucket]]:
    """The asset and bucket out of which the action takes value that lies there in lots or holds."""
    if action.asset_id is None:
        return
    if action.type == "HOLD" or (action.type in ("DEBIT", "FORFEIT") and action.bucket != "HELD"):
        yield action.asset_id, "AVAILABLE"
    elif action.type in _IN_HELD or action.type in ("DEBIT", "FORFEIT") or _settles(action):
        yield action.asset_id, "HELD"


def _settles(action: Action) -> bool:
    return action.type == "CREDIT" and action.bucket != "HELD" and action.reference_id is not None


@dataclass(frozen=True, slots=True)
class Keys:
    """The counters and attributes that rules can reach; None means any, because a key is computed."""

    counters: frozenset[str] | None
    attributes: frozenset[str] | None

    @classmethod
    def of(cls, paths: Collection[tuple[str, ...]], variable: str, actions: Collection[Action]) -> "Keys":
        """The keys of `variable` that are read at `paths` or written by `actions`."""
        return cls(
            _keys(paths, variable, "counters", [a for a in actions if a.type == "COUNTER"]),
            _keys(paths, variable, "attributes", [a for a in actions if a.type == "SET_ATTRIBUTE"]),
        )


def _keys(
    paths: Iterable[tuple[str, ...]], variable: str, member: str, writers: Iterable[Action]
) -> frozenset[str] | None:
    keys = {action.key for action in writers if action.key is not None}
    for path in paths:
        if path == ("groups",) and variable == "group":
            return None
        if path[:2] in ((variable,), (variable, member)):
            if len(path) < 3:
                return None
            keys.add(path[2])
    return frozenset(keys)


_cache: OrderedDict[tuple[UUID, UUID], RuleSet] = OrderedDict()
_cache_lock = threading.Lock()


async def load_rule_set(tx: Transaction, program_id: UUID, version: int) -> RuleSet:
    """The program's ACTIVE rules, compiled; `version` is the program's `rules_version`, read in this transaction.

    Kept per process, one version of each of the programs used last. A version that replaces a kept one compiles only
    the rules that have changed. A rule that doesn't compile (the limits were wider when it was saved) is left out and
    logged as an error: it must not stop the others.
    """
    key = (tx.organization_id, program_id)
    with _cache_lock:
        known = _cache.get(key)
        if known is not None:
            _cache.move_to_end(key)
    if known is not None and known.version == version:
        return known
    rows = await tx.all(
        select(Rule).where(
            Rule.organization_id == tx.organization_id, Rule.program_id == program_id, col(Rule.status) == "ACTIVE"
        )
    )
    compiled_before = {rule.history_id: rule for rule in known.rules} if known is not None else {}
    rules = _compile_rules(rows, compiled_before)
    with_budgets = await rules_with_budgets(tx, program_id)
    loaded = RuleSet(program_id, version, rules, [rule.id for rule in rules if rule.id in with_budgets])
    with _cache_lock:
        _cache[key] = loaded
        _cache.move_to_end(key)
        while len(_cache) > RULE_SETS_CACHED:
            _cache.popitem(last=False)
    return loaded


def _compile_rules(rows: Iterable[Rule], compiled_before: Mapping[UUID, CompiledRule]) -> list[CompiledRule]:
    rules: list[CompiledRule] = []
    for row in rows:
        compiled = compiled_before.get(row.history_id) or _compile_rule(row)
        if compiled is not None:
            rules.append(compiled)
    return rules


def _compile_rule(row: Rule) -> CompiledRule | None:
    try:
        return CompiledRule(
            id=row.id,
            name=row.name,
            history_id=row.history_id,
            order=row.rule_order,
            stop_after_match=row.stop_after_match,
            active_from=row.active_from,
            active_to=row.active_to,
            condition=compile_expression(row.condition),
            actions=parse_actions(row.actions),
        )
    except (ExpressionError, Refusal) as error:
        problems = error.problems if isinstance(error, Refusal) else ()
        reason = "; ".join(f"{problem.field}: {problem.message}" for problem in problems) or str(error)
        logger.error("rule %s left out: it does not compile", row.id, extra={"rule_id": str(row.id), "reason": reason})
        return None
