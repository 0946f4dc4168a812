"""The rules of a program as the engine runs them: immutable, compiled once per version, indexed by event type.

Contract: rules-and-events.md 4. A rule set may be shared by threads: nothing in it changes but a cache of tuples.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlmodel import col, select

from db import json
from db.session import Database
from db.tables import Rule
from domain.errors import Refusal
from domain.rules.actions import Action, Target, parse_actions
from domain.rules.budgets import rules_with_budgets
from domain.rules.cel import Expression, ExpressionError, compile_expression

__all__ = ["Action", "CompiledRule", "Keys", "RuleSet", "Target", "known_rule_set", "learn_rules"]

logger = logging.getLogger("scrip.rules")

Bucket = Literal["AVAILABLE", "HELD"]

RULE_CHARS_CACHED = 16 * 1024 * 1024
"""What the kept rules were saved as, about a twelfth of the memory that they take."""

TYPES_CACHED = 1_024


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """One version of a rule; `history_id` names that version in evaluations. `size` is in characters as saved."""

    id: UUID
    name: str
    history_id: UUID
    order: int
    stop_after_match: bool
    active_from: datetime | None
    active_to: datetime | None
    condition: Expression
    actions: tuple[Action, ...]
    size: int = 0

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
    reads `program`, or some action writes it. `reads_groups`: some expression reads the participant's groups. `keys`
    says which state of participants, groups and programs is read or written. `taking` are the (asset, bucket) pairs
    that actions take value from. `budgeted` are the rules that have budgets. `size` is in characters.
    """

    def __init__(
        self, program_id: UUID, version: int, rules: Iterable[CompiledRule], budgeted: Collection[UUID] = ()
    ) -> None:
        self.program_id = program_id
        self.version = version
        self.budgeted = tuple(sorted(budgeted))
        self.rules = tuple(sorted(rules, key=lambda rule: rule.order))
        self.size = sum(rule.size for rule in self.rules)
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
        self.has_targets = any(_names_somebody(action, program_id) for action in actions)
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


def _names_somebody(action: Action, own_program_id: UUID) -> bool:
    """Whether the action is directed at somebody else than the event's participant, recipient or program."""
    target = action.target
    return target is not None and (target.type != "PROGRAM" or target.id not in (None, own_program_id))


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
    """The counters and attributes that rules can reach, None for any, as a key is computed; and whether tags."""

    counters: frozenset[str] | None
    attributes: frozenset[str] | None
    tags: bool = True

    @classmethod
    def of(cls, paths: Collection[tuple[str, ...]], variable: str, actions: Collection[Action]) -> "Keys":
        """The keys of `variable` that are read at `paths` or written by `actions`."""
        return cls(
            _keys(paths, variable, "counters", [a for a in actions if a.type == "COUNTER"]),
            _keys(paths, variable, "attributes", [a for a in actions if a.type == "SET_ATTRIBUTE"]),
            any(a.type in ("TAG", "UNTAG") for a in actions)
            or any(path[:2] in ((variable,), (variable, "tags")) for path in paths)
            or (variable == "group" and ("groups",) in paths),
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


def known_rule_set(organization_id: UUID, program_id: UUID, version: int) -> RuleSet | None:
    """The program's rules of this version, its `rules_version`, if this process has them compiled."""
    with _cache_lock:
        known = _cache.get((organization_id, program_id))
        if known is None or known.version != version:
            return None
        _cache.move_to_end((organization_id, program_id))
        return known


async def learn_rules(
    database: Database, organization_id: UUID, program_id: UUID, progress: Callable[[], None] = lambda: None
) -> None:
    """Compile the program's ACTIVE rules as they are now, for `known_rule_set`; `progress` is called after each.

    To be called outside any transaction: compiling rules at their limits takes long, and nobody must wait for locks
    meanwhile. Only the rules that have changed since the version that is known are compiled. A rule that doesn't
    compile (the limits were wider when it was saved) is left out and logged as an error: it must not stop the others.
    """
    async with database.transaction(organization_id) as tx:
        # The version first: should the rules change in between, the set is taken for older than it is and learnt again.
        program = await tx.row(
            "select rules_version from program where organization_id = %s and id = %s", (organization_id, program_id)
        )
        assert program is not None, "programs are never deleted"
        rows = await tx.all(
            select(Rule).where(
                Rule.organization_id == organization_id, Rule.program_id == program_id, col(Rule.status) == "ACTIVE"
            )
        )
        with_budgets = await rules_with_budgets(tx, program_id)
    with _cache_lock:
        before = _cache.get((organization_id, program_id))
    compiled_before = {rule.history_id: rule for rule in before.rules} if before is not None else {}
    rules: list[CompiledRule] = []
    for row in rows:
        rule = compiled_before.get(row.history_id) or _compile_rule(row)
        if rule is not None:
            rules.append(rule)
        progress()
    budgeted = [rule.id for rule in rules if rule.id in with_budgets]
    _keep(organization_id, RuleSet(program_id, program["rules_version"], rules, budgeted))


def _keep(organization_id: UUID, rules: RuleSet) -> None:
    """Keep this set and as many of those used last as have RULE_CHARS_CACHED characters together."""
    with _cache_lock:
        _cache[organization_id, rules.program_id] = rules
        _cache.move_to_end((organization_id, rules.program_id))
        total = sum(kept.size for kept in _cache.values())
        while total > RULE_CHARS_CACHED and len(_cache) > 1:
            total -= _cache.popitem(last=False)[1].size


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
            size=len(row.condition) + len(json.dumps(row.actions)),
        )
    except (ExpressionError, Refusal) as error:
        problems = error.problems if isinstance(error, Refusal) else ()
        reason = "; ".join(f"{problem.field}: {problem.message}" for problem in problems) or str(error)
        logger.error("rule %s left out: it does not compile", row.id, extra={"rule_id": str(row.id), "reason": reason})
        return None
