"""Reads of redemptions. An overdue one is expired first: nobody meets it as PENDING. redemptions.md 2.3, 2.4, 3.5."""

from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from db.session import Transaction
from domain.errors import not_found
from domain.pagination import Page, PageRequest, cut, decode_cursor, sort_name
from domain.redemptions.pending import expire, expire_due
from domain.redemptions.records import SELECT, Redemption, RedemptionStatus

_SORT = sort_name(["created_at", "id"], descending=True)

# A condition that doesn't narrow is left out rather than written as `x is null or ...`, which no index can serve.
_NARROWING = {
    "reward_id": "and r.reward_id = %(reward_id)s",
    "program_id": "and r.program_id = %(program_id)s",
    "asset_id": "and r.asset_id = %(asset_id)s",
    "created_from": "and r.created_at >= %(created_from)s",
    "created_to": "and r.created_at <= %(created_to)s",
}

# Of many that are overdue a read expires some; it shows the others as what they are to everybody.
_OF_STATUS = {
    "PENDING": "and r.status = 'PENDING' and r.expires_at > %(now)s",
    "EXPIRED": "and (r.status = 'EXPIRED' or (r.status = 'PENDING' and r.expires_at <= %(now)s))",
}
_OF_OTHER_STATUS = "and r.status = %(status)s"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedemptionFilter:
    """Which redemptions of a participant to list; None means any, instants are inclusive. All combine with AND."""

    status: RedemptionStatus | None = None
    reward_id: UUID | None = None
    program_id: UUID | None = None
    asset_id: UUID | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None


async def get(tx: Transaction, redemption_id: UUID) -> Redemption:
    """One redemption as it is now. Raises Refusal `not_found`."""
    redemption = await expire(tx, redemption_id)
    if redemption is None:
        raise not_found("redemption")
    return redemption


async def find_page(
    tx: Transaction, participant_id: UUID, wanted: RedemptionFilter, page: PageRequest
) -> Page[Redemption]:
    """A page of a participant's redemptions, newest first. Raises Refusal: `not_found` for the participant,
    `bad_request` for the cursor."""
    known = await tx.row(
        "select id from participant where organization_id = %s and id = %s", (tx.organization_id, participant_id)
    )
    if known is None:
        raise not_found("participant")
    after = decode_cursor(page.cursor, _SORT, [datetime, UUID])
    after_at, after_id = after or (None, None)
    await expire_due(tx, participant_id)
    of_status = "" if wanted.status is None else _OF_STATUS.get(wanted.status, _OF_OTHER_STATUS)
    narrowing = {name: value for name in _NARROWING if (value := getattr(wanted, name)) is not None}
    query = f"""
        {SELECT} and r.participant_id = %(participant_id)s
        {of_status} {" ".join(_NARROWING[name] for name in narrowing)}
        {"and (r.created_at, r.id) < (%(after_at)s, %(after_id)s)" if after else ""}
        order by r.created_at desc, r.id desc limit %(rows)s
    """
    params = {
        "organization_id": tx.organization_id,
        "participant_id": participant_id,
        "after_at": after_at,
        "after_id": after_id,
        "rows": page.limit + 1,
        "now": tx.now,
        "status": wanted.status,
        **narrowing,
    }
    found = [_as_seen(Redemption(*row), tx.now) for row in await (await tx.execute(query, params)).fetchall()]
    return cut(found, page.limit, _SORT, lambda redemption: (redemption.created_at, redemption.id))


def _as_seen(redemption: Redemption, now: datetime) -> Redemption:
    """The redemption as everybody is to see it: an overdue one has expired, whoever comes to give its value back."""
    if redemption.expires_at is None or not redemption.is_overdue(now):
        return redemption
    return replace(redemption, status="EXPIRED", updated_at=redemption.expires_at)
