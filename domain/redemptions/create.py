"""Making redemptions: every gate in the contract's order, then one entry. Contract: redemptions.md 2.1, 2.2, 3.2."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from db import json
from db.session import Transaction
from domain import gates, idempotency, limits, metadata, rewards
from domain.errors import Refusal, bad_field, not_found
from domain.gates import Terms
from domain.ids import new_id
from domain.ledger import spending
from domain.ledger.books import Books, require
from domain.ledger.holdings import load_lots
from domain.ledger.journal import load_accounts, write
from domain.ledger.lots import Lot
from domain.ledger.movements import Cause, HoldTerms
from domain.money import EXACT, ZERO, parse_amount
from domain.redemptions.parties import load_parties, lock_parties, place_of, position_of
from domain.redemptions.queries import get
from domain.redemptions.records import (
    DEFAULT_EXPIRY,
    LONGEST_EXPIRY,
    SHORTEST_EXPIRY,
    CapturedTarget,
    Created,
    Redemption,
    RedemptionRequest,
    require_minimum,
)
from domain.rewards import Reward

_READ = """
select p.status as program_status, p.redemption_target_type as target_type,
       p.redemption_target_entity_id as target_id,
       case when p.redemption_target_entity_id is null then null
            when exists (select from participant e where e.organization_id = asked.organization_id
                         and e.id = p.redemption_target_entity_id) then 'PARTICIPANT'
            when exists (select from holder_group e where e.organization_id = asked.organization_id
                         and e.id = p.redemption_target_entity_id) then 'GROUP'
            else 'PROGRAM' end as target_entity_type,
       w.redemption_type, coalesce(w.requires_confirmation, false) as requires_confirmation,
       a.id as asset_id, a.inventory_mode, a.issuance_policy, a.scale, a.max_transaction_amount,
       a.status as asset_status, l.asset_id is not null as is_linked
from (values (%(organization_id)s::uuid, %(program_id)s::uuid, %(asset_id)s::uuid, %(reward_id)s::uuid))
    as asked (organization_id, program_id, asset_id, reward_id)
left join program p on p.organization_id = asked.organization_id and p.id = asked.program_id
left join reward w on w.organization_id = asked.organization_id and w.id = asked.reward_id
    and w.program_id = asked.program_id
left join asset a on a.organization_id = asked.organization_id and a.id = coalesce(asked.asset_id, w.asset_id)
left join program_asset l on l.organization_id = asked.organization_id and l.program_id = asked.program_id
    and l.asset_id = a.id
"""

_PARTICIPANT = "select id, external_id, status from participant where organization_id = %s and id = %s"

_INSERT = """
insert into redemption (organization_id, id, participant_id, program_id, asset_id, amount, description, reward_id,
                        quantity, unit_cost, reversed_amount, reversed_quantity, status, journal_entry_id, metadata,
                        target_type, target_entity_type, target_entity_id, target_lot_id, requested_amount,
                        requested_quantity, expires_at, idempotency_key, api_key_id, created_at, updated_at)
values (%(organization_id)s, %(id)s, %(participant_id)s, %(program_id)s, %(asset_id)s, %(amount)s, %(description)s,
        %(reward_id)s, %(quantity)s, %(unit_cost)s, %(reversed_amount)s, %(reversed_quantity)s, %(status)s,
        %(journal_entry_id)s, %(metadata)s::json, %(target_type)s, %(target_entity_type)s, %(target_entity_id)s,
        %(target_lot_id)s, %(requested_amount)s, %(requested_quantity)s, %(expires_at)s, %(idempotency_key)s,
        %(api_key_id)s, %(created_at)s, %(updated_at)s)
