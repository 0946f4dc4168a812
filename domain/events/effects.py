"""What each type of action does to the world. Contract: rules-and-events.md 5, holders.md 6.

An effect is all or nothing only together with its event: whoever runs it undoes the world when it raises. One that
would have to reach for what isn't loaded notes that in the world and does nothing, so that the pass goes on and learns
what else the event reaches for; the event is then applied again.
"""

import decimal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, cast
from uuid import UUID

from domain import limits
from domain.automations import NewAutomation
from domain.clock import format_timestamp
from domain.errors import Refusal
from domain.events.state import Holder
from domain.events.world import AssetTerms, QueuedEvent, World
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.books import Account, Entry, require
from domain.ledger.holds import Hold
from domain.ledger.lots import Part, Selection, total
from domain.ledger.movements import Cause, HolderType, HoldTerms, Position
from domain.ledger.shelves import Shelf
from domain.money import EXACT, ZERO, fits_scale, fits_size, format_amount, format_plain
from domain.money import total as sum_of
from domain.rules import results
from domain.rules.cel import Activation
from domain.rules.compiled import Action, CompiledRule

Result = dict[str, Any]
"""What an action did, as the event's evaluation shows it."""

BLOCKED_WHEN_INACTIVE = frozenset({"CREDIT", "DEBIT", "HOLD", "RELEASE", "FORFEIT", "COUNTER"})
"""Actions that fail on a SUSPENDED or CLOSED participant. Contract: rules-and-events.md 5.3."""

_CAPPED = frozenset({"CREDIT", "DEBIT"})
_TAKES_NEW_VALUE = frozenset({"CREDIT", "DEBIT", "HOLD"})
_CURABLE = frozenset({"insufficient_balance", "insufficient_program_balance"})


class ActionFailed(Exception):
    """An action that can't be done. `curable` when a later credit may cure it, so that a retry makes sense."""

    def __init__(self, cause: str, *, curable: bool = False) -> None:
        super().__init__(cause)
        self.curable = curable


@dataclass(frozen=True, slots=True)
class Call:
    """One action of one rule for one event. `holder` is whom it is directed at, None for nobody."""

    world: World
    event: QueuedEvent
    rule: CompiledRule
    action: Action
    holder: Holder | None
    activation: Activation
    now: datetime


def perform(call: Call) -> Result | None:
    """Do what the action says; what it did, or None for a credit that a spent budget has suppressed.

    Raises ActionFailed.
    """
    if call.holder is not None and call.holder.is_phantom:
        return {}  # whoever this is has yet to be loaded
    try:
        _require_open(call)
        return _EFFECTS[call.action.type](call)
    except results.BadResult as bad:
        raise ActionFailed(str(bad)) from None
    except Refusal as refusal:
        raise ActionFailed(refusal.message, curable=refusal.code in _CURABLE) from None


def _require_open(call: Call) -> None:
    """Whether the holder's status lets the action happen. Contract: rules-and-events.md 5.3, holders.md 4.3."""
    holder = call.holder
    if holder is None or holder.status == "ACTIVE":
        return
    if holder.entity_type == "PARTICIPANT":
        if call.action.type in BLOCKED_WHEN_INACTIVE:
            raise ActionFailed(f"participant is {holder.status}")
    elif holder.status == "ARCHIVED":
        raise ActionFailed(f"{holder.entity_type.lower()} is ARCHIVED")


# --- value -----------------------------------------------------------------------------------------------------------


def _credit(call: Call) -> Result | None:
    asset = _asset(call)
    amount = _amount(call, asset)
    reference_id = results.reference(call.action, call.activation)
    if amount == ZERO:
        return _moved(call, asset, amount)
    if call.action.bucket == "HELD":
        return _credit_held(call, asset, amount, reference_id)
    if reference_id is not None:
        return _settle(call, asset, amount, reference_id)
    expires_at, matures_at = results.lot_terms(call.action, call.activation, call.now)
    if not _issue(call, asset, amount):
        return None
    entry = movements.credit(
        call.world.books,
        _position(call, asset),
        _cause(call),
        amount,
        _funded_source(call, asset, amount),
        expires_at=expires_at,
        matures_at=matures_at,
    )
    return _moved(call, asset, amount, entry)


