"""Who may have a reward: a CEL expression over the participant. Contract: redemptions.md 4.4."""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, LiteralString

from db.session import Transaction
from domain.errors import Refusal, bad_field
from domain.events.state import CounterState, Holder
from domain.rules.cel import (
    Activation,
    EvaluationError,
    Expression,
    ExpressionError,
    compile_expression,
    evaluate_condition,
)
from domain.rules.cel.syntax import Name, Node, Source, parse

logger = logging.getLogger("scrip.rewards")


async def check(source: str, field: str = "eligibility") -> None:
    """Raise Refusal `bad_request` naming `field` unless `source` compiles and reads nothing but the participant and the
    time."""
    # In a thread: a long expression takes tens of milliseconds, and other requests must not wait for it.
    await asyncio.to_thread(_check, source, field)


async def admits(tx: Transaction, source: str, participant: Mapping[str, Any]) -> bool:
    """Whether the expression is true for the participant, a row with id, external_id and status, at the present state.

    Only the state that the expression can read is loaded, in one query. An evaluation that fails admits nobody.
    """
    try:
        expression = await asyncio.to_thread(compile_expression, source)
    except ExpressionError as error:
        # It compiled when it was saved, so the limits were wider then.
        logger.error("an eligibility doesn't compile any more: %s", error)
        return False
    holder = Holder("PARTICIPANT", participant["id"], participant["external_id"], participant["status"])
    await _load(tx, holder, expression.references)
    holder.open_view(tx.now)
    return await asyncio.to_thread(_is_true, expression, holder.view, tx)


def _check(source: str, field: str) -> None:
    try:
        expression = compile_expression(source)
    except ExpressionError as error:
        raise _bad_expression(field, source, f"invalid CEL: {error}") from None
    variables = {path[0] for path in expression.references}
    # References are about state alone, which the payload of an event is not.
    if "event" in _names(parse(Source(source))):
        variables.add("event")
    if others := sorted(variables - {"participant"}):
        raise _bad_expression(field, source, f"may read only participant and now(), not {', '.join(others)}")


def _bad_expression(field: str, source: str, message: str) -> Refusal:
    return bad_field(field, message, expected="CEL expression over participant and now()", received=source)


def _names(part: object) -> Iterator[str]:
    """Every name in a tree, of variables, types and macro variables."""
    if isinstance(part, tuple):
        for item in part:
            yield from _names(item)
    elif isinstance(part, Name):
        yield part.name
    elif isinstance(part, Node):
        for field in fields(part):
            yield from _names(getattr(part, field.name))


def _is_true(expression: Expression, participant: dict[str, Any], tx: Transaction) -> bool:
    activation = Activation(event={}, participant=participant, program={}, groups=[], group=None, now=tx.now)
    try:
        return evaluate_condition(expression, activation)
    except EvaluationError:
        return False


# --- the state that an expression reads ------------------------------------------------------------------------------

_TAGS: LiteralString = """
select 'tag' as kind, tag as key, null::text as text, null::numeric as number, null::text as reset_after,
       null::timestamptz as last_reset_at
from tag where organization_id = %(organization_id)s and entity_id = %(id)s
"""
_COUNTERS: LiteralString = """
select 'counter' as kind, key, null::text as text, value as number, reset_after, last_reset_at
from counter where organization_id = %(organization_id)s and entity_id = %(id)s
"""
_ATTRIBUTES: LiteralString = """
select 'attribute' as kind, key, value as text, null::numeric as number, null::text as reset_after,
       null::timestamptz as last_reset_at
from attribute where organization_id = %(organization_id)s and entity_id = %(id)s
"""


async def _load(tx: Transaction, holder: Holder, paths: Iterable[tuple[str, ...]]) -> None:
    """Read the tags, counters and attributes at these paths into `holder`."""
    paths = frozenset(paths)
    params: dict[str, Any] = {"organization_id": tx.organization_id, "id": holder.id}
    selects: list[LiteralString] = []
    if _keys(paths, "tags") != frozenset():
        selects.append(_TAGS)
    if (counter_keys := _keys(paths, "counters")) != frozenset():
        selects.append(_COUNTERS if counter_keys is None else _COUNTERS + " and key = any(%(counter_keys)s)")
        params["counter_keys"] = list(counter_keys or ())
    if (attribute_keys := _keys(paths, "attributes")) != frozenset():
        selects.append(_ATTRIBUTES if attribute_keys is None else _ATTRIBUTES + " and key = any(%(attribute_keys)s)")
        params["attribute_keys"] = list(attribute_keys or ())
    if not selects:
        return
    cursor = await tx.execute(" union all ".join(selects), params)
    for kind, key, text, *counter in await cursor.fetchall():
        if kind == "tag":
            holder.tags.add(key)
        elif kind == "attribute":
            holder.attributes[key] = text
        else:
            holder.counters[key] = CounterState(*counter)


def _keys(paths: Iterable[tuple[str, ...]], member: str) -> frozenset[str] | None:
    """The keys of `participant.member` that are read at `paths`; None for all of them."""
    read: set[str] = set()
    for path in paths:
        if path[:2] in (("participant",), ("participant", member)):
            if len(path) < 3:
                return None
            read.add(path[2])
    return frozenset(read)