"""

_INSERT_WITH_LOTS = f"""
with made as ({_INSERT})
insert into redemption_lot (organization_id, redemption_id, ordinal, lot_id, held_lot_id, amount, refilled)
select %(organization_id)s, %(id)s, ordinal, lot_id, held_lot_id, amount, 0
from json_to_recordset(%(lots)s::json) as r (ordinal int, lot_id uuid, held_lot_id uuid, amount numeric)
"""


@dataclass(frozen=True, slots=True)
class _Setting:
    """What program, asset and reward say about a request, as read without a lock; None for what doesn't exist.

    `is_unit_based` is also None where no reward is asked for.
    """

    program_status: str | None
    target: CapturedTarget
    terms: Terms | None
    is_unit_based: bool | None
    requires_confirmation: bool


@dataclass(frozen=True, slots=True)
class _Order:
    """What is bought: the amount to pay, and for items what it buys."""

    amount: Decimal
    description: str
    quantity: int | None = None
    unit_cost: Decimal | None = None


async def consider_reservation(
    tx: Transaction, request: RedemptionRequest, *, expiry_field: str = "expires_in_seconds"
) -> Redemption | None:
    """What the first use of the request's key made; None where there was none and, as things stand, it can be reserved.

    For who is about to have it reserved by a workflow: what is to be refused is refused without one. Nothing is locked,
    so `reserve` judges again. `expiry_field` is what the caller named `expires_in`. Raises what `reserve` raises.
    """
    setting = await _read(tx, request)
    sent_amount = _check_shape(request, setting, expiry_field)
    made = await _find(tx, request, sent_amount)
    if made is not None:
        return made
    reward = None
    if request.reward_id is not None and setting.is_unit_based is not None:
        reward = await rewards.get(tx, request.program_id, request.reward_id)
    participant = await tx.row(_PARTICIPANT, (tx.organization_id, request.participant_id))
    terms = _require_open(request, setting, participant, reward)
    assert participant is not None, "the gates refused an unknown participant"
    order = await _order(tx, request, reward, participant, sent_amount)
    gates.require_within_cap(terms, order.amount)
    books = await load_accounts(tx, [request.participant_id], [terms.asset_id])
    require(books.balance(request.participant_id, terms.asset_id, "AVAILABLE"), order.amount)
    return None


async def create(
    tx: Transaction, request: RedemptionRequest, *, expiry_field: str = "expires_in_seconds"
) -> Created | None:
    """Redeem at once; None, and nothing is done, where it takes two steps. Contract: redemptions.md 2.1 and 2.2.

    `expiry_field` is what the caller named `expires_in`.

    Raises Refusal: `bad_request`, `invalid_scale`, `idempotency_conflict`, `not_found`, `participant_inactive`,
    `program_inactive`, `asset_archived`, `asset_not_linked`, `reward_not_available`, `participant_limit_exceeded`,
    `reward_out_of_stock`, `amount_below_minimum`, `max_transaction_amount_exceeded`, `insufficient_balance`, and
    `conflict` where the program's target is the participant itself.
    """
    setting = await _read(tx, request)
    sent_amount = _check_shape(request, setting, expiry_field)
    if request.requires_confirmation or setting.requires_confirmation:
        return None
    if request.expires_in is not None:
        # It may have taken two steps when the key was first used: the reward's flag can change.
        made = await _find(tx, request, sent_amount)
        if made is None:
            message = "only a redemption that requires a confirmation expires"
            raise bad_field(expiry_field, message, expected="absent")
        return Created(made, replayed=True)
    return await _make(tx, request, setting, sent_amount, new_id(), two_step=False)


async def reserve(tx: Transaction, request: RedemptionRequest, redemption_id: UUID) -> Created:
    """The first step of a two-step redemption: value, stock, price and target are reserved. redemptions.md 3.2.

    It gets the id `redemption_id` (so does its hold), unless the request's key has been used: then it's the replay. A
    request that came without a key should get one of the caller's own making that begins with `automation:`: it makes
    the step repeatable, and is not kept with the redemption. Raises what `create` raises.
    """
    setting = await _read(tx, request)
    sent_amount = _check_shape(request, setting)
    return await _make(tx, request, setting, sent_amount, redemption_id, two_step=True)


async def _make(
    tx: Transaction,
    request: RedemptionRequest,
    setting: _Setting,
    sent_amount: Decimal | None,
    redemption_id: UUID,
    *,
    two_step: bool,
) -> Created:
    entry_id = new_id()
    claim = await idempotency.claim(
        tx,
        request.program_id,
        "redemption",
        request.idempotency_key,
        payload=_payload(request, sent_amount),
        result={"redemption_id": str(redemption_id), "journal_entry_id": str(entry_id)},
    )
    if claim.replayed:
        return Created(await get(tx, UUID(claim.result["redemption_id"])), replayed=True)

    # A reward that doesn't exist is refused in its turn, after the participant and the program.
    reward = None
    if request.reward_id is not None and setting.is_unit_based is not None:
        reward = await rewards.lock(tx, request.program_id, request.reward_id)
    participant = await lock_parties(tx, request.participant_id, setting.target)
    terms = _require_open(request, setting, participant, reward)
    assert participant is not None, "the gates refused an unknown participant"
    order = await _order(tx, request, reward, participant, sent_amount)
    gates.require_within_cap(terms, order.amount)
    redemption = _redemption(tx, request, setting.target, terms, order, redemption_id, entry_id, two_step=two_step)
    books = await load_parties(tx, redemption.participant_id, redemption.target, redemption.asset_id)
    if redemption.has_lots:
        spendable = position_of(redemption).select("AVAILABLE", tx.now)
        await load_lots(tx, books.lots, spendable, redemption.amount)
    lots = (_reserve if two_step else _redeem)(tx, books, redemption)
    if reward is not None and redemption.quantity is not None:
        await rewards.take(tx, reward, redemption.participant_id, redemption.quantity)
    await _insert(tx, redemption, lots)
    await write(tx, books)
    return Created(redemption, replayed=False)


def _redeem(tx: Transaction, books: Books, redemption: Redemption) -> list[tuple[Lot, Lot | None, Decimal]]:
    """Take the value now; the lots it came from, in the order of taking."""
    cause = Cause(redemption.journal_entry_id, redemption.program_id, tx.now, redemption.description)
    place = place_of(books, redemption.target, redemption.asset_id, has_lots=redemption.has_lots)
    parts, made = spending.redeem(books, position_of(redemption), cause, redemption.amount, place)
    redemption.target_lot_id = None if made is None else made.id
    return [(part.lot, None, part.amount) for part in parts]


def _reserve(tx: Transaction, books: Books, redemption: Redemption) -> list[tuple[Lot, Lot | None, Decimal]]:
    """Hold the value; the lots it came from, in the order of taking, and the lots it lies in."""
    reference_id = str(redemption.id)
    cause = Cause(
        redemption.journal_entry_id, redemption.program_id, tx.now, redemption.description, reference_id=reference_id
    )
    # The hold record shows the end; the redemption's own workflow is what carries it out.
    terms = HoldTerms(redemption.id, redemption.expires_at, "RELEASE", "WORKFLOW")
    reserved = spending.reserve(books, position_of(redemption), cause, redemption.amount, terms)
    return [(part.origin, part.held, part.amount) for part in reserved]


# --- gates -----------------------------------------------------------------------------------------------------------


def _require_open(
    request: RedemptionRequest, setting: _Setting, participant: Mapping[str, Any] | None, reward: Reward | None
) -> Terms:
    """The gates up to the asset, in the contract's order; what the asset says. Contract: redemptions.md 1.3."""
    gates.require_participant(participant, needs_active=True)
    if setting.program_status is None:
        raise not_found("program")
    if setting.program_status != "ACTIVE":
        raise Refusal("program_inactive", f"program is {setting.program_status}")
    if request.reward_id is not None and reward is None:
        raise not_found("reward")
    if setting.terms is None:
        raise not_found("asset")
    if setting.terms.asset_status == "ARCHIVED":
        raise Refusal("asset_archived", "asset is ARCHIVED")
    gates.require_linked_asset(setting.terms)
    if setting.target.entity_id == request.participant_id:
        raise Refusal("conflict", "the program's redemption target is this participant, who would be paying itself")
    return setting.terms


