"""Rule budgets: how much of an asset a rule may issue in a period. Contract: rules-and-events.md 3.

A budget's stored `consumed` and `next_reset_at` are as of the last write. Nothing runs when a period ends: from
`next_reset_at` on whoever reads sees 0 and the next point of the schedule, and whoever writes stores that. The points
of a CRON budget are those of its expression, in UTC; the points of an INTERVAL budget lie whole intervals after
`starts_at`, the moment its schedule was set or it was last reset by hand.

A limit may be lowered below what the period has consumed. `consumed` keeps telling the truth then, above the limit, and
nothing more is issued: cut down to the limit it would let the rule issue the difference again once the limit is raised.

The rows of a rule's budgets are added, replaced and removed under the rule's own row lock (`domain.rules.store`), so a
set of them that was read under it is complete.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from db.session import Transaction
from domain import limits, money
from domain.clock import format_timestamp
from domain.cron import parse_cron
from domain.durations import parse_duration
from domain.errors import Problem, Refusal

# --- in memory --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Budget:
    """What a rule may issue of an asset in a period (`maximum`, the contract's `limit`), and what it has issued.

    `schedule_type` None is a lifetime budget: `next_reset_at` is None, too. `scale` is the asset's.
    """

    rule_id: UUID
    asset_id: UUID
    maximum: Decimal
    schedule_type: str | None
    cron_expression: str | None
    interval: str | None
    starts_at: datetime
    consumed: Decimal
    next_reset_at: datetime | None
    scale: int

    def consumed_at(self, now: datetime) -> Decimal:
        """What the period that `now` lies in has consumed; 0 if that is a later period than the stored one."""
        is_over = self.next_reset_at is not None and now >= self.next_reset_at
        return money.ZERO if is_over else self.consumed

    def next_reset_after(self, now: datetime) -> datetime | None:
        """When the period that `now` lies in ends: after `now`, however many periods have passed; None for never."""
        if self.next_reset_at is None or now < self.next_reset_at:
            return self.next_reset_at
        return _first_reset(self, now)

    def restart(self, now: datetime) -> None:
        """Begin anew, as after a reset by hand: nothing consumed, intervals counted from `now`."""
        self.consumed = money.ZERO
        self.starts_at = now
        self.next_reset_at = _first_reset(self, now)

    def document(self, now: datetime) -> dict[str, Any]:
        """The budget as the API shows it at `now`: amounts at the asset's scale, no schedule field it doesn't have."""
        next_reset_at = self.next_reset_after(now)
        shown = {
            "asset_id": str(self.asset_id),
            "limit": money.format_amount(self.maximum, self.scale),
            "schedule_type": self.schedule_type,
            "cron_expression": self.cron_expression,
            "interval": self.interval,
            "consumed": money.format_amount(self.consumed_at(now), self.scale),
            "next_reset_at": None if next_reset_at is None else format_timestamp(next_reset_at),
        }
        absent = [name for name in ("cron_expression", "interval") if shown[name] is None]
        return {name: value for name, value in shown.items() if name not in absent}


def _first_reset(budget: Budget, after: datetime) -> datetime | None:
    """The first point of the budget's schedule strictly after `after`; None for a lifetime budget."""
    if budget.cron_expression is not None:
        return parse_cron(budget.cron_expression).next_after(after)
    if budget.interval is not None:
        interval = parse_duration(budget.interval)
        # A clock that is behind may ask for a moment before the start: the first interval is whole all the same.
        intervals_over = max(0, (after - budget.starts_at) // interval)
        return budget.starts_at + (intervals_over + 1) * interval
    return None


class BudgetBook:
    """The budgets that a transaction has locked, in memory: asked and charged credit by credit, undone event by event.

    A rule without a budget for an asset may issue any amount of it.
    """

    def __init__(self) -> None:
        self._budgets: dict[tuple[UUID, UUID], Budget] = {}
        self._undo: list[tuple[Budget, Decimal, datetime | None]] = []

    def add(self, budgets: Iterable[Budget]) -> None:
        """Take in these budgets, each rule and asset once; from now on the book changes them."""
        for budget in budgets:
            assert (budget.rule_id, budget.asset_id) not in self._budgets, "a budget is loaded once"
            self._budgets[budget.rule_id, budget.asset_id] = budget

    def covers(self, rule_id: UUID, asset_id: UUID, amount: Decimal, now: datetime) -> bool:
        """Whether the rule may issue all of `amount` at `now`; always True where it has no budget for the asset.

        Nothing to issue, or something to give back, is always covered, also above a limit that was lowered.
        """
        budget = self._budgets.get((rule_id, asset_id))
        if budget is None or amount <= 0:
            return True
        return money.add(budget.consumed_at(now), amount) <= budget.maximum

    def consume(self, rule_id: UUID, asset_id: UUID, amount: Decimal, now: datetime) -> None:
        """Charge `amount`, which `covers` has allowed; a negative one is given back, as far as the period has consumed.

        0, or no budget: nothing happens.
        """
        budget = self._budgets.get((rule_id, asset_id))
        if budget is None or amount == 0:
            return
        consumed = max(money.ZERO, money.add(budget.consumed_at(now), amount))
        assert amount < 0 or consumed <= budget.maximum, "covers() is asked first"
        self._undo.append((budget, budget.consumed, budget.next_reset_at))
        budget.next_reset_at = budget.next_reset_after(now)
        budget.consumed = consumed

    def mark(self) -> int:
        """A point to which `undo` can return."""
        return len(self._undo)

    def undo(self, mark: int) -> None:
        """Take back everything since `mark`; marks made later are void."""
        while len(self._undo) > mark:
            budget, consumed, next_reset_at = self._undo.pop()
            budget.consumed, budget.next_reset_at = consumed, next_reset_at

    @property
    def changed(self) -> list[Budget]:
        """The budgets that were charged or given back, each once, in the order of their locks."""
        keys = {(budget.rule_id, budget.asset_id) for budget, _, _ in self._undo}
        return [self._budgets[key] for key in sorted(keys)]


# --- in the database --------------------------------------------------------------------------------------------------

_LOAD = """
select b.rule_id, b.asset_id, b.maximum, b.schedule_type, b.cron_expression, b.interval, b.starts_at, b.consumed,
       b.next_reset_at, a.scale
from rule_budget b join asset a on a.organization_id = b.organization_id and a.id = b.asset_id
where b.organization_id = %s and b.rule_id = any(%s)
order by b.rule_id, b.asset_id
"""

_WRITE = """
update rule_budget b
set consumed = v.consumed, starts_at = v.starts_at, next_reset_at = v.next_reset_at
from unnest(%s::uuid[], %s::uuid[], %s::numeric[], %s::timestamptz[], %s::timestamptz[])
     as v (rule_id, asset_id, consumed, starts_at, next_reset_at)
where b.organization_id = %s and b.rule_id = v.rule_id and b.asset_id = v.asset_id
"""

_PUT = """
insert into rule_budget (organization_id, rule_id, asset_id, maximum, schedule_type, cron_expression, interval,
                         starts_at, consumed, next_reset_at)
select %s, %s, * from unnest(%s::uuid[], %s::numeric[], %s::text[], %s::text[], %s::text[], %s::timestamptz[],
                             %s::numeric[], %s::timestamptz[])
on conflict (organization_id, rule_id, asset_id) do update
set maximum = excluded.maximum, schedule_type = excluded.schedule_type, cron_expression = excluded.cron_expression,
    interval = excluded.interval, starts_at = excluded.starts_at, consumed = excluded.consumed,
    next_reset_at = excluded.next_reset_at
"""


async def load_budgets(tx: Transaction, rule_ids: Iterable[UUID], *, locked: bool) -> list[Budget]:
    """The budgets of these rules, by rule and asset; with `locked` locked in that order until the transaction ends.

    Their place in the global order of locks is before the program (domain/locks.py).
    Raises psycopg.errors.LockNotAvailable after the session's lock timeout.
    """
    wanted = list(set(rule_ids))
    if not wanted:
        return []
    query = _LOAD + "for no key update of b" if locked else _LOAD
    cursor = await tx.execute(query, (tx.organization_id, wanted))
    return [Budget(*row) for row in await cursor.fetchall()]


async def rules_with_budgets(tx: Transaction, program_id: UUID) -> dict[UUID, frozenset[UUID]]:
    """The assets that each ACTIVE rule of the program has a budget for; rules without any are left out.

    Every change of it raises the program's `rules_version`.
    """
    rows = await tx.rows(
        """select b.rule_id, array_agg(b.asset_id) as asset_ids
           from rule r join rule_budget b on b.organization_id = r.organization_id and b.rule_id = r.id
           where r.organization_id = %s and r.program_id = %s and r.status = 'ACTIVE' group by b.rule_id""",
        (tx.organization_id, program_id),
    )
    return {row["rule_id"]: frozenset(row["asset_ids"]) for row in rows}


async def write_budgets(tx: Transaction, budgets: Sequence[Budget]) -> None:
    """Store the state of these budgets (what is consumed, and of which period), whose rows the caller has locked."""
    if not budgets:
        return
    columns = _columns(budgets, "rule_id", "asset_id", "consumed", "starts_at", "next_reset_at")
    await tx.execute(_WRITE, (*columns, tx.organization_id))


async def put_budgets(tx: Transaction, rule_id: UUID, budgets: Sequence[Budget]) -> None:
    """Make these the budgets of the rule, all of them. The caller has locked the rule and the budgets it had.

    A row that stays is updated in place: whoever waits for its lock meanwhile must find it.
    """
    await tx.execute(
        "delete from rule_budget where organization_id = %s and rule_id = %s and asset_id <> all(%s)",
        (tx.organization_id, rule_id, [budget.asset_id for budget in budgets]),
    )
    if budgets:
        names = [field.name for field in fields(Budget) if field.name not in ("rule_id", "scale")]
        await tx.execute(_PUT, (tx.organization_id, rule_id, *_columns(budgets, *names)))


def _columns(budgets: Iterable[Budget], *names: str) -> list[list[Any]]:
    return [[getattr(budget, name) for budget in budgets] for name in names]


# --- what clients ask for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BudgetDraft:
    """A budget as a client asks for it; `limit` is decimal text."""

    asset_id: UUID
    limit: str
    schedule_type: str | None = None
    cron_expression: str | None = None
    interval: str | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a draft, read with its asset's scale."""

    maximum: Decimal
    scale: int


def draft_problems(drafts: Sequence[BudgetDraft]) -> list[Problem]:
    """Everything that is wrong with the texts of these drafts, each problem naming `budgets[i].field`.

    Looks at nothing but the texts: what the assets say is `read_limits`.
    """
    if len(drafts) > limits.BUDGETS_PER_RULE:
        message = f"a rule has at most {limits.BUDGETS_PER_RULE} budgets"
        return [Problem("budgets", message, expected=f"at most {limits.BUDGETS_PER_RULE} items")]
    problems: list[Problem] = []
    seen: set[UUID] = set()
    for index, draft in enumerate(drafts):
        path = f"budgets[{index}]"
        if draft.asset_id in seen:
            message = "a rule has at most one budget per asset"
            problems.append(Problem(f"{path}.asset_id", message, received=str(draft.asset_id)))
        seen.add(draft.asset_id)
        problems += _limit_problems(path, draft.limit)
        problems += _schedule_problems(path, draft)
    return problems


def _limit_problems(path: str, text: str) -> list[Problem]:
    try:
        money.parse_amount(text, limits.SCALE_MAX, f"{path}.limit")
    except Refusal as refusal:
        # Too many decimals for any asset: `read_limits` says so with the asset's own scale.
        return [] if refusal.code == "invalid_scale" else list(refusal.problems)
    return []


_SCHEDULE_FIELDS = {"CRON": "cron_expression", "INTERVAL": "interval"}
_EXPECTED = {"cron_expression": "cron expression of five fields", "interval": "positive duration"}


def _schedule_problems(path: str, draft: BudgetDraft) -> list[Problem]:
    given = {"cron_expression": draft.cron_expression, "interval": draft.interval}
    problems: list[Problem] = []
    for schedule_type, name in _SCHEDULE_FIELDS.items():
        text = given[name]
        if draft.schedule_type != schedule_type and text is not None:
            message = f"goes with schedule_type {schedule_type} only"
            problems.append(Problem(f"{path}.{name}", message, expected="absent", received=text))
        elif draft.schedule_type == schedule_type and text is None:
            message = f"is required with schedule_type {schedule_type}"
            problems.append(Problem(f"{path}.{name}", message, "required", _EXPECTED[name]))
        elif text is not None and (wrong := _wrong_schedule(name, text)) is not None:
            problems.append(Problem(f"{path}.{name}", wrong, expected=_EXPECTED[name], received=text))
    return problems


def _wrong_schedule(name: str, text: str) -> str | None:
    try:
        if name == "cron_expression":
            parse_cron(text)
        elif parse_duration(text) <= timedelta(0):
            return "must be longer than zero"
    except ValueError as error:
        return str(error)
    return None


async def read_limits(tx: Transaction, program_id: UUID, drafts: Sequence[BudgetDraft]) -> dict[UUID, Limit]:
    """The limits of these drafts, by asset, if a rule of the program may have them; one query for all.

    Raises Refusal: 404 `not_found` for an asset the organization doesn't have, 409 `asset_archived`, 422
    `asset_not_linked`, 400 `invalid_scale` for a limit with more decimals than its asset.
    """
    if not drafts:
        return {}
    rows = await tx.rows(
        """select a.id, a.scale, a.status = 'ARCHIVED' as archived, l.asset_id is not null as linked
           from asset a left join program_asset l
             on l.organization_id = a.organization_id and l.program_id = %s and l.asset_id = a.id
           where a.organization_id = %s and a.id = any(%s)""",
        (program_id, tx.organization_id, [draft.asset_id for draft in drafts]),
    )
    assets = {row["id"]: row for row in rows}
    _refuse(drafts, {d.asset_id for d in drafts} - assets.keys(), "not_found", "asset not found")
    _refuse(drafts, {id for id, row in assets.items() if row["archived"]}, "asset_archived", "asset is archived")
    unlinked = {id for id, row in assets.items() if not row["linked"]}
    _refuse(drafts, unlinked, "asset_not_linked", "asset is not linked to the program")
    read: dict[UUID, Limit] = {}
    for index, draft in enumerate(drafts):
        scale = assets[draft.asset_id]["scale"]
        read[draft.asset_id] = Limit(money.parse_amount(draft.limit, scale, f"budgets[{index}].limit"), scale)
    return read


def _refuse(drafts: Sequence[BudgetDraft], asset_ids: set[UUID], code: str, message: str) -> None:
    problems = [
        Problem(f"budgets[{index}].asset_id", message, received=str(draft.asset_id))
        for index, draft in enumerate(drafts)
        if draft.asset_id in asset_ids
    ]
    if problems:
        raise Refusal(code, message, problems)


def planned(
    rule_id: UUID,
    drafts: Iterable[BudgetDraft],
    read: Mapping[UUID, Limit],
    kept: Iterable[Budget],
    now: datetime,
) -> list[Budget]:
    """The budgets that `drafts` ask for, by asset, where the rule has had `kept` until now.

    A budget of an asset that stays keeps what it has consumed, also where that is more than its new limit; one whose
    schedule stays keeps its period, too, and one whose schedule is written differently begins a new one.
    """
    had = {budget.asset_id: budget for budget in kept}
    budgets: list[Budget] = []
    for draft in sorted(drafts, key=lambda draft: draft.asset_id):
        fresh = _fresh(rule_id, draft, read[draft.asset_id], now)
        old = had.get(draft.asset_id)
        if old is None:
            budgets.append(fresh)
        elif _schedule(old) == _schedule(fresh):
            budgets.append(replace(old, maximum=fresh.maximum))
        else:
            budgets.append(replace(fresh, consumed=old.consumed_at(now)))
    return budgets


def _fresh(rule_id: UUID, draft: BudgetDraft, limit: Limit, now: datetime) -> Budget:
    budget = Budget(
        rule_id=rule_id,
        asset_id=draft.asset_id,
        maximum=limit.maximum,
        schedule_type=draft.schedule_type,
        cron_expression=draft.cron_expression,
        interval=draft.interval,
        starts_at=now,
        consumed=money.ZERO,
        next_reset_at=None,
        scale=limit.scale,
    )
    budget.restart(now)
    return budget


def _schedule(budget: Budget) -> tuple[str | None, ...]:
    return budget.schedule_type, budget.cron_expression, budget.interval


def same_terms(some: Sequence[Budget], others: Sequence[Budget]) -> bool:
    """Whether two lists, both by asset, grant the same: assets, limits and schedules, whatever has been consumed."""
    return [(b.asset_id, b.maximum, *_schedule(b)) for b in some] == [
        (b.asset_id, b.maximum, *_schedule(b)) for b in others
    ]
