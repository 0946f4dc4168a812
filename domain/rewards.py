"""The rewards catalog: items that participants buy, and the stock they are taken from. Contract: redemptions.md 4.

A UNIT_BASED reward counts: its row lock guards its status, `redeemed_count` and who has had how many, so that nothing
is ever oversold. Redemptions take that lock before any program's or participant's (domain/locks.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db import json
from db.session import Transaction
from domain import eligibility, gates, programs
from domain.clock import format_timestamp
from domain.errors import Problem, Refusal, bad_field, not_found
from domain.gates import Terms
from domain.ids import new_id
from domain.metadata import require_small
from domain.pagination import Page, PageRequest, cut, decode_cursor, sort_name

RedemptionType = Literal["UNIT_BASED", "AMOUNT_BASED"]
RewardStatus = Literal["DRAFT", "ACTIVE", "OUT_OF_STOCK", "ARCHIVED"]
RewardSort = Literal["created_at", "name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward as one statement read it, with the terms between its program and its asset.

    `max_total` and `max_per_participant` are None for unlimited, and always for AMOUNT_BASED.
    """

    id: UUID
    program_id: UUID
    name: str
    description: str | None
    category: str | None
    redemption_type: RedemptionType
    asset_id: UUID
    unit_cost: Decimal
    status: RewardStatus
    max_total: int | None
    max_per_participant: int | None
    available_from: datetime | None
    available_until: datetime | None
    metadata: dict[str, Any] | None
    requires_confirmation: bool
    eligibility: str | None
    redeemed_count: int
    created_at: datetime
    updated_at: datetime
    terms: Terms

    @property
    def is_unit_based(self) -> bool:
        """Whether it is sold in units, which are counted."""
        return self.redemption_type == "UNIT_BASED"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewReward:
    """What a new reward is made of; `unit_cost` is decimal text."""

    name: str
    redemption_type: RedemptionType
    asset_id: UUID
    unit_cost: str
    status: RewardStatus
    description: str | None = None
    category: str | None = None
    max_total: int | None = None
    max_per_participant: int | None = None
    available_from: datetime | None = None
    available_until: datetime | None = None
    metadata: dict[str, Any] | None = None
    requires_confirmation: bool = False
    eligibility: str | None = None


@dataclass(frozen=True, slots=True)
class RewardFilter:
    """What a list of rewards keeps; archived ones only when asked for, one way or the other."""

    status: RewardStatus | None = None
    include_archived: bool = False
    search: str | None = None


# --- the catalog -----------------------------------------------------------------------------------------------------


async def create(tx: Transaction, program_id: UUID, new: NewReward) -> Reward:
    """Add a reward to the program's catalog, in whatever status. Contract: redemptions.md 4.2.

    Raises Refusal: `not_found` for the program or the asset, `bad_request` or `invalid_scale` naming the field,
    `asset_not_linked`, `conflict` for a name in use.
    """
    require_small(new.metadata)
    if new.eligibility is not None:
        await eligibility.check(new.eligibility)
    terms = await gates.read_terms(tx, program_id, new.asset_id)
    columns = {item.name: getattr(new, item.name) for item in fields(new)}
    reward = Reward(
        **columns | {"unit_cost": terms.amount(new.unit_cost, "unit_cost")},
        id=new_id(),
        program_id=program_id,
        redeemed_count=0,
        created_at=tx.now,
        updated_at=tx.now,
        terms=terms,
    )
    _require_sound(reward)
    gates.require_linked_asset(terms)
    await _require_free_name(tx, reward)
    await tx.execute(_INSERT, _parameters(tx, reward))
    return reward


async def get(tx: Transaction, program_id: UUID, reward_id: UUID) -> Reward:
    """The program's reward, archived or not, as it stands; nothing is locked. Raises Refusal `not_found`."""
    return await _read(tx, _GET, program_id, reward_id)


