"""The database: tables, connections and transactions, migrations; nothing else."""
