"""What operators read beside a workflow or an activity, within what Temporal takes."""

# Temporal refuses a summary of more than 400 bytes, and with it the start of the workflow. Half of that is what is left
# when every character has to be escaped in JSON, with room for the payload's own metadata.
SUMMARY_BYTES = 180

# JSON writes each of these as six bytes, and none of them can be read.
_CONTROL = dict.fromkeys(range(0x20), " ")


def summary(text: str) -> str:
    """`text` as a summary: one line, cut to `SUMMARY_BYTES` of UTF-8 between two characters.

    For whatever contains a name that a user chose. Deterministic, so workflows may call it.
    """
    return text.translate(_CONTROL).encode()[:SUMMARY_BYTES].decode(errors="ignore")