async def find(
    tx: Transaction,
    program_id: UUID,
    wanted: RewardFilter,
    page: PageRequest,
    sort_by: RewardSort,
    descending: bool,
) -> Page[Reward]:
    """A page of the program's catalog. Raises Refusal: `not_found` for the program, `bad_request` for the cursor."""
    await programs.get(tx, program_id)
    sort = sort_name([sort_by, "id"], descending)
    after = decode_cursor(page.cursor, sort, [str if sort_by == "name" else datetime, UUID])
    query: LiteralString = _LIST
    if wanted.status is not None:
        query += " and r.status = %(status)s"
    elif not wanted.include_archived:
        query += " and r.status <> 'ARCHIVED'"
    if wanted.search:
        query += " and strpos(lower(r.name), lower(%(search)s)) > 0"
    if after is not None:
        query += _AFTER[sort_by, descending]
    params = {
        "organization_id": tx.organization_id,
        "program_id": program_id,
        "status": wanted.status,
        "search": wanted.search,
        "after": after and after[0],
        "after_id": after and after[1],
        "limit": page.limit + 1,
    }
    rows = await tx.rows(query + _ORDER[sort_by, descending], params)
    return cut([_reward(row) for row in rows], page.limit, sort, lambda reward: [getattr(reward, sort_by), reward.id])


async def update(tx: Transaction, program_id: UUID, reward_id: UUID, changes: Mapping[str, Any]) -> Reward:
    """Change a reward: the members of `changes` are the contract's fields, None clears one. Contract: 4.2, 4.3.

    Raises Refusal: `not_found`, `bad_request` or `invalid_scale` naming the field, `conflict` for a name in use and for
    a `max_total` below what has been redeemed.
    """
    require_small(changes.get("metadata"))
    if changes.get("eligibility") is not None:
        await eligibility.check(changes["eligibility"])
    before = await _read(tx, _LOCK_FOR_CHANGE, program_id, reward_id)
    if "unit_cost" in changes:
        changes = {**changes, "unit_cost": before.terms.amount(changes["unit_cost"], "unit_cost")}
    after = replace(before, **changes)
    _require_sound(after)
    _require_room_for_redeemed(after)
    after = replace(after, status=_status_after(before, after))
    if after.name != before.name:
        await _require_free_name(tx, after)
    # A redemption that began later may have come to the lock earlier: the time of the last change never runs back.
    after = replace(after, updated_at=max(tx.now, before.updated_at))
    await tx.execute(_UPDATE, _parameters(tx, after))
    return after


def _require_sound(reward: Reward) -> None:
    """Refuse fields that contradict each other. Raises Refusal `bad_request`. Contract: redemptions.md 4.1."""
    if not reward.is_unit_based:
        for field in ("max_total", "max_per_participant"):
            if getattr(reward, field) is not None:
                raise bad_field(field, "only UNIT_BASED rewards count units", expected="absent")
    start, end = reward.available_from, reward.available_until
    if start is not None and end is not None and end <= start:
        message = "must be after available_from"
        raise bad_field("available_until", message, expected="a later timestamp", received=format_timestamp(end))


def _require_room_for_redeemed(reward: Reward) -> None:
    """Refuse a `max_total` below the units redeemed. Raises Refusal `conflict`. Contract: redemptions.md 4.3."""
    if reward.max_total is None or reward.max_total >= reward.redeemed_count:
        return
    message = f"{reward.redeemed_count} units are redeemed already"
    problem = Problem("max_total", message, expected=f"at least {reward.redeemed_count}", received=reward.max_total)
    raise Refusal("conflict", message, [problem])


def _status_after(before: Reward, after: Reward) -> RewardStatus:
    """The status of a changed reward, sold out or on sale again. Contract: redemptions.md 4.3."""
    is_sold_out = after.max_total is not None and after.redeemed_count >= after.max_total
    if after.status == "ACTIVE" and is_sold_out:
        return "OUT_OF_STOCK"
    has_more = before.max_total is not None and (after.max_total is None or after.max_total > before.max_total)
    if after.status == "OUT_OF_STOCK" and has_more:
        return "ACTIVE"
    return after.status