async def _order(
    tx: Transaction,
    request: RedemptionRequest,
    reward: Reward | None,
    participant: Mapping[str, Any],
    amount: Decimal | None,
) -> _Order:
    """What is to be paid, as the reward is now; the gates of the catalog. Contract: redemptions.md 2.2."""
    if reward is None:
        assert amount is not None
        return _Order(amount, request.description or "")
    description = request.description or f"Redeemed: {reward.name}"
    rewards.require_redeemable(reward, tx.now)
    await rewards.require_eligible(tx, reward, participant)
    if amount is None:
        quantity = request.quantity or 1
        await rewards.require_allowance(tx, reward, request.participant_id, quantity)
        rewards.require_stock(reward, quantity)
        return _Order(EXACT.multiply(reward.unit_cost, Decimal(quantity)), description, quantity, reward.unit_cost)
    require_minimum(amount, reward.unit_cost, reward.terms.scale)
    return _Order(amount, description, None, reward.unit_cost)


def _check_shape(
    request: RedemptionRequest, setting: _Setting, expiry_field: str = "expires_in_seconds"
) -> Decimal | None:
    """The amount that was sent, None where units were asked for. Raises Refusal `bad_request` or `invalid_scale`.

    What a reward says for good decides here, and nothing that may have changed since the key was first used.
    """
    metadata.require_small(request.metadata)
    _check_expiry(request.expires_in, expiry_field)
    if setting.is_unit_based:
        if request.amount is not None:
            raise bad_field("amount", "must not be sent for a UNIT_BASED reward", expected="absent")
        if request.quantity is not None and not 1 <= request.quantity <= limits.REWARD_UNITS:
            expected = f"1 to {limits.REWARD_UNITS}"
            raise bad_field("quantity", f"must be {expected}", expected=expected, received=request.quantity)
        return None
    if request.quantity is not None and setting.is_unit_based is False:
        raise bad_field("quantity", "must not be sent for an AMOUNT_BASED reward", expected="absent")
    if request.amount is None:
        # Of a reward that doesn't exist nobody can say what it takes; it is refused as unknown later.
        if request.reward_id is not None and setting.is_unit_based is None:
            return None
        raise bad_field("amount", "is required", expected="decimal string", reason="required")
    return parse_amount(request.amount, limits.SCALE_MAX if setting.terms is None else setting.terms.scale)


