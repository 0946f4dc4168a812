"""The double-entry ledger: accounts, entries, postings, balances, the hash chain and its verification."""