async def _require_free_name(tx: Transaction, reward: Reward) -> None:
    # Two at once are told apart by the unique constraint: the second is repeated and then ends here.
    taken = await tx.row(
        "select 1 from reward where organization_id = %s and program_id = %s and name = %s and id <> %s",
        (tx.organization_id, reward.program_id, reward.name, reward.id),
    )
    if taken is not None:
        message = "the program has a reward of this name already"
        raise Refusal("conflict", message, [Problem("name", message, expected="a free name", received=reward.name)])


# --- what redemptions ask and do, in the order of the contract's checks (2.2) ----------------------------------------


async def lock(tx: Transaction, program_id: UUID, reward_id: UUID) -> Reward:
    """The reward for a redemption, a confirmation or a reversal: locked to the end of the transaction if UNIT_BASED.

    An AMOUNT_BASED reward has no counters, so it is only read, and a popular one makes nobody wait. Everything about
    it has to be decided from this one reading: a change that commits meanwhile then counts as made afterwards.
    One statement; the terms are read in it too, without a lock. Raises Refusal `not_found`.
    """
    return await _read(tx, _LOCK, program_id, reward_id)


def require_redeemable(reward: Reward, now: datetime) -> None:
    """Refuse a reward that is sold out (`reward_out_of_stock`), or is not ACTIVE or outside its window
    (`reward_not_available`). Contract: redemptions.md 2.2 and 4.3."""
    if reward.status == "OUT_OF_STOCK":
        raise Refusal("reward_out_of_stock", "reward is OUT_OF_STOCK")
    if reward.status != "ACTIVE":
        raise Refusal("reward_not_available", f"reward is {reward.status}")
    if reward.available_from is not None and now < reward.available_from:
        raise Refusal("reward_not_available", f"reward is available from {format_timestamp(reward.available_from)}")
    if reward.available_until is not None and now >= reward.available_until:
        raise Refusal("reward_not_available", f"reward was available until {format_timestamp(reward.available_until)}")


async def require_eligible(tx: Transaction, reward: Reward, participant: Mapping[str, Any]) -> None:
    """Refuse a participant whom the reward's eligibility doesn't admit. Contract: redemptions.md 4.4.

    `participant` is the locked row with id, external_id and status. Nothing is read unless the expression reads it.
    Raises Refusal `reward_not_available`, its problem's reason `not_eligible`.
    """
    if reward.eligibility is None or await eligibility.admits(tx, reward.eligibility, participant):
        return
    message = "participant is not eligible for this reward"
    problem = Problem("reward_id", message, reason="not_eligible", received=str(reward.id))
    raise Refusal("reward_not_available", message, [problem])


async def require_allowance(tx: Transaction, reward: Reward, participant_id: UUID, quantity: int) -> None:
    """Refuse more units than the participant may still have. The reward is locked.

    Raises Refusal `participant_limit_exceeded`. Nothing is read where there is no limit.
    """
    limit = reward.max_per_participant
    if limit is None:
        return
    cursor = await tx.execute(
        "select quantity from reward_usage where organization_id = %s and reward_id = %s and participant_id = %s",
        (tx.organization_id, reward.id, participant_id),
    )
    found = await cursor.fetchone()
    _require_units(
        limit, found[0] if found else 0, quantity, "participant_limit_exceeded", "of the participant's limit"
    )


def require_stock(reward: Reward, quantity: int) -> None:
    """Refuse more units than are left. The reward is locked. Raises Refusal `reward_out_of_stock`."""
    if reward.max_total is not None:
        _require_units(reward.max_total, reward.redeemed_count, quantity, "reward_out_of_stock", "in stock")


def _require_units(limit: int, used: int, quantity: int, code: str, where: str) -> None:
    # A limit can have been lowered below what is used already.
    left = max(limit - used, 0)
    if quantity <= left:
        return
    message = f"{left} units are left {where}"
    raise Refusal(code, message, [Problem("quantity", message, expected=f"at most {left}", received=quantity)])