def _credit_held(call: Call, asset: AssetTerms, amount: Decimal, reference_id: str | None) -> Result | None:
    """Provisional value: an authorization. Contract: rules-and-events.md 5.5."""
    expires_at, _ = results.lot_terms(call.action, call.activation, call.now)
    terms = _hold_terms(call)
    if not _issue(call, asset, amount):
        return None
    entry = movements.credit_held(
        call.world.books,
        _position(call, asset),
        _cause(call, reference_id),
        amount,
        _funded_source(call, asset, amount),
        terms,
        expires_at=expires_at,
    )
    return _moved(call, asset, amount, entry, hold_id=terms.hold_id, **_shown(reference_id))


def _settle(call: Call, asset: AssetTerms, amount: Decimal, reference_id: str) -> Result | None:
    """Reconcile with what is provisionally held under the reference. Contract: rules-and-events.md 5.5."""
    position = _position(call, asset)
    selection = position.select("HELD", call.now, reference_id=reference_id, only_provisional=True)
    parts = _take(call, selection, None)
    if parts is None:
        return _moved(call, asset, amount)
    sources = _return_accounts(call, asset, parts)
    own = _source(call, asset)
    if sources is None or own is None:
        return _moved(call, asset, amount)
    expires_at, matures_at = results.lot_terms(call.action, call.activation, call.now)
    if not _issue(call, asset, EXACT.subtract(amount, total(parts))):
        return None
    settled = movements.settle(
        call.world.books,
        position,
        _cause(call, reference_id),
        amount,
        own,
        selection,
        sources,
        expires_at=expires_at,
        matures_at=matures_at,
    )
    shown = {
        "held_amount": format_amount(settled.held_amount, asset.scale),
        "delta": format_amount(settled.delta, asset.scale),
    }
    return _moved(call, asset, amount, settled.entry, reference_id=reference_id, settle=shown)


def _debit(call: Call) -> Result:
    asset = _asset(call)
    amount = _amount(call, asset)
    reference_id = results.reference(call.action, call.activation)
    if amount == ZERO:
        return _moved(call, asset, amount)
    position, cause, books = _position(call, asset), _cause(call, reference_id), call.world.books
    if call.action.bucket == "HELD":
        selection = position.select("HELD", call.now, reference_id=reference_id)
        if not _reaches_held(call, asset, amount, selection):
            return _moved(call, asset, amount)
        return _moved(call, asset, amount, movements.debit_held(books, position, cause, amount, selection))
    is_overdraft = call.action.allow_negative
    if not is_overdraft:
        require(position.account(books, "AVAILABLE").balance, amount)
    # Where lots fall short all of them have been read: below zero every one goes, expired ones by their own entries.
    if asset.has_lots and _take(call, position.select("AVAILABLE", call.now), amount) is None:
        return _moved(call, asset, amount)
    entry = movements.debit(books, position, cause, amount, allow_negative=is_overdraft)
    return _moved(call, asset, amount, entry)


def _hold(call: Call) -> Result:
    asset = _asset(call)
    amount = _amount(call, asset)
    reference_id = results.reference(call.action, call.activation)
    terms = _hold_terms(call)
    if amount == ZERO:
        return _moved(call, asset, amount)
    position = _position(call, asset)
    require(position.account(call.world.books, "AVAILABLE").balance, amount)
    selection = position.select("AVAILABLE", call.now)
    if asset.has_lots and _take(call, selection, amount) is None:
        return _moved(call, asset, amount)
    entry, _ = movements.hold(call.world.books, position, _cause(call, reference_id), amount, terms, selection)
    return _moved(call, asset, amount, entry, hold_id=terms.hold_id, **_shown(reference_id))


def _release(call: Call) -> Result:
    asset = _asset(call)
    amount = _amount_or_all(call, asset)
    reference_id = results.reference(call.action, call.activation)
    if amount == ZERO:
        return _moved(call, asset, ZERO)
    position = _position(call, asset)
    selection = position.select("HELD", call.now, reference_id=reference_id)
    if not _reaches_held(call, asset, amount, selection):
        return _moved(call, asset, ZERO)
    entry, _ = movements.release(call.world.books, position, _cause(call, reference_id), amount, selection)
    return _moved(call, asset, _amount_of(entry), entry, **_shown(reference_id))


