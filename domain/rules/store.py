"""Rules as resources: create, read, change, and their history. Contract: rules-and-events.md 2 and 8.

Every write holds the program's row lock (FOR NO KEY UPDATE): orders are given out one after the other, and the
`rules_version` that tells the engine to load anew grows in the same transaction as the change it announces. A change
of a rule locks the rule's row first, then the budgets that it touches, then the program: the engine, too, locks budgets
before the program, and under the rule's lock nobody else adds budgets to it.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import update
from sqlmodel import col, select

from db.session import Transaction
from db.tables import Program, Rule, RuleHistory
from domain import limits, programs
from domain.clock import format_timestamp
from domain.errors import Problem, Refusal, bad_field, not_found
from domain.ids import new_id
from domain.pagination import Page, PageRequest, paginate
from domain.rules.actions import Action, check_references, parse_actions
from domain.rules.budgets import (
    Budget,
    BudgetDraft,
    draft_problems,
    load_budgets,
    planned,
    put_budgets,
    read_limits,
    same_terms,
    write_budgets,
)
from domain.rules.cel import ExpressionError, compile_expression

ORDER_STEP = 10
ORDER_MAX = 2**31 - 1

# The contract's field -> the column; everything that a PATCH may carry, `budgets` aside.
_WRITABLE = {
    "name": "name",
    "description": "description",
    "condition": "condition",
    "actions": "actions",
    "order": "rule_order",
    "stop_after_match": "stop_after_match",
    "active_from": "active_from",
    "active_to": "active_to",
    "status": "status",
}
_SORT_KEYS: dict[str, Any] = {
    "order": Rule.rule_order,
    "name": Rule.name,
    "created_at": Rule.created_at,
    "updated_at": Rule.updated_at,
}
_CHANGE_TYPES = {"ARCHIVED": "archived", "SUSPENDED": "suspended", "ACTIVE": "activated"}


@dataclass(frozen=True, slots=True)
class RuleDraft:
    """A rule as a client asks for it; `order` None lets the program's highest order decide."""

    program_id: UUID
    name: str
    condition: str
    actions: Sequence[Any]
    description: str | None = None
    order: int | None = None
    stop_after_match: bool = False
    active_from: datetime | None = None
    active_to: datetime | None = None
    budgets: Sequence[BudgetDraft] = ()
    status: str = "ACTIVE"


def document(rule: Rule, budgets: Sequence[Budget], now: datetime) -> dict[str, Any]:
    """`rule` as the API shows it and as its history keeps it, timestamps as text. `deleted_at` only when archived.

    `budgets` are the rule's, by asset; what they have consumed is as of `now`.
    """
    shown = {
        "id": str(rule.id),
        "program_id": str(rule.program_id),
        "name": rule.name,
        "description": rule.description,
        "condition": rule.condition,
        "actions": rule.actions,
        "order": rule.rule_order,
        "stop_after_match": rule.stop_after_match,
        "active_from": _shown_instant(rule.active_from),
        "active_to": _shown_instant(rule.active_to),
        "budgets": [budget.document(now) for budget in budgets],
        "status": rule.status,
        "created_at": _shown_instant(rule.created_at),
        "updated_at": _shown_instant(rule.updated_at),
    }
    if rule.deleted_at is not None:
        shown["deleted_at"] = _shown_instant(rule.deleted_at)
    return shown


