"""The journal and the proofs of its integrity over HTTP. Contract: holders.md 8, endpoints.md "integrity"."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from temporalio.service import RPCError

from api.afterwards import Afterwards
from api.models import ListOf, ResponseModel, Timestamp, omittable
from api.queries import From, PageOf50, To, listed
from api.responses import respond
from api.route import ApiServices, Tx, make_router
from db.tables import LedgerVerification
from domain import limits
from domain.errors import Problem, Refusal, bad_field
from domain.ids import new_id
from domain.ledger import moments, queries, verifications, verify
from domain.ledger.books import ActionType, Bucket, EntityType
from domain.ledger.queries import EntryFilter
from domain.ledger.verifications import Status as VerificationStatus
from domain.money import format_amount, parse_number
from domain.pagination import Page

router = make_router("Ledger")


class PostingOut(ResponseModel):
    """One signed line of an entry."""

    id: UUID
    entity_type: EntityType = Field(description="Whose account it is.")
    entity_id: UUID | None = Field(description="The participant, group or program; null for system accounts.")
    participant_id: UUID | None = omittable("Only on accounts of participants.")
    group_id: UUID | None = omittable("Only on accounts of groups.")
    program_id: UUID | None = omittable("Only on program wallets.")
    asset_id: UUID
    asset_symbol: str
    bucket: Bucket
    amount: str = Field(description="Signed: + is a credit of the account, - a debit.", examples=["-10.00"])
    created_at: Timestamp


class EntryOut(ResponseModel):
    """A journal entry, without its postings."""

    id: UUID
    organization_id: UUID
    sequence: int = Field(description="Its place in the organization's chain: from 1, without holes.")
    action_type: ActionType
    description: str | None
    program_id: UUID
    program_name: str
    event_id: UUID | None = Field(description="The event that caused it.")
    rule_id: UUID | None = Field(description="The rule that caused it.")
    reference_id: str | None
    created_by_api_key_id: UUID | None = Field(description="The key of the call that caused it.")
    request_id: str | None = Field(description="The request that caused it; not part of the hash.")
    prev_hash: str = Field(description="entry_hash of the entry before it; 64 zeros for the first.")
    entry_hash: str = Field(description="SHA-256 of the entry's canonical form, 64 hex digits.")
    hash_version: int = Field(description="Version of the canonical form.")
    created_at: Timestamp


class EntryDetailOut(EntryOut):
    """A journal entry with its postings: everything that its hash covers."""

    postings: list[PostingOut] = Field(description="In the order in which they were written and hashed.")


class VerificationOut(ResponseModel):
    """The outcome of a check of the whole chain."""

    valid: bool = Field(description="Everything checked holds: the chain, every running balance, lots and holds.")
    organization_id: UUID
    entries_checked: int
    first_invalid_entry_id: UUID | None = Field(
        description="The first entry that fails; null where it is something else."
    )
    problem: str | None = Field(description="What is wrong, for people; null when valid.")
    head_sequence: int = Field(description="Sequence of the newest entry; 0 on an empty ledger.")
    head_hash: str = Field(description="Its hash; 64 zeros on an empty ledger.")
    checked_at: Timestamp


class BackgroundVerificationOut(ResponseModel):
    """A check of the whole chain in the background."""

    verification_id: UUID = Field(description="For `GET /v1/ledger/verify/{id}`.")
    organization_id: UUID
    status: VerificationStatus = Field(
        description="VALID and INVALID are results; an ABANDONED one was cancelled or lost before it had one."
    )
    valid: bool | None = Field(description="Everything checked holds; null without a result.")
    entries_checked: int = Field(description="So far, of `head_sequence`.")
    head_sequence: int = Field(description="Sequence of the newest entry at the start: how far it goes.")
    first_invalid_entry_id: UUID | None = Field(
        description="The first entry that fails; null where it is something else."
    )
    problem: str | None = Field(description="What is wrong, for people.")
    started_at: Timestamp
    finished_at: Timestamp | None


class IntegrityOut(ResponseModel):
    """The attestation of the newest entries."""

    valid: bool = Field(description="Everything checked holds.")
    organization_id: UUID
    checked_from_sequence: int | None = Field(description="Null on an empty ledger.")
    checked_to_sequence: int | None = Field(description="Null on an empty ledger.")
    entries_checked: int = Field(description="At most `window`.")
    head_sequence: int = Field(description="Of the chain as it is now, also with `as_of`; 0 on an empty ledger.")
    head_hash: str = Field(description="Its hash; 64 zeros on an empty ledger.")
    first_invalid_entry_id: UUID | None = Field(description="The lowest sequence that fails; null when valid.")
    checked_at: Timestamp


@router.get("/journal-entries", response_model=ListOf[EntryOut])
async def list_journal_entries(
    tx: Tx,
    page: PageOf50,
    program_id: Annotated[UUID | None, Query(description="Only entries of this program.")] = None,
    event_id: Annotated[UUID | None, Query(description="Only entries of this event.")] = None,
    rule_id: Annotated[UUID | None, Query(description="Only entries of this rule.")] = None,
    participant_id: Annotated[UUID | None, Query(description="With a posting of this participant.")] = None,
    external_id: Annotated[str | None, Query(description="The same, by the participant's external id.")] = None,
    group_id: Annotated[UUID | None, Query(description="With a posting of this group.")] = None,
    asset_id: Annotated[UUID | None, Query(description="With a posting in this asset.")] = None,
    bucket: Annotated[Bucket | None, Query(description="With a posting in this bucket.")] = None,
    action_type: Annotated[ActionType | None, Query(description="Only this action type.")] = None,
    reference_id: Annotated[str | None, Query(description="Only this reference.")] = None,
    created_from: From = None,
    to: To = None,
    min_amount: Annotated[str | None, Query(description="With a posting of at least this signed amount.")] = None,
    max_amount: Annotated[str | None, Query(description="With a posting of at most this signed amount.")] = None,
) -> ListOf[EntryOut]:
    """List journal entries, newest first. Filters on postings must hold on one and the same posting."""
    _require_at_most_one(participant_id=participant_id, external_id=external_id, group_id=group_id)
    low, high = _signed("min_amount", min_amount), _signed("max_amount", max_amount)
    if external_id is not None:
        participant_id = await queries.find_participant(tx, external_id)
        if participant_id is None:
            return listed(Page([], None), _present_entry)
    wanted = EntryFilter(
        program_id=program_id,
        event_id=event_id,
        rule_id=rule_id,
        participant_id=participant_id,
        group_id=group_id,
        asset_id=asset_id,
        bucket=bucket,
        action_type=action_type,
        reference_id=reference_id,
        created_from=created_from,
        created_to=to,
        min_amount=low,
        max_amount=high,
    )
    return listed(await queries.list_entries(tx, wanted, page), _present_entry)


@router.get("/journal-entries/{id}", response_model=EntryDetailOut)
async def get_journal_entry(tx: Tx, id: UUID) -> EntryDetailOut:
    """Get one journal entry with its postings."""
    entry, postings = await queries.get_entry(tx, id)
    return EntryDetailOut.model_construct(
        **_shown(entry), postings=[_present_posting(posting, entry) for posting in postings]
    )


@router.get(
    "/ledger/verify",
    response_model=VerificationOut,
    responses={202: {"model": BackgroundVerificationOut, "description": "The chain is long: it is being checked."}},
)
async def verify_ledger(tx: Tx, request: Request) -> Response:
    """Check the whole hash chain from genesis, every running balance, and that lots and holds make the balances.

    Above 100,000 entries it is checked in the background: 202 with a `verification_id`. One runs at a time, so a second
    request answers with the one that runs.
    """
    walk = await verify.verify_chain(tx)
    if walk is None:
        return _verify_in_background(tx.organization_id, request.app.state.services)
    return respond(
        VerificationOut(
            valid=walk.valid,
            organization_id=walk.organization_id,
            entries_checked=walk.entries_checked,
            first_invalid_entry_id=walk.first_invalid_entry_id,
            problem=walk.problem,
            head_sequence=walk.head_sequence,
            head_hash=walk.head_hash.hex(),
            checked_at=tx.now,
        )
    )


@router.get("/ledger/verify/{id}", response_model=BackgroundVerificationOut)
async def get_verification(tx: Tx, id: UUID) -> BackgroundVerificationOut:
    """Get a check of the whole chain that runs, or ran, in the background."""
    return _present_record(await verifications.get(tx, id))


@router.get("/reports/integrity", response_model=IntegrityOut)
async def report_integrity(
    tx: Tx,
    window: Annotated[
        int, Query(ge=1, le=limits.INTEGRITY_WINDOW_MAX, description="How many of the newest entries to check.")
    ] = limits.INTEGRITY_WINDOW_DEFAULT,
    as_of: Annotated[
        Timestamp | None, Query(description="The newest entries at this instant; one in the future means now.")
    ] = None,
) -> IntegrityOut:
    """Check the newest journal entries, now or at an instant, against their hashes, in one snapshot."""
    moment = None if as_of is None else await moments.at(tx, as_of)
    found = await verify.check_window(tx, window, moment)
    return IntegrityOut(
        valid=found.valid,
        organization_id=found.organization_id,
        checked_from_sequence=found.checked_from_sequence,
        checked_to_sequence=found.checked_to_sequence,
        entries_checked=found.entries_checked,
        head_sequence=found.head_sequence,
        head_hash=found.head_hash.hex(),
        first_invalid_entry_id=found.first_invalid_entry_id,
        checked_at=found.checked_at,
    )


def _verify_in_background(organization_id: UUID, services: ApiServices) -> Response:
    async def work() -> Response:
        # The record comes after the start, so that a start that fails leaves none. A start whose answer was lost runs
        # all the same, and writes its record by itself.
        try:
            verification_id = await services.gateway.start_verification(organization_id, new_id())
        except (RPCError, RuntimeError) as error:
            message = "Temporal is out of reach; no verification was started"
            raise Refusal("service_unavailable", message) from error
        async with services.database.transaction(organization_id) as tx:
            return respond(_present_record(await verifications.announce(tx, verification_id)), 202)

    return Afterwards(work)


def _present_record(record: LedgerVerification) -> BackgroundVerificationOut:
    valid = {"VALID": True, "INVALID": False}.get(record.status)
    return BackgroundVerificationOut.of(record, verification_id=record.id, valid=valid)


def _require_at_most_one(**holders: UUID | str | None) -> None:
    given = [name for name, value in holders.items() if value is not None]
    if len(given) > 1:
        message = f"only one of {', '.join(holders)} may be given"
        problems = [Problem(name, message, expected="absent", received=str(holders[name])) for name in given[1:]]
        raise Refusal("bad_request", message, problems)


def _signed(name: str, text: str | None) -> Decimal | None:
    if text is None:
        return None
    number = parse_number(text)
    if number is None:
        raise bad_field(name, "must be a plain decimal, signed or not", expected="decimal string", received=text)
    return number


def _present_entry(entry: Mapping[str, Any]) -> EntryOut:
    return EntryOut.model_construct(**_shown(entry))


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "prev_hash": entry["prev_hash"].hex(), "entry_hash": entry["entry_hash"].hex()}


def _present_posting(posting: Mapping[str, Any], entry: Mapping[str, Any]) -> PostingOut:
    entity_type, entity_id = posting["entity_type"], posting["entity_id"]
    return PostingOut.model_construct(
        id=posting["id"],
        entity_type=entity_type,
        entity_id=entity_id,
        participant_id=entity_id if entity_type == "PARTICIPANT" else None,
        group_id=entity_id if entity_type == "GROUP" else None,
        program_id=entity_id if entity_type == "PROGRAM" else None,
        asset_id=posting["asset_id"],
        asset_symbol=posting["asset_symbol"],
        bucket=posting["bucket"],
        amount=format_amount(posting["amount"], posting["scale"]),
        created_at=entry["created_at"],
    )
