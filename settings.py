"""Everything an operator can configure, read from `SCRIP_*` environment variables (docs/configuration.md)."""

from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The configuration of one process. Every field can be set as `SCRIP_<NAME>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="SCRIP_", extra="ignore")

    database_url: SecretStr = Field(
        default=SecretStr(""),
        description="Postgres URL of the application role, which owns nothing and is bound by row-level security.",
    )
    owner_database_url: SecretStr = Field(
        default=SecretStr(""),
        description="Postgres URL of the role that owns the tables: migrations, organizations and keys only.",
    )
    database_pool_size: int = Field(default=8, ge=1, le=200, description="Connections per process.")
    database_pool_timeout_s: float = Field(
        default=5.0,
        gt=0,
        le=60,
        description="How long a request waits for a connection before it answers 503.",
    )

    temporal_address: str = Field(default="127.0.0.1:7233", description="host:port of the Temporal frontend.")
    temporal_namespace: str = Field(default="default", min_length=1)
    temporal_tls: bool = Field(default=False, description="Use TLS towards Temporal (implied by an API key).")
    temporal_api_key: SecretStr | None = Field(default=None, description="API key of Temporal Cloud.")
    temporal_timeout_s: float = Field(
        default=5.0, gt=0, le=60, description="How long a call may wait for Temporal before it answers 503."
    )

    worker_drains: int = Field(
        default=16, ge=1, le=200, description="Programs whose events one worker processes at once."
    )
    retry_schedule_s: tuple[float, ...] = Field(
        default=(2, 4, 8, 16, 32), description="Waits between processing attempts of an event, in seconds."
    )
    max_attempts: int = Field(default=5, ge=1, le=20, description="Processing attempts of an event.")
    backlog_limit: int = Field(
        default=1_000_000,
        ge=1,
        description="Waiting events per organization above which ingestion answers 429.",
    )
    rate_per_second: int = Field(default=10_000, ge=1, description="Requests per second of a new organization.")
    rate_burst: int = Field(default=20_000, ge=1, description="Burst of a new organization.")

    data_dir: Path = Field(
        default=Path(".scrip"), description="Where `scrip up` keeps everything, and where other commands look for it."
    )
    worker_ready_file: Path | None = Field(
        default=None,
        description="A file that the worker creates once it polls; a supervisor's readiness probe.",
    )
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    log_format: str = Field(default="json", pattern="^(json|console)$")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
