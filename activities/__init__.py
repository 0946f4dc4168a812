"""The steps that workflows call: thin, idempotent, each its own transaction or several."""
