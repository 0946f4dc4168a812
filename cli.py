"""The `scrip` command: everything an operator does (docs/running.md)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar
from uuid import UUID

import psycopg
import typer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from domain import organizations
from domain.clock import format_timestamp, system_clock
from domain.errors import Refusal
from domain.organizations import NewKey
from settings import Settings, get_settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from db.session import Database, Transaction
    from domain.ledger.verify import Walk
    from workflows.gateway import Gateway

T = TypeVar("T")

MIGRATIONS = Path(__file__).parent / "db" / "migrations"
APPLICATION_ROLE = "scrip_app"

app = typer.Typer(
    name="scrip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""
    Scrip: a self-hosted rewards platform on a double-entry ledger.

    On one machine, [bold]scrip up[/] starts all of it. In production, run these beside your Postgres and Temporal:

    1. [bold]scrip migrate[/] brings the database to this version (SCRIP_OWNER_DATABASE_URL, SCRIP_DATABASE_URL).

    2. [bold]scrip bootstrap[/] makes the first organization and its API key, once.

    3. [bold]scrip api[/] and [bold]scrip worker[/] serve; start as many of each as you need.
    """,
)
org = typer.Typer(no_args_is_help=True, help="Organizations: the tenants. Each has its own data, ledger and keys.")
keys = typer.Typer(no_args_is_help=True, help="API keys. A key has full access to its organization.")
events = typer.Typer(no_args_is_help=True, help="Events: retry what failed, pause and resume a program's processing.")
app.add_typer(events, name="events", rich_help_panel="Administration")
app.add_typer(org, name="org", rich_help_panel="Administration")
app.add_typer(keys, name="keys", rich_help_panel="Administration")