def _forfeit(call: Call) -> Result:
    asset = _asset(call)
    amount = _amount_or_all(call, asset)
    reference_id = results.reference(call.action, call.activation)
    if amount == ZERO:
        return _moved(call, asset, ZERO)
    position, cause, books = _position(call, asset), _cause(call, reference_id), call.world.books
    selection = position.select(_bucket(call), call.now, reference_id=reference_id)
    if call.action.bucket == "HELD":
        if not _reaches_held(call, asset, amount, selection):
            return _moved(call, asset, ZERO)
        entry, _ = movements.forfeit_held(books, position, cause, amount, selection)
    else:
        require(position.account(books, "AVAILABLE").balance, amount or ZERO)
        if asset.has_lots and _take(call, selection, amount) is None:
            return _moved(call, asset, ZERO)
        entry, _ = movements.forfeit(books, position, cause, amount, selection)
    return _moved(call, asset, _amount_of(entry), entry, **_shown(reference_id))


def _void_hold(call: Call) -> Result:
    """Take provisional value back; nothing under the reference is a no-op. Contract: rules-and-events.md 5.9."""
    asset = _asset(call)
    reference_id = results.reference(call.action, call.activation)
    position = _position(call, asset)
    selection = position.select("HELD", call.now, reference_id=reference_id, only_provisional=True)
    parts = _take(call, selection, None)
    sources = _return_accounts(call, asset, parts or ())
    if not parts or sources is None:
        return _moved(call, asset, ZERO, **_shown(reference_id))
    entry, _ = movements.void_hold(call.world.books, position, _cause(call, reference_id), selection, sources)
    return _moved(call, asset, _amount_of(entry), entry, **_shown(reference_id))


def _asset(call: Call) -> AssetTerms:
    assert call.action.asset_id is not None, "checked when the rule was saved"
    asset = call.world.assets.get(call.action.asset_id)
    if asset is None or not asset.is_linked:
        raise ActionFailed("asset is not linked to the program")
    if asset.is_archived and call.action.type in _TAKES_NEW_VALUE:
        raise ActionFailed("asset is archived")
    return asset


def _amount(call: Call, asset: AssetTerms) -> Decimal:
    """The amount of the action, checked. Contract: rules-and-events.md 5.4."""
    amount = results.amount(call.action, call.activation, asset.scale)
    cap = asset.max_transaction_amount
    if cap is not None and amount > cap and call.action.type in _CAPPED:
        raise ActionFailed("amount exceeds max_transaction_amount")
    return amount


def _amount_or_all(call: Call, asset: AssetTerms) -> Decimal | None:
    return None if call.action.amount is None else _amount(call, asset)


def _position(call: Call, asset: AssetTerms) -> Position:
    holder = _holder(call)
    return Position(cast(HolderType, holder.entity_type), holder.id, asset.id, asset.has_lots)


def _bucket(call: Call) -> Literal["AVAILABLE", "HELD"]:
    return "HELD" if call.action.bucket == "HELD" else "AVAILABLE"


def _hold_terms(call: Call) -> HoldTerms:
    """Who ends the hold and when. Contract: rules-and-events.md 5.7."""
    until = call.action.hold_until
    if until is None:
        return HoldTerms(new_id())
    expires_at = results.instant(until, "hold_until", call.activation, call.now)
    return HoldTerms(new_id(), expires_at, "RELEASE", "PROGRAM")


def _take(call: Call, selection: Selection, amount: Decimal | None) -> list[Part] | None:
    """The lots that `amount` (None: all) takes of the selection, or less; None where not enough of them is loaded."""
    parts = call.world.books.lots.take(selection, amount)
    bucket: Literal["AVAILABLE", "HELD"] = "HELD" if selection.status == "HELD" else "AVAILABLE"
    shelf = Shelf(selection.entity_id, selection.asset_id, bucket, True, selection.reference_id)
    covered = call.world.shelves.covers(shelf, amount, [part.lot for part in parts], total(parts))
    return parts if covered else None


