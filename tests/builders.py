"""Programs, assets and participants for tests that are not about making them."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from db.session import Database, Transaction
from db.tables import Asset, Group, GroupMember, Lane, Participant, Program, ProgramAsset
from domain.ids import new_id
from domain.ledger.journal import open_system_accounts


async def make_program(tx: Transaction, **fields: Any) -> UUID:
    """An ACTIVE program; `fields` overrides columns."""
    program = {
        "organization_id": tx.organization_id,
        "id": new_id(),
        "name": "Loyalty",
        "status": "ACTIVE",
        "on_unknown_participant": "CREATE",
        "redemption_target_type": "SYSTEM_REDEMPTION",
        "rules_version": 0,
        "created_at": tx.now,
        "updated_at": tx.now,
        **fields,
    }
    await tx.insert(Program(**program))
    await tx.insert(Lane(organization_id=tx.organization_id, program_id=program["id"]))
    return program["id"]  # type: ignore[no-any-return]


async def make_asset(tx: Transaction, *program_ids: UUID, **fields: Any) -> UUID:
    """A SIMPLE, UNLIMITED asset of scale 2 linked to these programs; `fields` overrides columns."""
    asset_id = new_id()
    asset = {
        "organization_id": tx.organization_id,
        "id": asset_id,
        "name": "Points",
        "symbol": asset_id.hex[-12:],
        "inventory_mode": "SIMPLE",
        "issuance_policy": "UNLIMITED",
        "scale": 2,
        "status": "ACTIVE",
        "created_at": tx.now,
        "updated_at": tx.now,
        **fields,
    }
    await tx.insert(Asset(**asset))
    await open_system_accounts(tx, asset_id)
    for program_id in program_ids:
        link = ProgramAsset(
            organization_id=tx.organization_id, program_id=program_id, asset_id=asset_id, created_at=tx.now
        )
        await tx.insert(link)
    return asset_id


async def make_participant(tx: Transaction, **fields: Any) -> UUID:
    """An ACTIVE participant; `fields` overrides columns."""
    participant_id = new_id()
    participant = {
        "organization_id": tx.organization_id,
        "id": participant_id,
        "external_id": f"user-{participant_id.hex[-12:]}",
        "status": "ACTIVE",
        "created_at": tx.now,
        "updated_at": tx.now,
        **fields,
    }
    await tx.insert(Participant(**participant))
    return participant_id


async def make_group(tx: Transaction, *admins: UUID, **fields: Any) -> UUID:
    """An ACTIVE group of these ADMINs (none given: a new participant); `fields` overrides columns."""
    group_id = new_id()
    group = {
        "organization_id": tx.organization_id,
        "id": group_id,
        "name": "Family",
        "status": "ACTIVE",
        "created_at": tx.now,
        "updated_at": tx.now,
        **fields,
    }
    await tx.insert(Group(**group))
    for admin in admins or (await make_participant(tx),):
        member = GroupMember(
            organization_id=tx.organization_id,
            group_id=group_id,
            participant_id=admin,
            role="ADMIN",
            status="ACTIVE",
            joined_at=tx.now,
        )
        await tx.insert(member)
    return group_id


@dataclass(frozen=True)
class Shop:
    """A program with one asset, and a participant: alice."""

    program_id: UUID
    asset_id: UUID
    alice: UUID


async def open_shop(database: Database, organization_id: UUID, **asset_fields: Any) -> Shop:
    """A program with an asset (SIMPLE, UNLIMITED, scale 2 unless `asset_fields` say otherwise) and alice."""
    async with database.transaction(organization_id) as tx:
        program_id = await make_program(tx)
        asset_id = await make_asset(tx, program_id, **asset_fields)
        return Shop(program_id, asset_id, await make_participant(tx))


def d(text: str) -> Decimal:
    """A Decimal, briefly."""
    return Decimal(text)