async def take(tx: Transaction, reward: Reward, participant_id: UUID, quantity: int) -> None:
    """Count `quantity` units as the participant's; the last one makes the reward OUT_OF_STOCK. One statement.

    The reward is UNIT_BASED, locked, and the checks above have passed.
    """
    assert reward.is_unit_based, "amounts are not counted"
    await _count(tx, _TAKE, reward.id, participant_id, quantity)


async def give_back(tx: Transaction, reward_id: UUID, participant_id: UUID, quantity: int) -> None:
    """Take `quantity` units off the participant's count and the total; an OUT_OF_STOCK reward is ACTIVE again.

    One statement. The reward is UNIT_BASED and locked by the caller. A DRAFT or ARCHIVED one keeps its status.
    """
    await _count(tx, _GIVE_BACK, reward_id, participant_id, quantity)


async def _count(tx: Transaction, query: LiteralString, reward_id: UUID, participant_id: UUID, quantity: int) -> None:
    assert quantity > 0
    params = {
        "organization_id": tx.organization_id,
        "id": reward_id,
        "participant_id": participant_id,
        "quantity": quantity,
        "now": tx.now,
    }
    cursor = await tx.execute(query, params)
    assert cursor.rowcount == 1, "both counts change, or none"


# --- statements ------------------------------------------------------------------------------------------------------

_COLUMNS: LiteralString = """
select r.id, r.program_id, r.name, r.description, r.category, r.redemption_type, r.asset_id, r.unit_cost, r.status,
       r.max_total, r.max_per_participant, r.available_from, r.available_until, r.metadata, r.requires_confirmation,
       r.eligibility, r.redeemed_count, r.created_at, r.updated_at,
       p.status as program_status, a.status as asset_status, a.inventory_mode, a.issuance_policy, a.scale,
       a.max_transaction_amount, l.asset_id is not null as is_linked
"""
_TERMS: LiteralString = """
join program p on p.organization_id = r.organization_id and p.id = r.program_id
join asset a on a.organization_id = r.organization_id and a.id = r.asset_id
left join program_asset l on l.organization_id = r.organization_id and l.program_id = r.program_id
    and l.asset_id = r.asset_id
"""
_OF_PROGRAM: LiteralString = "where r.organization_id = %(organization_id)s and r.program_id = %(program_id)s"

_LIST: LiteralString = _COLUMNS + "from reward r" + _TERMS + _OF_PROGRAM
_GET: LiteralString = _LIST + " and r.id = %(id)s"
_LOCK_FOR_CHANGE: LiteralString = _GET + " for no key update of r"

# The type never changes, so that exactly one branch finds the reward, whatever the other one waits for.
_LOCK: LiteralString = f"""
with locked as (
    select r.* from reward r {_OF_PROGRAM} and r.id = %(id)s and r.redemption_type = 'UNIT_BASED' for no key update
), found as (
    select * from locked
    union all
    select r.* from reward r {_OF_PROGRAM} and r.id = %(id)s and r.redemption_type = 'AMOUNT_BASED'
)
{_COLUMNS} from found r {_TERMS}
"""

_AFTER: dict[tuple[RewardSort, bool], LiteralString] = {
    ("created_at", True): " and (r.created_at, r.id) < (%(after)s, %(after_id)s)",
    ("created_at", False): " and (r.created_at, r.id) > (%(after)s, %(after_id)s)",
    ("name", True): " and (r.name, r.id) < (%(after)s, %(after_id)s)",
    ("name", False): " and (r.name, r.id) > (%(after)s, %(after_id)s)",
}
_ORDER: dict[tuple[RewardSort, bool], LiteralString] = {
    ("created_at", True): " order by r.created_at desc, r.id desc limit %(limit)s",
    ("created_at", False): " order by r.created_at, r.id limit %(limit)s",
    ("name", True): " order by r.name desc, r.id desc limit %(limit)s",
    ("name", False): " order by r.name, r.id limit %(limit)s",
}