def _reaches_held(call: Call, asset: AssetTerms, amount: Decimal | None, selection: Selection) -> bool:
    """Whether what an operation on HELD may use up is loaded: lots of the selection, or on SIMPLE the oldest holds."""
    if asset.has_lots:
        return _take(call, selection, amount) is not None
    holds = call.world.books.holds
    taken = holds.take_oldest(selection.entity_id, selection.asset_id, amount)
    holds_taken: Sequence[Hold] = [holds.get(hold_id) for hold_id in taken]
    shelf = Shelf(selection.entity_id, selection.asset_id, "HELD", has_lots=False)
    return call.world.shelves.covers(shelf, amount, holds_taken, sum_of(taken.values()))


def _issue(call: Call, asset: AssetTerms, amount: Decimal) -> bool:
    """Charge the rule's budget with what is issued; False where it doesn't cover that. A negative amount goes back."""
    budgets = call.world.budgets
    if not budgets.covers(call.rule.id, asset.id, amount, call.now):
        return False
    budgets.consume(call.rule.id, asset.id, amount, call.now)
    return True


def _source(call: Call, asset: AssetTerms) -> Account | None:
    """The account that credits of the asset are drawn from; None where it isn't loaded. Contract: basics.md 6.6."""
    if not asset.is_prefunded:
        return call.world.books.system("SYSTEM_ISSUANCE", asset.id)
    return call.world.wallet(call.world.program.id, asset.id)


def _funded_source(call: Call, asset: AssetTerms, amount: Decimal) -> Account:
    """The account that a credit of `amount` is drawn from. Raises ActionFailed where a wallet is short."""
    source = _source(call, asset)
    assert source is not None, "the event's own program is always loaded"
    if asset.is_prefunded and source.balance < amount:
        raise ActionFailed("insufficient program balance", curable=True)
    return source


def _return_accounts(call: Call, asset: AssetTerms, parts: Sequence[Part]) -> dict[UUID, Account] | None:
    """Where the value of each lot's program goes back to; None where one isn't loaded. README.md "Small print"."""
    program_ids = {part.lot.program_id for part in parts}
    if not asset.is_prefunded:
        issuance = call.world.books.system("SYSTEM_ISSUANCE", asset.id)
        return dict.fromkeys(program_ids, issuance)
    wallets = {program_id: call.world.wallet(program_id, asset.id) for program_id in program_ids}
    return None if None in wallets.values() else cast(dict[UUID, Account], wallets)


def _cause(call: Call, reference_id: str | None = None) -> Cause:
    return Cause(
        new_id(),
        call.world.program.id,
        call.now,
        description=call.action.description or call.rule.name,
        event_id=call.event.id,
        rule_id=call.rule.id,
        reference_id=reference_id,
        request_id=call.event.request_id,
    )


def _amount_of(entry: Entry) -> Decimal:
    """What an entry moved: the amount that its first posting takes away."""
    return entry.lines[0].amount.copy_abs()


def _moved(call: Call, asset: AssetTerms, amount: Decimal | None, entry: Entry | None = None, **more: Any) -> Result:
    result = {
        "type": call.action.type,
        "asset_id": asset.id,
        "amount": format_amount(amount or ZERO, asset.scale),
        "target": _target(call),
        **more,
    }
    if entry is not None:
        result["journal_entry_id"] = entry.id
    return result


def _shown(reference_id: str | None) -> Result:
    return {} if reference_id is None else {"reference_id": reference_id}


# --- state -----------------------------------------------------------------------------------------------------------


def _tag(call: Call) -> Result:
    assert call.action.tag is not None
    if len(_holder(call).tags) >= limits.STATE_KEYS and call.action.tag not in _holder(call).tags:
        raise ActionFailed(f"more than {limits.STATE_KEYS} tags")
    call.world.state.tag(_holder(call), call.action.tag, call.event.id, call.rule.id)
    return {"type": call.action.type, "tag": call.action.tag, "target": _target(call)}


def _untag(call: Call) -> Result:
    assert call.action.tag is not None
    call.world.state.untag(_holder(call), call.action.tag, call.event.id, call.rule.id)
    return {"type": call.action.type, "tag": call.action.tag, "target": _target(call)}