def _check_expiry(expires_in: timedelta | None, field: str) -> None:
    if expires_in is None or SHORTEST_EXPIRY <= expires_in <= LONGEST_EXPIRY:
        return
    expected = f"{int(SHORTEST_EXPIRY.total_seconds())} to {int(LONGEST_EXPIRY.total_seconds())} seconds"
    raise bad_field(field, f"must be {expected}", expected=expected)


# --- reading and writing ---------------------------------------------------------------------------------------------


async def _find(tx: Transaction, request: RedemptionRequest, amount: Decimal | None) -> Redemption | None:
    """What the first use of the request's key made, as it is now. Raises Refusal `idempotency_conflict`."""
    if request.idempotency_key is None:
        return None
    payload = _payload(request, amount)
    found = await idempotency.find(tx, request.program_id, "redemption", request.idempotency_key, payload)
    return None if found is None else await get(tx, UUID(found["redemption_id"]))


async def _read(tx: Transaction, request: RedemptionRequest) -> _Setting:
    row = await tx.row(
        _READ,
        {
            "organization_id": tx.organization_id,
            "program_id": request.program_id,
            "asset_id": request.asset_id,
            "reward_id": request.reward_id,
        },
    )
    assert row is not None, "the values list has one row"
    terms = None
    if row["asset_id"] is not None:
        terms = Terms(
            program_id=request.program_id,
            program_status=row["program_status"],
            asset_id=row["asset_id"],
            asset_status=row["asset_status"],
            inventory_mode=row["inventory_mode"],
            issuance_policy=row["issuance_policy"],
            scale=row["scale"],
            max_transaction_amount=row["max_transaction_amount"],
            is_linked=row["is_linked"],
        )
    return _Setting(
        program_status=row["program_status"],
        target=CapturedTarget(row["target_type"], row["target_entity_type"], row["target_id"]),
        terms=terms,
        is_unit_based=None if row["redemption_type"] is None else row["redemption_type"] == "UNIT_BASED",
        requires_confirmation=row["requires_confirmation"],
    )


