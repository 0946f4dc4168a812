"""Alembic's environment: migrations run as the owning role (docs/decisions/0003-database.md)."""

from alembic import context
from sqlalchemy import create_engine, pool
from sqlmodel import SQLModel

import db.tables  # noqa: F401  (registers the tables)


def run() -> None:
    """Run the migrations in one transaction, never waiting long for a lock that traffic holds."""
    url = context.config.get_main_option("sqlalchemy.url")
    if not url:
        raise SystemExit("no database: set SCRIP_OWNER_DATABASE_URL and run `scrip migrate`")
    engine = create_engine(url, poolclass=pool.NullPool, connect_args={"options": "-c lock_timeout=5000"})
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=SQLModel.metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()


run()
