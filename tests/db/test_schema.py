"""The schema keeps its own rules: it equals the tables in code, and every tenant table is fenced."""

import hashlib
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.config import Config

from tests.servers import Postgres

MIGRATIONS = Path(__file__).parents[2] / "db" / "migrations"

TENANT_TABLES = """
select c.oid, c.relname, c.relrowsecurity from pg_class c join pg_attribute a on a.attrelid = c.oid
where c.relkind = 'r' and c.relnamespace = 'public'::regnamespace and a.attname = 'organization_id'
"""


def test_the_migrations_make_exactly_the_tables_of_the_code(postgres: Postgres) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("sqlalchemy.url", postgres.owner_url.replace("postgresql://", "postgresql+psycopg://"))
    command.check(config)


def test_every_tenant_table_has_row_level_security(owner: psycopg.Connection[Any]) -> None:
    tables = owner.execute(TENANT_TABLES).fetchall()
    assert len(tables) >= 19
    assert [name for _, name, secured in tables if not secured] == []


def test_every_index_of_a_tenant_table_begins_with_the_organization(owner: psycopg.Connection[Any]) -> None:
    strangers = owner.execute(
        f"""
        select i.indexrelid::regclass::text from pg_index i
        join ({TENANT_TABLES}) t on t.oid = i.indrelid
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
        where a.attname <> 'organization_id'
        """
    ).fetchall()
    # The hash of a key is looked up before anybody knows whose it is, by the one function that may.
    assert strangers == [("api_key_key_hash_key",)]


def test_the_application_owns_nothing_and_cannot_rewrite_the_ledger(owner: psycopg.Connection[Any]) -> None:
    owned = owner.execute(
        "select count(*) from pg_class c join pg_roles r on r.oid = c.relowner where r.rolname = 'scrip_app'"
    ).fetchone()
    assert owned == (0,)
    forbidden = owner.execute(
        """
        select table_name, privilege_type from information_schema.role_table_grants
        where grantee = 'scrip_app' and table_name in ('journal_entry', 'posting')
          and privilege_type not in ('SELECT', 'INSERT')
        """
    ).fetchall()
    assert forbidden == []


def test_without_an_organization_the_application_sees_nothing(postgres: Postgres, organization: object) -> None:
    with psycopg.connect(postgres.app_url, autocommit=True) as connection:
        for table in ("organization", "api_key", "chain_head", "program", "journal_entry"):
            assert connection.execute(f"select count(*) from {table}").fetchone() == (0,)


def test_the_application_cannot_write_into_another_organization(
    postgres: Postgres, organization: Any, new_organization: Any
) -> None:
    other = new_organization()
    with psycopg.connect(postgres.app_url, autocommit=True) as connection:
        connection.execute("select set_config('app.org', %s, false)", (str(organization.id),))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(
                "insert into tag (organization_id, entity_id, tag, created_at) values (%s, %s, 'x', now())",
                (other.id, other.id),
            )


def test_a_key_names_its_own_organization_whatever_the_plan(
    postgres: Postgres, owner: psycopg.Connection[Any], new_organization: Any
) -> None:
    tenants = [new_organization() for _ in range(60)]
    owner.execute("analyze organization")
    owner.execute("analyze api_key")
    for setting in ("", "set enable_indexscan = off; set enable_bitmapscan = off"):
        with psycopg.connect(postgres.app_url, autocommit=True) as connection:
            if setting:
                connection.execute(setting)
            for tenant in tenants[::10]:
                with connection.transaction():
                    key_hash = hashlib.sha256(tenant.api_key.encode()).digest()
                    found = connection.execute("select organization_id from login(%s)", (key_hash,)).fetchone()
                    assert found == (tenant.id,)
                    assert connection.execute("select current_org()").fetchone() == (tenant.id,)
