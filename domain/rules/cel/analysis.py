"""What can be known of an expression without running it: its event types, and the state it may read."""

from collections.abc import Iterator

from domain.rules.cel.syntax import (
    Arithmetic,
    Call,
    Conditional,
    Index,
    ListNode,
    Literal,
    Logic,
    MapNode,
    Name,
    Node,
    Relation,
    Select,
    Unary,
)

Path = tuple[str, ...]

_STATE_VARIABLES = frozenset({"participant", "program", "groups", "group"})
_MACROS = frozenset({"all", "exists", "exists_one", "map", "filter"})

# (variable, member, key): below the key of a counter, an attribute or a tier nothing is read separately.
_PATH_LENGTH = 3
_LIST_MEMBERS = frozenset({"tags"})


def event_types(root: Node) -> frozenset[str] | None:
    """The types that an event must have for the condition to be true; None when any will do.

    Found in the conjuncts `event.type == "x"` and `event.type in ["x", "y"]` of the top level. For every other type the
    condition is false, whatever else it says, so an index over the types can leave the rule out.
    """
    conjuncts = root.terms if isinstance(root, Logic) and root.operator == "&&" else (root,)
    allowed: frozenset[str] | None = None
    for conjunct in conjuncts:
        types = _types_of(conjunct)
        if types is not None:
            allowed = types if allowed is None else allowed & types
    return allowed


def _types_of(conjunct: Node) -> frozenset[str] | None:
    match conjunct:
        case Relation(operator="==", left=left, right=Literal(value=str() as value)) if _is_event_type(left):
            return frozenset({value})
        case Relation(operator="==", left=Literal(value=str() as value), right=right) if _is_event_type(right):
            return frozenset({value})
        case Relation(operator="in", left=left, right=ListNode(items=items)) if _is_event_type(left):
            # An element that is no constant string could be anything; one that is no string is no type.
            if all(isinstance(item, Literal) for item in items):
                return frozenset(i.value for i in items if isinstance(i, Literal) and isinstance(i.value, str))
    return None


def _is_event_type(node: Node) -> bool:
    match node:
        case Select(operand=Name(name="event"), field="type"):
            return True
        case Index(operand=Name(name="event"), key=Literal(value="type")):
            return True
    return False


def references(root: Node) -> frozenset[Path]:
    """The state that the expression may read, as paths such as ("participant", "counters", "monthly_spend").

    A path ends where the key is not known before the run: ("participant", "counters") is all counters, ("participant",)
    everything of the participant. `groups` is always whole. The payload (`event`) and `now` are not state.
    """
    return frozenset(_references(root, frozenset()))


def _references(node: Node, shadowed: frozenset[str]) -> Iterator[Path]:
    path = _path(node, shadowed)
    if path is not None:
        yield _cut(path)
        yield from _dynamic_keys(node, shadowed)
        return
    match node:
        case Call(target=None, name="get", arguments=(mapping, Literal(value=str() as key), default)):
            yield from _with_key(mapping, key, shadowed)
            yield from _references(default, shadowed)
        case Relation(operator="in", left=Literal(value=str() as key), right=mapping):
            yield from _with_key(mapping, key, shadowed)
        case Call(name=name, target=Node() as target, arguments=(Name(name=variable), *bodies)) if name in _MACROS:
            yield from _references(target, shadowed)
            for body in bodies:
                yield from _references(body, shadowed | {variable})
        case _:
            for child in _children(node):
                yield from _references(child, shadowed)


def _with_key(mapping: Node, key: str, shadowed: frozenset[str]) -> Iterator[Path]:
    """The reading of one known key of `mapping`."""
    path = _path(mapping, shadowed)
    if path is None:
        yield from _references(mapping, shadowed)
        return
    yield _cut((*path, key))
    yield from _dynamic_keys(mapping, shadowed)


def _path(node: Node, shadowed: frozenset[str]) -> Path | None:
    """The path of `participant.counters.x`, as far as it is known; None if it is not the path of a state variable."""
    match node:
        case Name(name=name):
            return (name,) if name in _STATE_VARIABLES and name not in shadowed else None
        case Select(operand=operand, field=key) | Index(operand=operand, key=Literal(value=str() as key)):
            path = _path(operand, shadowed)
            # Behind an unknown key nothing further is known, and the shorter path covers all of it.
            return path if path is None or _has_dynamic_key(operand) else (*path, key)
        case Index(operand=operand):
            return _path(operand, shadowed)
    return None


def _has_dynamic_key(node: Node) -> bool:
    while isinstance(node, Select | Index):
        if isinstance(node, Index) and not (isinstance(node.key, Literal) and isinstance(node.key.value, str)):
            return True
        node = node.operand
    return False


def _dynamic_keys(node: Node, shadowed: frozenset[str]) -> Iterator[Path]:
    """What the keys of `participant.counters[key]` read themselves."""
    while isinstance(node, Select | Index):
        if isinstance(node, Index):
            yield from _references(node.key, shadowed)
        node = node.operand


def _cut(path: Path) -> Path:
    if path[0] == "groups":
        return ("groups",)
    if len(path) > 1 and path[1] in _LIST_MEMBERS:
        return path[:2]
    return path[:_PATH_LENGTH]


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case ListNode(items=items):
            return items
        case MapNode(entries=entries):
            return tuple(part for entry in entries for part in entry)
        case Select(operand=operand) | Unary(operand=operand):
            return (operand,)
        case Index(operand=operand, key=key):
            return (operand, key)
        case Call(target=target, arguments=arguments):
            return arguments if target is None else (target, *arguments)
        case Relation(left=left, right=right):
            return (left, right)
        case Arithmetic(first=first, rest=rest):
            return (first, *(operand for _, operand in rest))
        case Logic(terms=terms):
            return terms
        case Conditional(branches=branches, otherwise=otherwise):
            return (*(part for branch in branches for part in branch), otherwise)
    return ()
