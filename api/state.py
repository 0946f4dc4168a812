"""Tags, attributes and counters of holders and programs, over HTTP. Contract: holders.md 5, basics.md 5.8."""

from dataclasses import replace
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query
from pydantic import Field
from starlette.responses import Response

from api.models import ListOf, RequestModel, ResponseModel, Timestamp, omittable, whole_list
from api.queries import EventFrom, EventTo, From, PageOf50Max100, To, listed
from api.responses import JsonResponse, no_content, respond
from api.route import Tx, make_router
from db.tables import StateHistory
from domain import limits, state
from domain.state import CounterView, EntityKind, HistoryFilter

Key = Annotated[str, Path(min_length=1, max_length=limits.STATE_KEY_CHARS, description="The key.")]
TagPath = Annotated[str, Path(min_length=1, max_length=limits.STATE_KEY_CHARS, description="The tag, in any case.")]
AttributeValue = Annotated[str, Field(min_length=1, max_length=limits.ATTRIBUTE_CHARS)]


class TagsReplace(RequestModel):
    """All tags that the entity shall have."""

    tags: list[str] = Field(description="At most 1000; stored in lower case, duplicates collapse.")


class TagOut(ResponseModel):
    """One tag."""

    tag: str = Field(description="In lower case.")


class TagsOut(ResponseModel):
    """All tags."""

    tags: list[str] = Field(description="In alphabetical order.")


class AttributesMerge(RequestModel):
    """Attributes to set; the others stay."""

    attributes: dict[str, str] = Field(description="Keys of 1 to 255 characters, values of 1 to 4096.")


class AttributesOut(ResponseModel):
    """All attributes."""

    attributes: dict[str, str] = Field(description="The whole map.")


class AttributeSet(RequestModel):
    """The new value of one attribute."""

    value: AttributeValue = Field(description="Always a string.")


class AttributeOut(ResponseModel):
    """One attribute."""

    key: str = Field(description="The key.")
    value: str = Field(description="The value.")


class CounterSet(RequestModel):
    """The new value of one counter."""

    value: str = Field(min_length=1, max_length=100, description="Decimal string; replaces the value.", examples=["42"])
    reset_after: str | None = Field(
        default=None,
        max_length=64,
        description='Go-style duration of the auto-reset window; "" removes it, leaving it out keeps it.',
        examples=["720h"],
    )


class CounterOut(ResponseModel):
    """One counter."""

    key: str = Field(description="The key.")
    value: str = Field(description="Decimal string; 0 once the auto-reset window has elapsed.")
    reset_after: str | None = omittable("The auto-reset window; absent without one.")
    last_reset_at: Timestamp | None = omittable("When the window began; absent without one.")


class StateChangeOut(ResponseModel):
    """One change of a tag, counter, attribute or tier."""

    id: UUID = Field(description="The row's id.")
    state_type: state.StateType = Field(description="What changed.")
    key: str = Field(description="Its key; for a tag, the tag.")
    operation: state.Operation = Field(description="How it changed.")
    old_value: str | None = Field(description="Before, or null.")
    new_value: str | None = Field(description="After, or null.")
    event_id: UUID | None = Field(description="The event whose rule caused it, or null.")
    rule_id: UUID | None = Field(description="The rule that caused it, or null.")
    changed_by_api_key_id: UUID | None = Field(description="The API key that caused it, or null.")
    program_id: UUID | None = Field(description="The tier's program, else null.")
    changed_at: Timestamp = Field(description="When it changed.")


