"""What callers keep with a redemption or a transfer: an object that nobody here reads. Contract: redemptions.md 1.1."""

from collections.abc import Mapping
from typing import Any

from db import json
from domain import limits
from domain.errors import bad_field


def require_small(metadata: Mapping[str, Any] | None) -> None:
    """Refuse metadata of more than 16 KiB as compact UTF-8 JSON. Raises Refusal `bad_request` naming `metadata`."""
    if metadata is None:
        return
    size = len(json.dumps(metadata))
    if size > limits.METADATA_BYTES:
        message = f"must be at most {limits.METADATA_BYTES} bytes of JSON"
        raise bad_field("metadata", message, expected="a smaller object", received=f"{size} bytes")
