"""Every setting of the service, declared once.

Sources, strongest first: flags of `convoy serve`, environment (`CONVOY_<NAME>`), the settings file (YAML, named by
`--config` or `CONVOY_CONFIG`), the defaults below. Unknown keys in the file are errors. Only `service.server` and
the commands that start one or plan for it read this class; everything else receives plain values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from service import providers, strict_yaml, validation
from service.candidates import Wishes
from service.errors import ConfigurationError, InvalidRequestError
from service.routing import Routing

MIB = 1 << 20
_LARGEST = 2**31 - 1  # of what gRPC counts

_PREFIX = "CONVOY_"
_NEAR = 0.8  # how much of two names is the same, for one to be a slip of the other

Port = Annotated[int, Field(ge=0, le=65535)]
Threads = Annotated[int, Field(ge=0, le=256)]

# gRPC counts milliseconds in 32 bits: up to 24 days. An hour is more than enough for what takes part of a request.
Seconds = Annotated[float, Field(ge=0, le=2_000_000, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]

# By provider, ONNX Runtime's own options: {"cuda": {"gpu_mem_limit": "4294967296"}}.
ProviderOptions = Mapping[str, Mapping[str, str | int | float]]


class ModelSettings(BaseModel):
    """Settings of one model, under `model_settings: {<name>: …}` in the settings file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    versions: Annotated[str, Field(coerce_numbers_to_str=True)] = Field(
        "latest", description="Versions to load: latest, latest:N, all, or numbers like 1,3."
    )
    traffic: Mapping[int, float] = Field(
        default_factory=dict, description="Weight of each version for requests that name none."
    )
    shadow: int | None = Field(None, description="Version that gets a copy of every request and never answers.")

    # --- providers; what is not set is as for every model
    providers: tuple[str, ...] | None = Field(None, description="See the setting of that name, as the others below.")
    provider_options: ProviderOptions | None = None
    allow_fallback: bool | None = None
    variant: str | None = None
    executors: Threads | None = None
    intra_op_threads: Threads | None = None
    max_batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None

    @field_validator("providers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _names(value)

    @field_validator("provider_options")
    @classmethod
    def _possible(cls, value: ProviderOptions | None) -> ProviderOptions | None:
        providers.check_options(value or {})
        return value

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        try:
            self.routing.check()
        except InvalidRequestError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def routing(self) -> Routing:
        """Who answers."""
        return Routing(self.versions, self.traffic, self.shadow)


class Settings(BaseSettings):
    """Settings of one server process. Frozen; validated as a whole at start."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, frozen=True, extra="forbid", protected_namespaces=(), validate_default=True
    )

    # --- what is served, and where
    repository: str = Field(
        "models",
        description="Models as <repository>/<model>/<version>/: a directory, or a URL such as s3://bucket/models.",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Names of the models to serve, separated by commas; empty serves all of them."
    )
    model_settings: Mapping[str, ModelSettings] = Field(
        default_factory=dict, description="Settings of single models, by name; no flag, and JSON in the environment."
    )
    repository_poll_s: Seconds = Field(
        5.0, description="Seconds between looks for new and changed versions; 0: only the admin API loads."
    )
    cache_dir: Path = Field(
        Path("~/.cache/convoy"), description="Directory for mirrored models, compiled engines and measurements."
    )
    canary_interval_s: Seconds = Field(
        300.0, description="Seconds between checks of every served version with its canary images; 0: never."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: Port = Field(8500, description="gRPC port; 0 picks a free one.")
    http_port: Port = Field(8501, description="HTTP port for /metrics and /health; 0 picks a free one.")
    admin_host: str = Field("127.0.0.1", description="Address of the admin API; whoever reaches it can unload models.")
    admin_port: Port | None = Field(None, description="gRPC port of the admin API; 0 picks a free one. Off if not set.")

    # --- TLS
    tls_certificate: Path | None = Field(
        None, description="Certificate chain (PEM) of the gRPC port; read again when it changes. Without: no TLS."
    )
    tls_key: Path | None = Field(None, description="Private key (PEM) of the certificate.")
    tls_client_ca: Path | None = Field(
        None, description="Authorities (PEM) whose clients may connect; without, clients need no certificate."
    )

    # --- what a request may ask for
    max_message_bytes: int = Field(
        32 * MIB, ge=4096, le=1024 * MIB, description="Largest gRPC message accepted, in bytes."
    )
    max_images_per_request: int = Field(256, ge=1, le=65536, description="Most images in one request.")
    max_image_pixels: int = Field(64_000_000, ge=1, description="Most pixels of one image, read from its header.")
    max_image_side: int = Field(32_768, ge=1, description="Longest side of one image in pixels.")
    default_deadline_ms: int = Field(10_000, ge=1, description="Deadline of a call that brings none, in milliseconds.")
    max_deadline_ms: int = Field(
        60_000, ge=1, description="Longest deadline; a call that asks for more gets this, in milliseconds."
    )

    message_timeout_s: Seconds = Field(
        30.0,
        description="Seconds that a request's message may take to arrive once its call is open; 0 waits as long as the "
        "connection lasts.",
    )

    # --- who may come
    max_connections: int = Field(
        4096,
        ge=1,
        le=_LARGEST,
        description="Most gRPC connections at a time, and never more than three quarters of the file descriptors that "
        "the process may open; further ones are closed at once.",
    )
    max_calls_per_connection: int = Field(
        1024, ge=1, le=_LARGEST, description="Most calls of one connection at a time; further ones wait at the client."
    )

    # --- how much may be in the house at once; beyond it calls are refused at once
    max_pending_images: int = Field(
        2048, ge=1, description="Most images admitted and not yet answered, over all models."
    )
    max_pending_bytes: int = Field(
        512 * MIB, ge=1, description="Most bytes of encoded images admitted and not yet answered."
    )

    codel_target_ms: Milliseconds = Field(
        2000.0,
        description="Waiting time that a standing queue may have; beyond it requests are shed until it is short again "
        "(CoDel). Set it near the latency you promise; in effect never below four full batches. 0 never sheds.",
    )
    batch_window_ms: Milliseconds = Field(
        0.0,
        description="Longest wait for a fuller batch; 0 never waits: best unless measured otherwise.",
    )

    # --- the machine
    max_batch_size: int = Field(32, ge=1, le=1024, description="Largest batch, in images.")
    decode_threads: Threads = Field(
        0, description="Threads that decode images; 0 takes one for each CPU of the cgroup's quota."
    )
    intra_op_threads: Threads = Field(0, description="CPU threads for one batch; 0 chooses from the cgroup's quota.")

    # --- providers
    providers: Annotated[tuple[str, ...], NoDecode] = Field(
        ("auto",),
        description="Execution providers to choose from, separated by commas: tensorrt, cuda, openvino, cpu; "
        "auto takes those for GPUs if there is one, else those for CPUs. One that is named and missing is an error.",
    )
    provider_options: ProviderOptions = Field(
        default_factory=dict,
        description="By provider, ONNX Runtime's own options; no flag, and JSON in the environment.",
    )
    allow_fallback: bool = Field(
        False, description="Go on with other providers, in the end the CPU, where those asked for cannot run."
    )
    variant: str = Field(
        "auto", description="Variant to run: fp32, fp16, int8, trt-int8; auto takes the fastest that is right."
    )
    executors: Threads = Field(
        0, description="Batches of a model at a time on the CPU; 0 chooses from the cgroup's quota."
    )
    cpu_batch_ms: Milliseconds = Field(
        50.0,
        description="Time that the largest batch may take on a CPU, in milliseconds: larger ones are no faster there "
        "and make others wait. 0 leaves it to max_batch_size.",
    )
    plan_budget_s: Seconds = Field(
        10.0,
        description="Seconds for measuring the variants of a model at its first load; what was not tried by then is "
        "left out.",
    )

    # --- life cycle
    drain_delay_s: Seconds = Field(
        0.0,
        description="Seconds between reporting NOT_SERVING and refusing calls, for load balancers to notice.",
    )
    drain_timeout_s: Seconds = Field(
        65.0, description="Most seconds to wait for calls in flight at shutdown; the rest are cancelled."
    )
    max_connection_age_s: Seconds = Field(
        300.0,
        description="Seconds after which a client has to reconnect, so that it finds new replicas; 0: never.",
    )

    # --- what is told
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, JSON lines otherwise."
    )

    @field_validator("models", "providers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _names(value)

    @field_validator("provider_options")
    @classmethod
    def _possible(cls, value: ProviderOptions) -> ProviderOptions:
        providers.check_options(value)
        return value

    @field_validator("cache_dir")
    @classmethod
    def _expanded(cls, value: Path) -> Path:
        return value.expanduser()

    def wishes(self, model: str) -> Wishes:
        """What is asked of a model's engine: its own settings, and for the rest those of every model."""
        own = self.model_settings.get(model, ModelSettings()).model_dump(exclude_none=True)
        options = own.get("provider_options", self.provider_options)
        return Wishes(
            providers=own.get("providers", self.providers),
            options={name: {key: str(value) for key, value in given.items()} for name, given in options.items()},
            allow_fallback=own.get("allow_fallback", self.allow_fallback),
            variant=own.get("variant", self.variant),
            executors=own.get("executors", self.executors),
            intra_op_threads=own.get("intra_op_threads", self.intra_op_threads),
            max_batch_size=own.get("max_batch_size", self.max_batch_size),
            batch_limit_s=self.cpu_batch_ms / 1000,
            budget_s=self.plan_budget_s,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; one of them is missing")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.default_deadline_ms > self.max_deadline_ms:
            raise ValueError("default_deadline_ms is longer than max_deadline_ms")
        if self.max_images_per_request > self.max_pending_images:
            raise ValueError("max_images_per_request is larger than max_pending_images: such a request never fits")
        if self.max_message_bytes > self.max_pending_bytes:
            raise ValueError("max_message_bytes is larger than max_pending_bytes: such a request never fits")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the file that `load` names; no .env files and no secrets directory."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _StrictYamlSource(settings_cls)


class _StrictYamlSource(YamlConfigSettingsSource):
    def _read_file(self, file_path: Path | Traversable) -> dict[str, Any]:
        """As the base class, which lets the last of equal keys win."""
        tree: dict[str, Any] = strict_yaml.parse(file_path.read_text(encoding="utf-8")) or {}
        return tree


def _names(value: Any) -> Any:
    """Names from a list, or from text with commas; anything else is for pydantic to refuse."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return tuple(name.strip() for part in parts for name in str(part).split(",") if name.strip())


def mistyped(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that set nothing but look like one that does, and which that is."""
    known = [name.upper() for name in Settings.model_fields]
    ours = {name: name.upper().removeprefix(_PREFIX) for name in environment if name.upper().startswith(_PREFIX)}
    near = {name: difflib.get_close_matches(rest, known, 1, _NEAR) for name, rest in ours.items() if rest not in known}
    return {name: f"{_PREFIX}{meant[0]}" for name, meant in near.items() if meant}


def load(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Reads the settings from all sources.

    Args:
        config: YAML file; None for none.
        flags: values given on the command line, by setting name; they win.

    Raises:
        ConfigurationError: the file cannot be read, or a value is wrong; the message names each setting.
    """
    if config is not None and not config.is_file():
        raise ConfigurationError(
            f"the settings file {config} {'is no plain file' if config.exists() else 'does not exist'}"
        )

    class _WithFile(Settings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        return _WithFile(**dict(flags or {}))
    except ValidationError as error:
        faults = "; ".join(_fault(each) for each in error.errors())
        where = f" ({config}, flags or environment)" if config else ""
        raise ConfigurationError(f"wrong settings{where}: {faults}") from error
    except SettingsError as error:  # a table or a list in an environment variable that is no JSON
        variable = re.search(r'for field "(\w+)" from source "EnvSettingsSource"', str(error))
        where = f"the environment variable CONVOY_{variable[1].upper()}" if variable else "the environment"
        raise ConfigurationError(f"{where} cannot be read; tables are written as JSON there: {error}") from error
    except (YAMLError, TypeError, ValueError) as error:
        raise ConfigurationError(f"the settings file {config} cannot be read: {error}") from error


def _fault(error: ErrorDetails) -> str:
    where, said, given = ".".join(map(str, error["loc"])), validation.message(error), validation.value(error)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, Settings.model_fields, 1)
        meant = f"; did you mean {near[0]}?" if near else "; `convoy serve --help` lists them"
        return f"{where} is no setting{meant}"
    return f"{where}: {said}{given and f' (got {given})'}" if where else said