ProgramId = Annotated[UUID, typer.Argument(help="The program's id.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class ExportFormat(StrEnum):
    """What `scrip export` can write."""

    JSONL = "jsonl"
    HLEDGER = "hledger"


class CommandError(typer.Exit):
    """Ends the command with a message on stderr and a status that isn't 0."""

    def __init__(self, message: str, status: int = 1) -> None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
        super().__init__(status)


# --- Serving -----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Running")
def up(
    data_dir: Annotated[
        Path,
        typer.Option(envvar="SCRIP_DATA_DIR", help="Where everything is kept; made if missing, readable by you only."),
    ] = Path(".scrip"),
    host: Annotated[str, typer.Option(help="Address the API listens on. Nothing else is ever exposed.")] = "127.0.0.1",
    api_port: Annotated[int, typer.Option(help="Port of the API; 0 picks a free one.")] = 8080,
    temporal_port: Annotated[int, typer.Option(help="Port of Temporal; 0 picks a free one.")] = 7233,
    ui_port: Annotated[int, typer.Option(help="Port of Temporal's UI; 0 picks a free one.")] = 8233,
    ready_file: Annotated[
        Path | None, typer.Option(help="A file that gets the URLs and the API key, as JSON, once all of it serves.")
    ] = None,
) -> None:
    """Start everything on this machine: Postgres, Temporal with its UI, the worker and the API. Ctrl-C stops it."""
    from embedded.supervisor import UpOptions
    from embedded.supervisor import up as start

    options = UpOptions(
        data_dir=data_dir,
        api_port=api_port,
        temporal_port=temporal_port,
        ui_port=ui_port,
        host=host,
        ready_file=ready_file,
    )
    raise typer.Exit(start(options))


@app.command(rich_help_panel="Running")
def api(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
) -> None:
    """Serve the HTTP API with one process. It needs SCRIP_DATABASE_URL; Temporal may come up later."""
    import uvicorn

    from api.app import create_app
    from domain.logs import configure_logging

    settings = get_settings()
    _require(settings.database_url.get_secret_value(), "SCRIP_DATABASE_URL", "the application's role")
    configure_logging(settings.log_level, settings.log_format)
    uvicorn.run(
        create_app(settings),
        host=host,
        port=port,
        loop="auto",
        http="auto",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )


@app.command(rich_help_panel="Running")
def worker() -> None:
    """Run the worker: it processes events and carries everything that takes time."""
    import worker as worker_process

    _require(get_settings().database_url.get_secret_value(), "SCRIP_DATABASE_URL", "the application's role")
    worker_process.main()


@app.command(rich_help_panel="Running")
def demo(
    api_url: Annotated[str | None, typer.Option(help="Where Scrip serves, such as http://127.0.0.1:8080.")] = None,
    api_key: Annotated[str | None, typer.Option(help="A key of the organization that gets the demo's data.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="The ready file of a running `scrip up`.")] = None,
    data_dir: Annotated[
        Path, typer.Option(envvar="SCRIP_DATA_DIR", help="The data directory of a running `scrip up`.")
    ] = Path(".scrip"),
) -> None:
    """Send three months of card purchases to a running Scrip and show what became of them. Twice adds nothing."""
    from demo.run import demo_command

    raise typer.Exit(demo_command(api_url=api_url, api_key=api_key, ready_file=ready_file, data_dir=data_dir))


# --- The database ------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Administration")
def migrate() -> None:
    """Bring the database to this version. Safe to repeat, and to run from several places at once.

    Uses SCRIP_OWNER_DATABASE_URL, whose role owns the tables. The role in SCRIP_DATABASE_URL, as which the API and the
    workers connect, is made if it doesn't exist yet; it owns nothing and is bound by row-level security.
    """
    settings = _admin_settings()
    owner_url = _owner_url(settings)
    with _database_errors():
        migrate_schema(owner_url)
        if settings.database_url.get_secret_value():
            ensure_login_role(owner_url, settings.database_url.get_secret_value())
    typer.echo("The database is up to date.", err=True)


@app.command(rich_help_panel="Administration")
def bootstrap(as_json: JsonOutput = False) -> None:
    """Make the first organization and its API key, if there is no organization yet. The key is shown this once."""
    with _owner_connection() as (connection, settings):
        organization_id, key = organizations.bootstrap(
            connection,
            rate_per_second=settings.rate_per_second,
            rate_burst=settings.rate_burst,
            now=system_clock(),
        )
    if as_json:
        _print_json({"organization_id": organization_id, "api_key": key.secret if key else None})
    elif key is None:
        typer.echo(f"There is an organization already: {organization_id}. `scrip keys create` makes another key.")
    else:
        _print_new_key(organization_id, key)


@org.command("create")
def create_organization(
    name: Annotated[str, typer.Argument(help="A name for people; 1 to 255 characters.")],
    rate: Annotated[int | None, typer.Option(help="Requests per second, sustained.")] = None,
    burst: Annotated[int | None, typer.Option(help="Requests at once, before the rate counts.")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Create an organization, with an empty ledger. `scrip keys create` gives it a key."""
    with _owner_connection() as (connection, settings):
        organization_id = organizations.create_organization(
            connection,
            name,
            rate_per_second=settings.rate_per_second if rate is None else rate,
            rate_burst=settings.rate_burst if burst is None else burst,
            now=system_clock(),
        )
    if as_json:
        _print_json({"organization_id": organization_id})
    else:
        typer.echo(f"Organization {organization_id}. Next: scrip keys create --org {organization_id}")


@org.command("list")
def list_organizations(as_json: JsonOutput = False) -> None:
    """List organizations."""
    with _owner_connection() as (connection, _):
        rows = organizations.list_organizations(connection)
    _print_rows([asdict(row) for row in rows], as_json)


@keys.command("create")
def create_key(
    organization: Annotated[UUID, typer.Option("--org", help="The organization's id.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "unnamed",
    as_json: JsonOutput = False,
) -> None:
    """Create an API key. It is shown this once; only its SHA-256 is stored."""
    with _owner_connection() as (connection, _):
        key = organizations.create_key(connection, organization, name, now=system_clock())
    if as_json:
        _print_json({"id": key.id, "organization_id": organization, "api_key": key.secret})
    else:
        _print_new_key(organization, key)


@keys.command("list")
def list_keys(
    organization: Annotated[UUID | None, typer.Option("--org", help="Only this organization's keys.")] = None,
    as_json: JsonOutput = False,
) -> None:
    """List API keys. Of the secret only the last four characters are known."""
    with _owner_connection() as (connection, _):
        rows = organizations.list_keys(connection, organization)
    _print_rows([asdict(row) for row in rows], as_json)


@keys.command("revoke")
def revoke_key(key_id: Annotated[UUID, typer.Argument(help="The key's id, as `scrip keys list` shows it.")]) -> None:
    """Make an API key invalid, from the next request on. Revoking again changes nothing."""
    with _owner_connection() as (connection, _):
        organizations.revoke_key(connection, key_id, now=system_clock())
    typer.echo(f"Key {key_id} is revoked.")


@app.command(rich_help_panel="Administration")
def verify(
    organization: Annotated[UUID | None, typer.Option("--org", help="Only this organization.")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Check the ledger of every organization: the hash chain from genesis, every sum and every running balance.

    Exits with 1 when one is invalid, naming the first entry that fails, and with 2 when it could not be checked. Uses
    SCRIP_DATABASE_URL, and SCRIP_OWNER_DATABASE_URL to find the organizations where no --org is given.
    """
    from db.session import DatabaseUnavailable

    _require(_admin_settings().database_url.get_secret_value(), "SCRIP_DATABASE_URL", "the application's role")
    try:
        with _database_errors():
            walks = asyncio.run(_verify_ledgers([organization] if organization else _all_organizations()))
    except DatabaseUnavailable as error:
        raise CommandError(f"Not checked, the database at SCRIP_DATABASE_URL is out of reach: {error}", 2) from None
    except Refusal as refusal:
        raise CommandError(refusal.message, 2) from None
    except CommandError:
        # A message has been printed. 1 means that something was found.
        raise typer.Exit(2) from None
    rows = [
        {
            "organization_id": walk.organization_id,
            "valid": walk.valid,
            "entries_checked": walk.entries_checked,
            "first_invalid_entry_id": walk.first_invalid_entry_id,
            "problem": walk.problem,
        }
        for walk in walks
    ]
    _print_rows(rows, as_json)
    if not all(walk.valid for walk in walks):
        raise typer.Exit(1)


@app.command(rich_help_panel="Administration")
def export(
    organization: Annotated[UUID, typer.Option("--org", help="The organization's id.")],
    file_format: Annotated[
        ExportFormat, typer.Option("--format", help="jsonl for tools/verify_export.py, hledger for bookkeepers.")
    ] = ExportFormat.JSONL,
    output: Annotated[Path | None, typer.Option(help="The file to write; standard output without it.")] = None,
    from_sequence: Annotated[int, typer.Option(min=1, help="The first entry to export, by its sequence.")] = 1,
) -> None:
    """Write a ledger's entries, to the newest at the start, for whoever checks them without Scrip (docs/ledger.md).

    A file appears under its name only when it is complete. Uses SCRIP_DATABASE_URL.
    """
    _require(_admin_settings().database_url.get_secret_value(), "SCRIP_DATABASE_URL", "the application's role")
    try:
        asyncio.run(_export(organization, file_format, output, from_sequence))
    except Refusal as refusal:
        raise CommandError(refusal.message) from None


@app.command(rich_help_panel="Administration")
def reconcile() -> None:
    """Start in Temporal what Postgres says should be running.

    For after a restored backup or a deleted Temporal. Workers do this by themselves when they start. Safe to repeat.
    """
    from workflows.reconcile import reconcile as start_missing
    from workflows.reconcile import (
        reconcile_broadcasts,
        reconcile_holds,
        reconcile_redemptions,
        reconcile_simulations,
    )

    async def run(database: Database, gateway: Gateway) -> str:
        woken = await start_missing(database, gateway)
        holds = await reconcile_holds(database, gateway)
        broadcasts = await reconcile_broadcasts(database, gateway)
        redemptions = await reconcile_redemptions(database, gateway)
        simulations = await reconcile_simulations(database, gateway)
        return (
            f"Woke the event processing of {woken} programs, the ends of holds of {holds.woken} and the broadcasts of "
            f"{broadcasts}.\n"
            f"Started the workflows of {holds.started} holds, {redemptions} redemptions and {simulations} simulations."
        )

    typer.echo(asyncio.run(_with_temporal(run)))


@app.command(rich_help_panel="Administration")
def upkeep(
    organization: Annotated[UUID | None, typer.Option("--org", help="Only this organization.")] = None,
    as_json: JsonOutput = False,
) -> None:
    """Book now what is due: lots that mature or expire, and holds that have reached their end.

    Workers do this every 30 seconds. It needs no Temporal, and is safe to repeat and to run beside them: a second run
    writes nothing. Uses SCRIP_DATABASE_URL.
    """
    _print_rows(asyncio.run(_upkeep(organization)), as_json)


@events.command("retry")
def retry_events(
    program: ProgramId,
    since: Annotated[datetime | None, typer.Option("--from", help="Stored at or after this instant (UTC).")] = None,
    to: Annotated[datetime | None, typer.Option(help="Stored at or before this instant (UTC).")] = None,
    error_contains: Annotated[str | None, typer.Option(help="Text that the error message contains.")] = None,
) -> None:
    """Queue every FAILED event of a program again that matches. They meet the rules as they are now."""
    from domain.events.queries import retry_all

    first, last = _in_utc(since), _in_utc(to)
    count = asyncio.run(_in_program(program, lambda tx: retry_all(tx, program, first, last, error_contains)))
    typer.echo(f"Queued {count} events.")


@events.command("pause")
def pause_events(program: ProgramId) -> None:
    """Stop processing a program's events; they are accepted all the same. A batch under way is finished."""
    from domain.events.control import set_paused

    asyncio.run(_in_program(program, lambda tx: set_paused(tx, program, paused=True)))
    typer.echo(f"Paused. To go on: scrip events resume {program}")


@events.command("resume")
def resume_events(program: ProgramId) -> None:
    """Process a program's events again, those that came in meanwhile first. It begins within two seconds."""
    from domain.events.control import set_paused

    asyncio.run(_in_program(program, lambda tx: set_paused(tx, program, paused=False)))
    typer.echo("Resumed.")


# --- Parts -------------------------------------------------------------------------------------------------------


def _all_organizations() -> list[UUID]:
    with _owner_connection() as (connection, _):
        return [row.id for row in organizations.list_organizations(connection)]


def _in_utc(instant: datetime | None) -> datetime | None:
    """What was typed without a time zone is UTC."""
    return instant.replace(tzinfo=UTC) if instant is not None and instant.tzinfo is None else instant


async def _in_program(program_id: UUID, work: Callable[[Transaction], Awaitable[T]]) -> T:
    """Run `work` in a transaction of the organization that owns the program."""
    with _owner_connection() as (connection, settings):
        found = connection.execute("select organization_id from program where id = %s", (program_id,)).fetchone()
    if found is None:
        raise CommandError(f"There is no program {program_id}.")
    async with _open_database(settings) as database:
        return await database.repeat(found[0], work)


async def _with_temporal(work: Callable[[Database, Gateway], Awaitable[T]]) -> T:
    """Run `work` with the database and Temporal. Raises CommandError where one of them is out of reach."""
    from temporalio.service import RPCError

    from workflows.gateway import Gateway

    settings = _admin_settings()
    _require(settings.database_url.get_secret_value(), "SCRIP_DATABASE_URL", "the application's role")
    try:
        async with _open_database(settings) as database:
            return await work(database, Gateway.from_settings(settings))
    except (RPCError, RuntimeError) as error:
        raise CommandError(f"Temporal at {settings.temporal_address} is out of reach: {error}") from None


@asynccontextmanager
async def _open_database(settings: Settings) -> AsyncIterator[Database]:
    from db.session import Database, DatabaseUnavailable

    database = Database(settings.database_url.get_secret_value(), size=1, timeout_s=10, clock=system_clock)
    await database.open()
    try:
        yield database
    except DatabaseUnavailable as error:
        raise CommandError(f"The database at SCRIP_DATABASE_URL is out of reach: {error}") from None
    finally:
        await database.close()


async def _upkeep(organization_id: UUID | None) -> list[dict[str, Any]]:
    """Sweep one organization, or all of them; a row for each that had something due."""
    from domain.ledger.verifications import organizations_after
    from domain.upkeep import sweep

    settings = _admin_settings()
    _require(settings.database_url.get_secret_value(), "SCRIP_DATABASE_URL", "the application's role")
    rows = []
    async with _open_database(settings) as database:
        after: UUID | None = None
        page = [organization_id] if organization_id else await organizations_after(database, None, 500)
        while page:
            for after in page:
                swept, _ = await sweep(database, after)
                if any(asdict(swept).values()):
                    rows.append({"organization_id": after, **asdict(swept)})
            page = [] if organization_id else await organizations_after(database, after, 500)
    return rows


async def _verify_ledgers(organization_ids: list[UUID]) -> list[Walk]:
    """Walk the chain of each organization, a transaction per page, with a progress bar on stderr."""
    from db.session import Database
    from domain.ledger.verify import advance, begin_walk

    url = _admin_settings().database_url.get_secret_value()
    database = Database(url, size=1, timeout_s=10, clock=system_clock)
    walks = []
    await database.open()
    try:
        with _progress() as progress:
            for organization_id in organization_ids:
                async with database.transaction(organization_id) as tx:
                    walk = await begin_walk(tx)
                bar = progress.add_task(str(organization_id), total=walk.head_sequence)
                unfinished = True
                while unfinished:
                    async with database.transaction(organization_id) as tx:
                        unfinished = await advance(tx, walk)
                    progress.update(bar, completed=walk.entries_checked)
                walks.append(walk)
    finally:
        await database.close()
    return walks


async def _export(organization_id: UUID, file_format: ExportFormat, output: Path | None, first: int) -> None:
    """Write the export to `output`, with a progress bar on stderr, or to standard output."""
    from domain.ledger.export import FORMATS, span_of

    async with _open_database(_admin_settings()) as database:
        span = await span_of(database, organization_id, first)
        chunks = FORMATS[file_format](database, span)
        if output is None:
            stdout = typer.get_binary_stream("stdout")
            async for chunk in chunks:
                stdout.write(chunk.text.encode())
            return
        with _complete_file(output) as file, _progress() as progress:
            bar = progress.add_task(str(output), total=span.entries)
            async for chunk in chunks:
                file.write(chunk.text.encode())
                progress.advance(bar, chunk.entries)


@contextmanager
def _complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name, in place of an older one, once the block has ended well."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise CommandError(f"Cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _progress() -> Progress:
    """A progress bar of entries on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def migrate_schema(owner_url: str) -> None:
    """Bring the database at `owner_url` to the newest schema; of several at once one works and the others wait."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    sqlalchemy_url = owner_url.replace("postgresql://", "postgresql+psycopg://", 1)
    config.set_main_option("sqlalchemy.url", sqlalchemy_url.replace("%", "%%"))
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute("select pg_advisory_lock(hashtext('scrip migrate'))")
        command.upgrade(config, "head")


def ensure_login_role(owner_url: str, application_url: str) -> None:
    """Make sure that the role in `application_url` can log in, may do what the application does, and nothing more.

    Raises CommandError when it would bypass row-level security, or can't be made or reached.
    """
    wanted = conninfo_to_dict(application_url)
    user, password = str(wanted.get("user") or ""), str(wanted.get("password") or "")
    if not user:
        raise CommandError("SCRIP_DATABASE_URL names no user: write it as postgresql://user:password@host/database")
    with psycopg.connect(owner_url, autocommit=True) as connection:
        _refuse_powerful_role(connection, user)
        if not _can_connect(application_url):
            _provide_role(connection, user, password)
        member = connection.execute("select pg_has_role(%s, %s, 'usage')", (user, APPLICATION_ROLE)).fetchone()
        if member != (True,):
            grant = sql.SQL("grant {} to {}")
            connection.execute(grant.format(sql.Identifier(APPLICATION_ROLE), sql.Identifier(user)))
    if not _can_connect(application_url):
        raise CommandError(
            f"The role {user} cannot connect with SCRIP_DATABASE_URL: check its host, port and password."
        )


def _refuse_powerful_role(connection: psycopg.Connection[Any], user: str) -> None:
    found = connection.execute(
        "select rolsuper or rolbypassrls or pg_has_role(oid, current_user, 'usage') from pg_roles where rolname = %s",
        (user,),
    ).fetchone()
    if found == (True,):
        raise CommandError(
            f"SCRIP_DATABASE_URL must name a role that is bound by row-level security, but {user} is a superuser, "
            "bypasses it, or owns the tables. Name another role; `scrip migrate` makes it."
        )


def _provide_role(connection: psycopg.Connection[Any], user: str, password: str) -> None:
    exists = connection.execute("select 1 from pg_roles where rolname = %s", (user,)).fetchone()
    statement = sql.SQL("{} role {} login nosuperuser nocreatedb nocreaterole nobypassrls password {}").format(
        sql.SQL("alter" if exists else "create"), sql.Identifier(user), sql.Literal(password)
    )
    try:
        connection.execute(statement)
    except psycopg.errors.InsufficientPrivilege:
        raise CommandError(
            f"The role {user} of SCRIP_DATABASE_URL cannot connect, and the owner may not make roles. As an "
            f"administrator run: CREATE ROLE {user} LOGIN PASSWORD '...'; GRANT {APPLICATION_ROLE} TO {user};"
        ) from None


def _can_connect(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def _owner_connection() -> Iterator[tuple[psycopg.Connection[Any], Settings]]:
    """A transaction of the owning role, committed at the end; refusals and outages end the command with a message."""
    settings = _admin_settings()
    owner_url = _owner_url(settings)
    with _database_errors(), psycopg.connect(owner_url, connect_timeout=5) as connection:
        try:
            yield connection, settings
        except Refusal as refusal:
            raise CommandError(refusal.message) from None


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.UndefinedTable:
        raise CommandError("The database has no tables yet: run `scrip migrate` first.") from None
    except psycopg.OperationalError as error:
        raise CommandError(f"The database at SCRIP_OWNER_DATABASE_URL is out of reach: {error}".rstrip()) from None


def _admin_settings() -> Settings:
    """The settings of a command that manages a platform: the environment's, else those of a `scrip up` running here."""
    from embedded.datadir import serving

    settings = get_settings()
    if settings.owner_database_url.get_secret_value() or settings.database_url.get_secret_value():
        return settings
    found = serving(settings.data_dir)
    if found is None:
        return settings
    return settings.model_copy(
        update={
            "database_url": SecretStr(found["database_url"]),
            "owner_database_url": SecretStr(found["owner_database_url"]),
            "temporal_address": found["temporal_address"],
        }
    )


def _owner_url(settings: Settings) -> str:
    url = settings.owner_database_url.get_secret_value()
    _require(url, "SCRIP_OWNER_DATABASE_URL", "the role that owns the tables")
    return url


def _require(value: str, variable: str, meaning: str) -> None:
    if not value:
        raise CommandError(
            f"{variable} is not set: the Postgres URL of {meaning}, such as "
            "postgresql://user:password@host:5432/scrip. To try Scrip without a Postgres of your own, run `scrip up`.",
            status=2,
        )


def _print_new_key(organization_id: UUID, key: NewKey) -> None:
    typer.echo(f"Organization  {organization_id}")
    typer.echo(f"Key id        {key.id}")
    typer.echo(f"API key       {key.secret}")
    typer.echo("Keep the API key now: it cannot be shown again.", err=True)


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    if not rows:
        typer.echo("None yet.")
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*("" if value is None else _text(value) for value in row.values()))
    # A narrow terminal must not cut ids in two.
    Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True).print(table, markup=False)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, default=_text))


def _text(value: Any) -> str:
    return format_timestamp(value) if isinstance(value, datetime) else str(value)


def main() -> None:
    """The entry point of the `scrip` command."""
    app()


if __name__ == "__main__":
    main()
