"""The rules of a simulation: what is asked for, checked like rules that are saved, and fixed when it is made.

A simulation may run for hours and be carried on by another process, so its rules are kept with it as they were: nothing
that is changed in the program meanwhile changes what it does. Contract: README.md "Simulations".
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlmodel import col, select

from db.session import Transaction
from db.tables import Rule
from domain import limits
from domain.errors import Problem, Refusal, bad_field
from domain.ids import new_id
from domain.money import ZERO
from domain.rules.actions import check_references, parse_actions
from domain.rules.budgets import Budget, BudgetDraft, load_budgets, planned, read_limits
from domain.rules.cel import ExpressionError, compile_expression
from domain.rules.compiled import CompiledRule
from domain.rules.store import ORDER_MAX, ORDER_STEP, RuleDraft, check_window, compile_parts

logger = logging.getLogger("scrip.simulations")


@dataclass(frozen=True, slots=True)
class ChangedRule:
    """A rule of the program with some fields changed, by the contract's names as in `store.patch_rule`.

    It runs unless `changes` give it another status than ACTIVE, whatever its status really is.
    """

    rule_id: UUID
    changes: Mapping[str, Any]


Asked = Sequence[RuleDraft | ChangedRule] | ChangedRule | None
"""The rules that are asked for: these; or the program's ACTIVE ones with this one changed; or those as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRule:
    """A rule of a simulation. `rule_id` names the stored rule that it is, or is a change of; None for a draft.

    `id` is that, or one of its own. Only a rule whose status is ACTIVE runs. Budgets are as they begin at the start of
    the range, but for what they have consumed until then.
    """

    id: UUID
    rule_id: UUID | None
    is_changed: bool
    name: str
    condition: str
    actions: Sequence[Any]
    order: int
    stop_after_match: bool
    active_from: datetime | None
    active_to: datetime | None
    status: str
    budgets: Sequence[Budget] = ()

    def document(self) -> dict[str, Any]:
        """The rule as the simulation keeps it."""
        budgets = [{name: getattr(budget, name) for name in _BUDGET_FIELDS} for budget in self.budgets]
        return {name: getattr(self, name) for name in _FIELDS} | {"budgets": budgets}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "PlannedRule":
        """The rule that `document` was made from."""
        rule_id = UUID(document["id"])
        fields = {name: document[name] for name in _FIELDS} | {
            "id": rule_id,
            "rule_id": None if document["rule_id"] is None else rule_id,
            "order": int(document["order"]),
            "active_from": _instant(document["active_from"]),
            "active_to": _instant(document["active_to"]),
            "budgets": [_budget(rule_id, budget) for budget in document["budgets"]],
        }
        return cls(**fields)

    def compiled(self) -> CompiledRule | None:
        """The rule as the engine runs it; None where it doesn't compile any more, as the engine leaves it out then."""
        try:
            return CompiledRule(
                id=self.id,
                name=self.name,
                history_id=self.id,
                order=self.order,
                stop_after_match=self.stop_after_match,
                active_from=self.active_from,
                active_to=self.active_to,
                condition=compile_expression(self.condition),
                actions=parse_actions(self.actions),
            )
        except (ExpressionError, Refusal) as error:
            logger.error("a simulated rule is left out: it does not compile", extra={"reason": str(error)})
            return None


_FIELDS = (
    "id",
    "rule_id",
    "is_changed",
    "name",
    "condition",
    "actions",
    "order",
    "stop_after_match",
    "active_from",
    "active_to",
    "status",
)
_BUDGET_FIELDS = ("asset_id", "maximum", "schedule_type", "cron_expression", "interval", "starts_at", "scale")


async def plan(tx: Transaction, program_id: UUID, asked: Asked, starts_at: datetime) -> list[PlannedRule]:
    """The rules that are asked for, in the order in which they run; `starts_at` is when their first events were.

    Whatever is new is checked as when a rule is saved, problems naming `rules[i].…`, or `rules.…` for a single changed
    rule. Raises Refusal: 400 for what is wrong by itself, 404 for a rule, program or asset that doesn't exist, 409
    `asset_archived`, `conflict` where two rules have one order, 422 `asset_not_linked`.
    """
    if asked is None:
        return await _active(tx, program_id)
    if isinstance(asked, ChangedRule):
        changed = await _changed(tx, program_id, asked, starts_at, "rules")
        others = [rule for rule in await _active(tx, program_id) if rule.id != changed.id]
        _check_orders([(rule, None) for rule in others] + [(changed, "rules.changes.order")])
        return sorted([*others, changed], key=lambda rule: rule.order)
    if not 0 < len(asked) <= limits.RULES_PER_PROGRAM:
        message = f"1 to {limits.RULES_PER_PROGRAM} rules"
        raise bad_field("rules", f"must be {message}, or be left out", expected=message)
    rules = [await _asked_for(tx, program_id, item, starts_at, f"rules[{i}]") for i, item in enumerate(asked)]
    _check_named_once(rules)
    rules = _with_orders(rules)
    _check_orders([(rule, f"rules[{index}].order") for index, rule in enumerate(rules)])
    return sorted(rules, key=lambda rule: rule.order)


async def _active(tx: Transaction, program_id: UUID) -> list[PlannedRule]:
    stored = await tx.all(
        select(Rule)
        .where(Rule.organization_id == tx.organization_id, Rule.program_id == program_id, col(Rule.status) == "ACTIVE")
        .order_by(col(Rule.rule_order))
    )
    budgets: dict[UUID, list[Budget]] = {}
    for budget in await load_budgets(tx, [rule.id for rule in stored], locked=False):
        budgets.setdefault(budget.rule_id, []).append(budget)
    return [_planned(rule, {}, budgets.get(rule.id, ())) for rule in stored]