def _payload(request: RedemptionRequest, amount: Decimal | None) -> dict[str, object]:
    """What a key stands for. Contract: redemptions.md 1.2."""
    payload: dict[str, object] = {
        "participant_id": request.participant_id,
        "asset_id": request.asset_id,
        "reward_id": request.reward_id,
        "amount": amount,
        "quantity": (request.quantity or 1) if amount is None else None,
        "description": request.description,
    }
    if request.requires_confirmation:
        payload["requires_confirmation"] = True
    if request.expires_in is not None:
        payload["expires_in"] = str(request.expires_in)
    if request.metadata is not None:
        payload["metadata"] = request.metadata
    return payload


def _redemption(
    tx: Transaction,
    request: RedemptionRequest,
    target: CapturedTarget,
    terms: Terms,
    order: _Order,
    redemption_id: UUID,
    entry_id: UUID,
    *,
    two_step: bool,
) -> Redemption:
    """The redemption as it is going to be recorded."""
    key = request.idempotency_key
    return Redemption(
        id=redemption_id,
        participant_id=request.participant_id,
        program_id=request.program_id,
        asset_id=terms.asset_id,
        amount=order.amount,
        description=order.description,
        reward_id=request.reward_id,
        quantity=order.quantity,
        unit_cost=order.unit_cost,
        reversed_amount=ZERO,
        reversed_quantity=None if order.quantity is None else 0,
        status="PENDING" if two_step else "COMPLETED",
        journal_entry_id=entry_id,
        metadata=request.metadata,
        target_type=target.type,
        target_entity_type=target.entity_type,
        target_entity_id=target.entity_id,
        target_lot_id=None,
        requested_amount=order.amount if two_step else None,
        requested_quantity=order.quantity if two_step else None,
        expires_at=tx.now + (request.expires_in or DEFAULT_EXPIRY) if two_step else None,
        confirmed_at=None,
        canceled_at=None,
        cancel_reason=None,
        confirm_key=None,
        confirm_hash=None,
        idempotency_key=None if idempotency.is_ours(key) else key,
        api_key_id=tx.api_key_id,
        created_at=tx.now,
        updated_at=tx.now,
        scale=terms.scale,
        has_lots=terms.has_lots,
        asset_status=terms.asset_status,
    )


async def _insert(tx: Transaction, redemption: Redemption, lots: list[tuple[Lot, Lot | None, Decimal]]) -> None:
    params: dict[str, Any] = {
        "organization_id": tx.organization_id,
        **{name: getattr(redemption, name) for name in Redemption.__dataclass_fields__},
        "metadata": None if redemption.metadata is None else json.parameter(redemption.metadata),
    }
    if not lots:
        await tx.execute(_INSERT, params)
        return
    rows = [
        {"ordinal": ordinal, "lot_id": lot.id, "held_lot_id": None if held is None else held.id, "amount": amount}
        for ordinal, (lot, held, amount) in enumerate(lots)
    ]
    await tx.execute(_INSERT_WITH_LOTS, {**params, "lots": json.parameter(rows)})
