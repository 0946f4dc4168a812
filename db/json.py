"""JSON as the database keeps it: numbers are Decimals in both directions, printed digit by digit as they came."""

import json
from decimal import Decimal
from typing import Any, NoReturn

import orjson
from psycopg.types.json import set_json_dumps, set_json_loads


def dumps(value: Any) -> bytes:
    """`value` as JSON; Decimals print their digits as they are, datetimes and UUIDs as strings."""
    return orjson.dumps(value, default=_default)


def parameter(value: Any) -> str:
    """`value` as JSON for a parameter that the statement casts to `json`."""
    return dumps(value).decode()


def loads(text: bytes | str) -> Any:
    """The value in JSON text that came out of the database: numbers as Decimals, nothing checked again."""
    return _DECODER.decode(text if isinstance(text, str) else text.decode())


def _default(value: Any) -> Any:
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value).encode())
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def _never(text: str) -> NoReturn:
    raise ValueError(text)


_DECODER = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal, parse_constant=_never)

set_json_dumps(dumps)
set_json_loads(loads)