def _planned(rule: Rule, changes: Mapping[str, Any], budgets: Sequence[Budget]) -> PlannedRule:
    return PlannedRule(
        id=rule.id,
        rule_id=rule.id,
        is_changed=bool(changes),
        name=changes.get("name", rule.name),
        condition=changes.get("condition", rule.condition),
        actions=changes.get("actions", rule.actions),
        order=changes.get("order", rule.rule_order),
        stop_after_match=changes.get("stop_after_match", rule.stop_after_match),
        active_from=changes.get("active_from", rule.active_from),
        active_to=changes.get("active_to", rule.active_to),
        status=changes.get("status", "ACTIVE"),
        budgets=budgets,
    )


async def _asked_for(
    tx: Transaction, program_id: UUID, item: RuleDraft | ChangedRule, starts_at: datetime, place: str
) -> PlannedRule:
    if isinstance(item, ChangedRule):
        return await _changed(tx, program_id, item, starts_at, place)
    with _placed(place):
        rule_id = new_id()
        actions = await compile_parts(item.condition, item.actions, item.budgets)
        check_window(item.active_from, item.active_to)
        await check_references(tx, program_id, actions)
        budgets = await _new_budgets(tx, program_id, rule_id, item.budgets, (), starts_at)
    return PlannedRule(
        id=rule_id,
        rule_id=None,
        is_changed=False,
        name=item.name,
        condition=item.condition,
        actions=list(item.actions),
        order=item.order or 0,
        stop_after_match=item.stop_after_match,
        active_from=item.active_from,
        active_to=item.active_to,
        status=item.status,
        budgets=budgets,
    )


async def _changed(
    tx: Transaction, program_id: UUID, asked: ChangedRule, starts_at: datetime, place: str
) -> PlannedRule:
    stored = await tx.first(
        select(Rule).where(
            Rule.organization_id == tx.organization_id, Rule.program_id == program_id, Rule.id == asked.rule_id
        )
    )
    if stored is None:
        problem = Problem(f"{place}.rule_id", "the program has no such rule", received=str(asked.rule_id))
        raise Refusal("not_found", "rule not found", [problem])
    budgets = await load_budgets(tx, [stored.id], locked=False)
    drafts: Sequence[BudgetDraft] | None = asked.changes.get("budgets")
    with _placed(f"{place}.changes"):
        actions = await compile_parts(asked.changes.get("condition"), asked.changes.get("actions"), drafts or ())
        await check_references(tx, program_id, actions)
        if drafts is not None:
            budgets = await _new_budgets(tx, program_id, stored.id, drafts, budgets, starts_at)
        rule = _planned(stored, asked.changes, budgets)
        check_window(rule.active_from, rule.active_to)
    return rule


async def _new_budgets(
    tx: Transaction,
    program_id: UUID,
    rule_id: UUID,
    drafts: Sequence[BudgetDraft],
    kept: Sequence[Budget],
    starts_at: datetime,
) -> list[Budget]:
    return planned(rule_id, drafts, await read_limits(tx, program_id, drafts), kept, starts_at)


def _with_orders(rules: Sequence[PlannedRule]) -> list[PlannedRule]:
    """The rules with the orders that drafts left open: behind all that are given, in the order of the list."""
    highest = max(rule.order for rule in rules)
    placed = []
    for index, rule in enumerate(rules):
        if rule.order == 0:
            highest += ORDER_STEP
            rule = replace(rule, order=highest)
        if rule.order > ORDER_MAX:
            raise bad_field(f"rules[{index}].order", "no order is left above the highest one: give one explicitly")
        placed.append(rule)
    return placed


def _check_named_once(rules: Sequence[PlannedRule]) -> None:
    seen: set[UUID] = set()
    for index, rule in enumerate(rules):
        if rule.id in seen:
            raise bad_field(f"rules[{index}].rule_id", "is named twice", expected="another rule", received=str(rule.id))
        seen.add(rule.id)


def _check_orders(rules: Iterable[tuple[PlannedRule, str | None]]) -> None:
    """Raise Refusal `conflict` where two rules that run have one order. Contract: rules-and-events.md 2.2."""
    taken: set[int] = set()
    for rule, field in rules:
        if rule.status != "ACTIVE":
            continue
        if rule.order in taken:
            message = f"order {rule.order} is taken by another rule that runs"
            problems = [Problem(field, message, expected="free order", received=str(rule.order))] if field else []
            raise Refusal("conflict", message, problems)
        taken.add(rule.order)


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Let refusals of what is checked inside name their fields below `place`."""
    try:
        yield
    except Refusal as refusal:
        problems = [replace(problem, field=f"{place}.{problem.field}") for problem in refusal.problems]
        problems = problems or [Problem(place, refusal.message)]
        raise Refusal(refusal.code, refusal.message, problems) from None


def _instant(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _budget(rule_id: UUID, document: Mapping[str, Any]) -> Budget:
    """A budget as it was planned, of which nothing is consumed yet."""
    return Budget(
        rule_id=rule_id,
        asset_id=UUID(document["asset_id"]),
        maximum=document["maximum"],
        schedule_type=document["schedule_type"],
        cron_expression=document["cron_expression"],
        interval=document["interval"],
        starts_at=datetime.fromisoformat(document["starts_at"]),
        consumed=ZERO,
        next_reset_at=None,
        scale=int(document["scale"]),
    )
