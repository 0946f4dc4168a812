"""JSON without loss: numbers are Decimals in both directions. Contract: README.md "Money", "Bodies are parsed exactly".

Python's own parser makes floats and accepts NaN; jsonb refuses NUL characters and lone surrogates. Here such input
is refused with the path of the field, before anything else looks at it.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from domain import limits


class JsonError(ValueError):
    """A body that can't be taken. `field` is the dotted path of the offending member, or `body`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class _Flaw:
    """Stands in the parsed tree where something was wrong, until its path is known."""

    def __init__(self, message: str, key: str | None = None) -> None:
        self.message = message
        self.key = key


class _Parser:
    """One parse: a decoder whose hooks leave a `_Flaw` where they refuse something."""

    def __init__(self) -> None:
        self.flawed = False
        self.decoder = json.JSONDecoder(
            parse_float=self._number,
            parse_int=self._number,
            parse_constant=self._constant,
            object_pairs_hook=self._object,
        )

    def _flaw(self, message: str, key: str | None = None) -> _Flaw:
        self.flawed = True
        return _Flaw(message, key)

    def _number(self, text: str) -> Decimal | _Flaw:
        mantissa, _, exponent = text.lower().partition("e")
        if len(mantissa) - mantissa.count(".") - mantissa.count("-") > limits.NUMBER_DIGITS:
            return self._flaw(f"a number has at most {limits.NUMBER_DIGITS} digits")
        if exponent and (len(exponent) > 4 or abs(int(exponent)) > limits.NUMBER_EXPONENT):
            return self._flaw(f"a number's exponent is at most {limits.NUMBER_EXPONENT}")
        return Decimal(text)

    def _constant(self, text: str) -> _Flaw:
        return self._flaw(f"{text} is not a JSON number")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Flaw:
        members = dict(pairs)
        if len(members) == len(pairs):
            return members
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return self._flaw("the key appears twice in one object", duplicate)


def loads(body: bytes | str) -> Any:
    """The value in `body`, its numbers as Decimals.

    Raises JsonError naming the field for malformed JSON, NaN and Infinity, duplicate keys, NUL characters, lone
    surrogates, numbers of more than 40 digits or with an exponent beyond 64, and nesting deeper than 64.
    """
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
    except UnicodeDecodeError:
        raise JsonError("body", "the body is not valid UTF-8") from None
    parser = _Parser()
    try:
        value = parser.decoder.decode(text)
    except json.JSONDecodeError as error:
        message = f"malformed JSON: {error.msg} at line {error.lineno} column {error.colno}"
        raise JsonError("body", message) from None
    except RecursionError:
        raise _too_deep() from None
    # Only so many brackets can nest too deep; a flat body is spared the look.
    if text.count("{") + text.count("[") > limits.BODY_DEPTH and depth(value) > limits.BODY_DEPTH:
        raise _too_deep()
    # Escapes are the only way for NUL characters and lone surrogates to get past the UTF-8 decoder.
    if parser.flawed or "\\u" in text:
        for path, problem in _flaws(value):
            raise JsonError(path, problem)
    return value


def depth(value: Any) -> int:
    """How deep containers nest in `value`: 0 for a scalar, 1 for a flat object. Iterative, so it can't overflow."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        current, level = stack.pop()
        children = current.values() if isinstance(current, dict) else current if isinstance(current, list) else None
        if children is not None:
            deepest = max(deepest, level)
            stack.extend((child, level + 1) for child in children)
    return deepest


def _too_deep() -> JsonError:
    return JsonError("body", f"nested deeper than {limits.BODY_DEPTH}")


def _flaws(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (path, message) of everything in a parsed tree that must be refused, in document order."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, current = stack.pop()
        if isinstance(current, _Flaw):
            yield _join(path, current.key) or "body", current.message
        elif isinstance(current, str):
            if problem := _text_problem(current):
                yield path or "body", problem
        elif isinstance(current, dict):
            for key in current:
                if problem := _text_problem(key):
                    yield path or "body", f"in a key: {problem}"
            stack.extend((_join(path, key), child) for key, child in reversed(current.items()))
        elif isinstance(current, list):
            stack.extend((f"{path}[{i}]", current[i]) for i in range(len(current) - 1, -1, -1))


def _join(path: str, key: str | None) -> str:
    if key is None:
        return path
    return f"{path}.{key}" if path else key


def _text_problem(text: str) -> str | None:
    if "\x00" in text:
        return "contains a NUL character"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "contains a lone surrogate"
    return None