async def documents(tx: Transaction, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """The documents of these rules in their order; the budgets of all are read in one query."""
    by_rule: dict[UUID, list[Budget]] = {rule.id: [] for rule in rules}
    for budget in await load_budgets(tx, by_rule, locked=False):
        by_rule[budget.rule_id].append(budget)
    return [document(rule, by_rule[rule.id], tx.now) for rule in rules]


async def create_rule(tx: Transaction, draft: RuleDraft) -> Rule:
    """Create a rule, its first history row included.

    Raises Refusal: 400 for CEL, actions, budgets or a window that are wrong, 404 for an unknown program or asset, 409
    `program_inactive`, `asset_archived` or `conflict` (order taken, program full), 422 `asset_not_linked`.
    """
    actions = await compile_parts(draft.condition, draft.actions, draft.budgets)
    check_window(draft.active_from, draft.active_to)
    await _lock_program(tx, draft.program_id)
    await check_references(tx, draft.program_id, actions)
    limits_read = await read_limits(tx, draft.program_id, draft.budgets)
    rule = Rule(
        organization_id=tx.organization_id,
        id=new_id(),
        program_id=draft.program_id,
        name=draft.name,
        description=draft.description,
        condition=draft.condition,
        actions=list(draft.actions),
        rule_order=await _place(tx, draft),
        stop_after_match=draft.stop_after_match,
        active_from=draft.active_from,
        active_to=draft.active_to,
        status=draft.status,
        history_id=new_id(),
        created_at=tx.now,
        updated_at=tx.now,
    )
    with _order_fence(rule.rule_order):
        await tx.insert(rule)
    budgets = planned(rule.id, draft.budgets, limits_read, (), tx.now)
    await put_budgets(tx, rule.id, budgets)
    shown = document(rule, budgets, tx.now)
    changes = {name: {"old": None, "new": shown[name]} for name in _WRITABLE if shown[name] is not None}
    if budgets:
        changes["budgets"] = {"old": None, "new": shown["budgets"]}
    await _record(tx, rule, "created", changes, shown)
    return rule


async def get_rule(tx: Transaction, rule_id: UUID) -> Rule:
    """The rule, archived or not. Raises Refusal 404."""
    rule = await tx.first(select(Rule).where(Rule.organization_id == tx.organization_id, Rule.id == rule_id))
    if rule is None:
        raise not_found("rule")
    return rule


async def list_rules(
    tx: Transaction,
    page: PageRequest,
    *,
    program_id: UUID | None = None,
    status: str | None = None,
    include_archived: bool = False,
    search: str | None = None,
    sort_by: str = "order",
    descending: bool = False,
) -> Page[Rule]:
    """Rules of the organization; `search` is a part of the name. `sort_by` is order, name, created_at or updated_at.

    Archived rules are left out unless `include_archived` or a `status` is given.
    Raises Refusal naming `cursor` when it belongs to another list or sort.
    """
    statement = select(Rule).where(Rule.organization_id == tx.organization_id)
    if program_id is not None:
        statement = statement.where(Rule.program_id == program_id)
    if status is not None:
        statement = statement.where(Rule.status == status)
    elif not include_archived:
        statement = statement.where(Rule.status != "ARCHIVED")
    if search:
        statement = statement.where(col(Rule.name).icontains(search, autoescape=True))
    keys = [_SORT_KEYS[sort_by], Rule.id]
    return await paginate(tx, statement, keys=keys, page=page, descending=descending)


async def list_history(
    tx: Transaction,
    rule_id: UUID,
    page: PageRequest,
    *,
    change_type: str | None = None,
    changed_from: datetime | None = None,
    changed_to: datetime | None = None,
) -> Page[RuleHistory]:
    """The versions of a rule, newest first; both bounds are inclusive. Raises Refusal 404 for an unknown rule."""
    await get_rule(tx, rule_id)
    statement = select(RuleHistory).where(
        RuleHistory.organization_id == tx.organization_id, RuleHistory.rule_id == rule_id
    )
    if change_type is not None:
        statement = statement.where(RuleHistory.change_type == change_type)
    if changed_from is not None:
        statement = statement.where(RuleHistory.changed_at >= changed_from)
    if changed_to is not None:
        statement = statement.where(RuleHistory.changed_at <= changed_to)
    return await paginate(tx, statement, keys=[RuleHistory.changed_at, RuleHistory.id], page=page)


async def patch_rule(tx: Transaction, rule_id: UUID, changes: Mapping[str, Any]) -> Rule:
    """Change the fields in `changes` (the contract's names; None clears a nullable one) and record what differs.

    `budgets`, a sequence of BudgetDraft, replaces all of the rule's. Nothing is recorded when nothing differs.
    Raises Refusal: 400 for CEL, actions, budgets or a window that are wrong, 404, 409 `conflict` (rule archived, order
    taken), `program_inactive`, `asset_archived`, 422 `asset_not_linked`.
    """
    drafts: Sequence[BudgetDraft] | None = changes.get("budgets")
    actions = await compile_parts(changes.get("condition"), changes.get("actions"), drafts or ())
    rule, budgets = await _lock_for_change(tx, rule_id, with_budgets=drafts is not None)
    before = document(rule, budgets, tx.now)
    for name in changes.keys() & _WRITABLE.keys():
        setattr(rule, _WRITABLE[name], changes[name])
    check_window(rule.active_from, rule.active_to)
    await check_references(tx, rule.program_id, actions)
    if drafts is not None:
        budgets = await _replace_budgets(tx, rule, budgets, drafts)
    differences = _differences(before, document(rule, budgets, tx.now))
    if not differences:
        return rule
    if rule.status == "ACTIVE" and differences.keys() & {"order", "status"}:
        await _check_order_is_free(tx, rule.program_id, rule.rule_order, rule.id)
    await _save(tx, rule)
    change_type = _CHANGE_TYPES[rule.status] if "status" in differences else "updated"
    await _record(tx, rule, change_type, differences, document(rule, budgets, tx.now))
    return rule


async def reset_budget(tx: Transaction, rule_id: UUID, asset_id: UUID) -> Budget:
    """Set what the rule's budget for the asset has consumed to zero; an INTERVAL budget begins a whole interval now.

    It is state and not a change of the rule: the history has nothing of it. Contract: rules-and-events.md 8.
    Raises Refusal: 404 for an unknown rule and for one without such a budget, 409 `conflict` for an archived rule and
    `program_inactive` for one of an archived program.
    """
    _, budgets = await _lock_for_change(tx, rule_id, with_budgets=True)
    budget = next((budget for budget in budgets if budget.asset_id == asset_id), None)
    if budget is None:
        raise not_found("budget")
    budget.restart(tx.now)
    await write_budgets(tx, [budget])
    return budget


async def _replace_budgets(
    tx: Transaction, rule: Rule, kept: list[Budget], drafts: Sequence[BudgetDraft]
) -> list[Budget]:
    """The rule's budgets from now on, stored where they differ from `kept`, which the caller has locked."""
    limits_read = await read_limits(tx, rule.program_id, drafts)
    budgets = planned(rule.id, drafts, limits_read, kept, tx.now)
    if same_terms(budgets, kept):
        return kept
    await put_budgets(tx, rule.id, budgets)
    return budgets


async def compile_parts(
    condition: str | None, raw_actions: Sequence[Any] | None, budgets: Sequence[BudgetDraft]
) -> tuple[Action, ...]:
    """The compiled actions, none where none are given. Raises Refusal naming every field that is wrong by itself.

    In a thread: long expressions take tens of milliseconds each, and other requests must not wait for them.
    """

    def compile_all() -> tuple[Action, ...]:
        problems = [] if condition is None else _condition_problems(condition)
        actions: tuple[Action, ...] = ()
        try:
            actions = () if raw_actions is None else parse_actions(raw_actions)
        except Refusal as refusal:
            problems += refusal.problems
        problems += draft_problems(budgets)
        if problems:
            raise Refusal("bad_request", "Invalid request parameters", problems)
        return actions

    return await asyncio.to_thread(compile_all)


def _condition_problems(condition: str) -> list[Problem]:
    try:
        compile_expression(condition)
    except ExpressionError as error:
        return [Problem("condition", f"invalid CEL: {error}", expected="CEL expression", received=condition)]
    return []


def check_window(active_from: datetime | None, active_to: datetime | None) -> None:
    """Raise Refusal `bad_request` for a window that ends before it begins. Contract: rules-and-events.md 2.4."""
    if active_from is not None and active_to is not None and active_to <= active_from:
        raise bad_field(
            "active_to",
            "must be later than active_from",
            expected="timestamp after active_from",
            received=format_timestamp(active_to),
        )


async def _lock_program(tx: Transaction, program_id: UUID) -> None:
    """Lock the program for a rule write. Raises Refusal `not_found` or `program_inactive`."""
    programs.require_not_archived(await programs.lock(tx, program_id))


async def _lock_for_change(tx: Transaction, rule_id: UUID, *, with_budgets: bool) -> tuple[Rule, list[Budget]]:
    """The locked rule and its budgets, locked only `with_budgets`. Raises Refusal where it may not change.

    The budgets are locked before the program although it is the program that may forbid the change: the order of locks
    is the same for everyone.
    """
    by_id = select(Rule).where(Rule.organization_id == tx.organization_id, Rule.id == rule_id)
    rule = await tx.first(by_id.with_for_update(key_share=True))
    if rule is None:
        raise not_found("rule")
    budgets = await load_budgets(tx, [rule_id], locked=with_budgets)
    await _lock_program(tx, rule.program_id)
    if rule.status == "ARCHIVED":
        raise Refusal("conflict", "an archived rule cannot be changed")
    return rule, budgets


async def _place(tx: Transaction, draft: RuleDraft) -> int:
    """The new rule's order. The caller holds the program's lock. Raises Refusal `conflict`."""
    found = await tx.row(
        """select count(*) as kept, coalesce(max(rule_order), 0) as highest from rule
           where organization_id = %s and program_id = %s and status <> 'ARCHIVED'""",
        [tx.organization_id, draft.program_id],
    )
    assert found is not None
    if found["kept"] >= limits.RULES_PER_PROGRAM:
        message = f"a program has at most {limits.RULES_PER_PROGRAM} rules that are not archived"
        raise Refusal("conflict", message)
    order = draft.order if draft.order is not None else int(found["highest"]) + ORDER_STEP
    if order > ORDER_MAX:
        raise Refusal("conflict", "no order is left above the highest one: give one explicitly")
    if draft.status == "ACTIVE":
        await _check_order_is_free(tx, draft.program_id, order, None)
    return order


async def _check_order_is_free(tx: Transaction, program_id: UUID, order: int, own_id: UUID | None) -> None:
    holder = await tx.row(
        """select id from rule where organization_id = %s and program_id = %s and rule_order = %s
           and status = 'ACTIVE' and id is distinct from %s""",
        [tx.organization_id, program_id, order, own_id],
    )
    if holder is not None:
        raise _order_taken(order)


def _order_taken(order: int) -> Refusal:
    message = f"order {order} is taken by another active rule of the program"
    return Refusal("conflict", message, [Problem("order", message, expected="free order", received=str(order))])


@contextmanager
def _order_fence(order: int) -> Iterator[None]:
    """Postgres' own word on a taken order, for whatever writes rules without the program's lock."""
    try:
        yield
    except psycopg.errors.UniqueViolation as error:
        if error.diag.constraint_name != "rule_active_order_key":
            raise
        raise _order_taken(order) from None


async def _save(tx: Transaction, rule: Rule) -> None:
    # A transaction that began earlier can come to the lock later: history must still read in the order of changes.
    rule.updated_at = max(tx.now, rule.updated_at + timedelta(microseconds=1))
    rule.history_id = new_id()
    if rule.status == "ARCHIVED":
        rule.deleted_at = rule.updated_at
    columns = (*_WRITABLE.values(), "history_id", "updated_at", "deleted_at")
    with _order_fence(rule.rule_order):
        await tx.run(
            update(Rule)
            .where(col(Rule.organization_id) == tx.organization_id, col(Rule.id) == rule.id)
            .values({column: getattr(rule, column) for column in columns})
        )


async def _require_room(tx: Transaction, program_id: UUID) -> None:
    """Refuse more than a program's rules may have together: a worker compiles and keeps them all. Raises `conflict`."""
    found = await tx.row(
        """select coalesce(sum(length(condition) + length(actions::text)), 0) as chars from rule
           where organization_id = %s and program_id = %s and status <> 'ARCHIVED'""",
        [tx.organization_id, program_id],
    )
    assert found is not None
    if found["chars"] > limits.RULE_CHARS_PER_PROGRAM:
        message = f"the rules of a program have at most {limits.RULE_CHARS_PER_PROGRAM:,} characters together"
        raise Refusal("conflict", message)


async def _record(
    tx: Transaction, rule: Rule, change_type: str, changes: dict[str, Any], snapshot: dict[str, Any]
) -> None:
    """Append the version that the rule is now, and tell the engine to load the program's rules anew.

    Raises Refusal `conflict` when the program has no room for it.
    """
    await _require_room(tx, rule.program_id)
    await tx.insert(
        RuleHistory(
            organization_id=tx.organization_id,
            id=rule.history_id,
            rule_id=rule.id,
            program_id=rule.program_id,
            change_type=change_type,
            changed_at=rule.updated_at,
            changed_by_api_key_id=tx.api_key_id,
            changes=changes,
            snapshot=snapshot,
        )
    )
    await tx.run(
        update(Program)
        .where(col(Program.organization_id) == tx.organization_id, col(Program.id) == rule.program_id)
        .values(rules_version=col(Program.rules_version) + 1)
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    names = (*_WRITABLE, "budgets")
    return {name: {"old": before[name], "new": after[name]} for name in names if before[name] != after[name]}


def _shown_instant(instant: datetime | None) -> str | None:
    return None if instant is None else format_timestamp(instant)