def state_router(tag: str, kind: EntityKind) -> APIRouter:
    """The state endpoints below `/{kind}s/{id}/state`."""
    router = make_router(tag)
    base = f"/{kind}s/{{id}}/state"

    @router.get(f"{base}/tags", response_model=ListOf[TagOut])
    async def list_tags(tx: Tx, id: UUID) -> ListOf[TagOut]:
        """List all tags."""
        await state.require(tx, kind, id)
        return ListOf[TagOut](**whole_list([TagOut(tag=tag) for tag in await state.tags(tx, id)]))

    @router.put(f"{base}/tags", response_model=TagsOut)
    async def replace_tags(tx: Tx, id: UUID, body: TagsReplace) -> TagsOut:
        """Replace all tags."""
        return TagsOut(tags=await state.replace_tags(tx, await state.lock(tx, kind, id), body.tags))

    @router.put(f"{base}/tags/{{tag:path}}", status_code=201, response_model=TagOut)
    async def add_tag(tx: Tx, id: UUID, tag: TagPath) -> JsonResponse:
        """Add one tag: 201 when it is new, 200 when it was there."""
        stored, added = await state.add_tag(tx, await state.lock(tx, kind, id), tag)
        return respond(TagOut(tag=stored), 201 if added else 200)

    @router.delete(f"{base}/tags/{{tag:path}}", status_code=204)
    async def remove_tag(tx: Tx, id: UUID, tag: TagPath) -> Response:
        """Remove one tag, if it is there."""
        await state.remove_tag(tx, await state.lock(tx, kind, id), tag)
        return no_content()

    @router.get(f"{base}/attributes", response_model=ListOf[AttributeOut])
    async def list_attributes(tx: Tx, id: UUID) -> ListOf[AttributeOut]:
        """List all attributes."""
        await state.require(tx, kind, id)
        found = await state.attributes(tx, id)
        return ListOf[AttributeOut](**whole_list([AttributeOut(key=key, value=found[key]) for key in found]))

    @router.patch(f"{base}/attributes", response_model=AttributesOut)
    async def merge_attributes(tx: Tx, id: UUID, body: AttributesMerge) -> AttributesOut:
        """Set some attributes and keep the others."""
        entity = await state.lock(tx, kind, id)
        return AttributesOut(attributes=await state.merge_attributes(tx, entity, body.attributes))

    @router.put(f"{base}/attributes/{{key:path}}", response_model=AttributeOut)
    async def set_attribute(tx: Tx, id: UUID, key: Key, body: AttributeSet) -> AttributeOut:
        """Set one attribute."""
        await state.merge_attributes(tx, await state.lock(tx, kind, id), {key: body.value})
        return AttributeOut(key=key, value=body.value)

    @router.delete(f"{base}/attributes/{{key:path}}", status_code=204)
    async def delete_attribute(tx: Tx, id: UUID, key: Key) -> Response:
        """Delete one attribute, if it is there."""
        await state.delete_attribute(tx, await state.lock(tx, kind, id), key)
        return no_content()

    @router.get(f"{base}/counters", response_model=ListOf[CounterOut])
    async def list_counters(tx: Tx, id: UUID) -> ListOf[CounterOut]:
        """List all counters as they read now."""
        await state.require(tx, kind, id)
        return ListOf[CounterOut](**whole_list([_present(counter) for counter in await state.counters(tx, id)]))

    @router.get(f"{base}/counters/{{key:path}}", response_model=CounterOut)
    async def get_counter(tx: Tx, id: UUID, key: Key) -> CounterOut:
        """Get one counter as it reads now."""
        await state.require(tx, kind, id)
        return _present(await state.counter(tx, id, key))

    @router.put(f"{base}/counters/{{key:path}}", response_model=CounterOut)
    async def set_counter(tx: Tx, id: UUID, key: Key, body: CounterSet) -> CounterOut:
        """Set one counter absolutely, and begin its window now."""
        entity = await state.lock(tx, kind, id)
        return _present(await state.set_counter(tx, entity, key, body.value, body.reset_after))

    @router.delete(f"{base}/counters/{{key:path}}", status_code=204)
    async def delete_counter(tx: Tx, id: UUID, key: Key) -> Response:
        """Delete one counter, if it is there."""
        await state.delete_counter(tx, await state.lock(tx, kind, id), key)
        return no_content()

    return router


async def _read_history_filter(
    state_type: Annotated[state.StateType | None, Query(description="Only changes of this kind of state.")] = None,
    key: Annotated[str | None, Query(max_length=255, description="Only this key or tag.")] = None,
    program_id: Annotated[UUID | None, Query(description="Only tiers of this program.")] = None,
    operation: Annotated[state.Operation | None, Query(description="Only this operation.")] = None,
    changed_from: From = None,
    to: To = None,
) -> HistoryFilter:
    return HistoryFilter(
        state_type=state_type,
        key=key,
        program_id=program_id,
        operation=operation,
        changed_from=changed_from,
        changed_to=to,
    )


HistoryQuery = Annotated[HistoryFilter, Depends(_read_history_filter)]
"""The filters that every state history has."""

history_router = make_router("Participants")


@history_router.get("/participants/{id}/activity/state-history", response_model=ListOf[StateChangeOut])
async def list_state_history(
    tx: Tx,
    id: UUID,
    page: PageOf50Max100,
    wanted: HistoryQuery,
    event_from: EventFrom = None,
    event_to: EventTo = None,
) -> ListOf[StateChangeOut]:
    """List a participant's state changes, newest first."""
    await state.require(tx, "participant", id)
    wanted = replace(wanted, event_from=event_from, event_to=event_to)
    return listed(await state.history(tx, id, wanted, page), present_change)


def present_change(change: StateHistory) -> StateChangeOut:
    """A row of the state history as the API shows it."""
    return StateChangeOut.of(change, changed_by_api_key_id=change.api_key_id)


def _present(counter: CounterView) -> CounterOut:
    return CounterOut.of(counter)