_INSERT: LiteralString = """
insert into reward (
    organization_id, id, program_id, name, description, category, redemption_type, asset_id, unit_cost, status,
    max_total, max_per_participant, available_from, available_until, metadata, requires_confirmation, eligibility,
    redeemed_count, created_at, updated_at)
values (
    %(organization_id)s, %(id)s, %(program_id)s, %(name)s, %(description)s, %(category)s, %(redemption_type)s,
    %(asset_id)s, %(unit_cost)s, %(status)s, %(max_total)s, %(max_per_participant)s, %(available_from)s,
    %(available_until)s, %(metadata)s::json, %(requires_confirmation)s, %(eligibility)s, %(redeemed_count)s,
    %(created_at)s, %(updated_at)s)
"""
_UPDATE: LiteralString = """
update reward set
    name = %(name)s, description = %(description)s, category = %(category)s, unit_cost = %(unit_cost)s,
    status = %(status)s, max_total = %(max_total)s, max_per_participant = %(max_per_participant)s,
    available_from = %(available_from)s, available_until = %(available_until)s, metadata = %(metadata)s::json,
    requires_confirmation = %(requires_confirmation)s, eligibility = %(eligibility)s, updated_at = %(updated_at)s
where organization_id = %(organization_id)s and id = %(id)s
"""

# Only a change of status touches `updated_at`: who follows the catalog isn't woken by every sale.
_TAKE: LiteralString = """
with taken as (
    insert into reward_usage as u (organization_id, reward_id, participant_id, quantity)
    values (%(organization_id)s, %(id)s, %(participant_id)s, %(quantity)s)
    on conflict (organization_id, reward_id, participant_id) do update set quantity = u.quantity + excluded.quantity
    returning 1
)
update reward r set
    redeemed_count = r.redeemed_count + %(quantity)s,
    status = case when r.redeemed_count + %(quantity)s = r.max_total then 'OUT_OF_STOCK' else r.status end,
    updated_at = case when r.redeemed_count + %(quantity)s = r.max_total then greatest(r.updated_at, %(now)s)
                      else r.updated_at end
from taken
where r.organization_id = %(organization_id)s and r.id = %(id)s
"""
_GIVE_BACK: LiteralString = """
with returned as (
    update reward_usage set quantity = quantity - %(quantity)s
    where organization_id = %(organization_id)s and reward_id = %(id)s and participant_id = %(participant_id)s
    returning 1
)
update reward r set
    redeemed_count = r.redeemed_count - %(quantity)s,
    status = case when r.status = 'OUT_OF_STOCK' then 'ACTIVE' else r.status end,
    updated_at = case when r.status = 'OUT_OF_STOCK' then greatest(r.updated_at, %(now)s) else r.updated_at end
from returned
where r.organization_id = %(organization_id)s and r.id = %(id)s
"""

_TERM_COLUMNS = (
    "program_status",
    "asset_status",
    "inventory_mode",
    "issuance_policy",
    "scale",
    "max_transaction_amount",
    "is_linked",
)


async def _read(tx: Transaction, query: LiteralString, program_id: UUID, reward_id: UUID) -> Reward:
    row = await tx.row(query, {"organization_id": tx.organization_id, "program_id": program_id, "id": reward_id})
    if row is None:
        raise not_found("reward")
    return _reward(row)


def _reward(row: DictRow) -> Reward:
    terms = {name: row.pop(name) for name in _TERM_COLUMNS}
    return Reward(**row, terms=Terms(program_id=row["program_id"], asset_id=row["asset_id"], **terms))


def _parameters(tx: Transaction, reward: Reward) -> dict[str, Any]:
    columns = {item.name: getattr(reward, item.name) for item in fields(reward) if item.name != "terms"}
    metadata = None if reward.metadata is None else json.parameter(reward.metadata)
    return {**columns, "organization_id": tx.organization_id, "metadata": metadata}
