"""How arguments and results travel through Temporal: as pydantic writes and reads them.

The payloads are those of temporalio.contrib.pydantic. Its converter keeps a validator for each type, but is made anew
for every run of a workflow, and making the validators takes longer than all that a short run does with them.
"""

import functools
from typing import Any

from pydantic import TypeAdapter
from temporalio.api.common.v1 import Payload
from temporalio.contrib.pydantic import PydanticJSONPlainPayloadConverter
from temporalio.converter import (
    CompositePayloadConverter,
    DataConverter,
    DefaultPayloadConverter,
    JSONPlainPayloadConverter,
)

_TYPES = 1_024


@functools.lru_cache(maxsize=_TYPES)
def _validator_of(type_hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_hint)


class _JsonConverter(PydanticJSONPlainPayloadConverter):
    """As pydantic's, with validators that are made once per process."""

    def from_payload(self, payload: Payload, type_hint: type | None = None) -> Any:
        """The value in a payload, of this type. Raises pydantic.ValidationError."""
        return _validator_of(Any if type_hint is None else type_hint).validate_json(payload.data)


class PayloadConverter(CompositePayloadConverter):
    """The SDK's converters, with pydantic for JSON."""

    def __init__(self) -> None:
        super().__init__(
            *(
                _JsonConverter() if isinstance(converter, JSONPlainPayloadConverter) else converter
                for converter in DefaultPayloadConverter.default_encoding_payload_converters
            )
        )


DATA_CONVERTER = DataConverter(payload_converter_class=PayloadConverter)
"""For every client and worker of ours."""