def _counter(call: Call) -> Result:
    action = call.action
    assert action.key is not None
    _require_room(call, "counter", _holder(call).counters)
    amount = results.increment(action, call.activation)
    try:
        value = call.world.state.add_to_counter(
            _holder(call), action.key, amount, action.reset_after, call.now, call.event.id, call.rule.id
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
        "target": _target(call),
    }


def _set_attribute(call: Call) -> Result:
    assert call.action.key is not None
    _require_room(call, "attribute", _holder(call).attributes)
    value = results.attribute(call.action, call.activation)
    call.world.state.set_attribute(_holder(call), call.action.key, value, call.event.id, call.rule.id)
    return {"type": call.action.type, "key": call.action.key, "value": value, "target": _target(call)}


def _require_room(call: Call, kind: Literal["counter", "attribute"], values: Mapping[str, Any]) -> None:
    """Whether the holder may get a further counter or attribute. Contract: holders.md 5."""
    holder = _holder(call)
    room = call.world.crowded.get((holder.id, kind))
    if room is None or call.action.key in values:
        return
    changes = call.world.state.changes
    added = sum(change.holder is holder and change.state_type == kind and change.old is None for change in changes)
    if added >= room:
        raise ActionFailed(f"more than {limits.STATE_KEYS} {kind}s")


# --- further events --------------------------------------------------------------------------------------------------


def _schedule_event(call: Call) -> Result:
    """A follow-up event, due at the event's own time plus the delay. Contract: rules-and-events.md 5.14."""
    assert call.action.delay is not None
    try:
        trigger_at = call.event.timestamp + call.action.delay
    except OverflowError:
        raise ActionFailed("the event would fall due after the year 9999") from None
    automation = _automate(call, "SCHEDULE_EVENT", trigger_at, limits.SCHEDULE_DEPTH)
    result: Result = {
        "type": call.action.type,
        "automation_id": automation.id,
        "event_name": automation.event_name,
        "trigger_at": format_timestamp(trigger_at),
    }
    return result if call.holder is None else result | {"target": _target(call)}


def _broadcast(call: Call) -> Result:
    """One event for every participant of the program. Contract: rules-and-events.md 5.15."""
    automation = _automate(call, "BROADCAST", call.now, limits.BROADCAST_DEPTH)
    return {"type": call.action.type, "automation_id": automation.id, "event_name": automation.event_name}


def _automate(
    call: Call, kind: Literal["SCHEDULE_EVENT", "BROADCAST"], trigger_at: datetime, deepest: int
) -> NewAutomation:
    """Note what is to make further events. Contract: rules-and-events.md 5.16."""
    depth = call.event.depth + 1
    if depth > deepest:
        raise ActionFailed(f"automation_depth_exceeded: {kind} chains end at depth {deepest}")
    assert call.action.event_name is not None
    automation = NewAutomation(
        id=new_id(),
        kind=kind,
        event_id=call.event.id,
        rule_id=call.rule.id,
        action_index=call.action.index,
        event_name=call.action.event_name,
        payload=call.action.payload,
        trigger_at=trigger_at,
        participant_id=call.holder.id if call.holder is not None and kind == "SCHEDULE_EVENT" else None,
        depth=depth,
        request_id=call.event.request_id,
    )
    call.world.automations.append(automation)
    return automation


def _holder(call: Call) -> Holder:
    assert call.holder is not None, "only actions that need nobody are run without a holder"
    return call.holder


def _target(call: Call) -> Result:
    holder = _holder(call)
    return {"type": holder.entity_type, "id": holder.id}


_EFFECTS: dict[str, Callable[[Call], Result | None]] = {
    "CREDIT": _credit,
    "DEBIT": _debit,
    "HOLD": _hold,
    "RELEASE": _release,
    "FORFEIT": _forfeit,
    "VOID_HOLD": _void_hold,
    "TAG": _tag,
    "UNTAG": _untag,
    "COUNTER": _counter,
    "SET_ATTRIBUTE": _set_attribute,
    "SCHEDULE_EVENT": _schedule_event,
    "BROADCAST": _broadcast,
}
