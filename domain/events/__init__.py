"""Events: ingestion, the queue, and their application to state and ledger in batches."""
