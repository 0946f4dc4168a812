"""Task queues: money, timers and the outside world are kept apart, so that a slow one can't starve another."""

LEDGER = "ledger"
LIFECYCLE = "lifecycle"
WEBHOOKS = "webhooks"
