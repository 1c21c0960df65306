"""One typed model for the configuration of every node, and how it is put together.

A value comes from the command line, else from the environment (`BATON_` + the name in capitals),
else from a YAML file, else from the default here. Names are the same everywhere: `--kv-memory-mib`,
`BATON_KV_MEMORY_MIB`, `kv_memory_mib:`.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from baton.errors import ConfigError

ENV_PREFIX = "BATON_"
DAY_S = 86_400.0
NodeKind = Literal["router", "prefill", "decode"]
_ALL: tuple[NodeKind, ...] = ("router", "prefill", "decode")
_NODES: tuple[NodeKind, ...] = ("prefill", "decode")


def _option(
    default: Any, description: str, kinds: tuple[NodeKind, ...] = _ALL, **limits: Any
) -> Any:
    """A field with its help text and the kinds of node that read it."""
    return Field(
        default, description=description, json_schema_extra={"kinds": list(kinds)}, **limits
    )


class Config(BaseModel):
    """Configuration of a router, prefill or decode node. Units stand last in each name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = _option("127.0.0.1:0", "HOST:PORT to serve gRPC on; port 0 picks a free one")
    http: str = _option("127.0.0.1:0", "HOST:PORT to serve HTTP on", ("router",))
    router: str = _option("127.0.0.1:7000", "HOST:PORT of the router to join", _NODES)
    advertise: str = _option(
        "", "HOST by which other machines reach this node; empty: the host of --listen", _NODES
    )
    node_id: str = _option("", "name of this node; empty: made from its role and epoch", _NODES)
    model: str = _option(
        "smollm2-135m-instruct", "model name, GGUF file, Hugging Face folder, or hf:org/name"
    )
    dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "dtype of weights and of what is computed", _NODES
    )
    quantize: Literal["none", "int8", "int4"] = _option(
        "none", "integers that weights are rounded to at load: less memory, not less time", _NODES
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = _option(
        "auto", "dtype of the KV cache; int8 has a scale for each token and head", _NODES
    )
    device: Literal["cpu", "cuda"] = _option("cpu", "where the model computes", _NODES)
    threads: int = _option(1, "compute threads of this node", _NODES, ge=1, le=1024)
    block_size: int = _option(16, "tokens in a KV block", _NODES, ge=1, le=1024)
    kv_memory_mib: int = _option(
        1024,
        "memory for the paged KV cache, MiB; 0 takes what is free, less the reserve",
        _NODES,
        ge=0,
    )
    memory_reserve_mib: int = _option(
        1024, "memory that --kv-memory-mib 0 leaves free, MiB", _NODES, ge=0
    )
    memory_share: float = _option(
        1.0, "part of what is left that --kv-memory-mib 0 takes", _NODES, gt=0, le=1
    )
    step_tokens: int = _option(256, "most tokens computed in one step", _NODES, ge=1, le=1 << 20)
    guesses: int = _option(
        0,
        "most tokens guessed ahead in each sequence and checked in one step; 0 guesses none",
        ("decode",),
        ge=0,
        le=64,
    )
    draft_model: str = _option(
        "",
        "smaller model of the same vocabulary that guesses; empty: guess from the text itself",
        ("decode",),
    )
    age_limit_s: float = _option(
        5.0, "a prompt that waits longer goes before more urgent ones, seconds", ("prefill",), gt=0
    )
    watermark: float = _option(
        0.01,
        "part of the KV blocks kept free for running sequences when one is taken in",
        ("decode",),
        ge=0,
        le=0.5,
    )
    max_running: int = _option(32, "most sequences in one decode step", ("decode",), ge=1, le=4096)
    max_waiting: int = _option(
        256, "most requests waiting for KV blocks on a node, and beyond it refused", _NODES, ge=0
    )
    max_requests: int = _option(256, "most requests in flight; more are refused", ("router",), ge=1)
    default_max_tokens: int = _option(
        256, "max_tokens of a request that names none", ("router",), ge=1
    )
    request_timeout_s: float = _option(
        600.0, "deadline of a request whose client sets none, seconds", ("router",), gt=0, le=DAY_S
    )
    link_timeout_s: float = _option(
        5.0, "longest wait for a peer on a KV link, seconds", _NODES, gt=0, le=600
    )
    lease_s: float = _option(
        5.0, "a node is gone when it was silent this long, seconds", ("router",), gt=0, le=3600
    )
    heartbeat_s: float = _option(1.0, "time between heartbeats, seconds", _NODES, gt=0, le=3600)
    drain_timeout_s: float = _option(
        10.0, "longest wait for running requests at a stop, seconds", ge=0, le=DAY_S
    )
    max_message_bytes: int = _option(
        4 << 20, "largest gRPC message or HTTP body, bytes", ge=64 << 10, le=64 << 20
    )
    token_file: str = _option(
        "", "file with the cluster's shared token; needed to listen off loopback"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _option("info", "least level logged")

    @field_validator("listen", "http", "router")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        split_address(value)
        return value

    @model_validator(mode="after")
    def _off_loopback_needs_a_token(self) -> Config:
        for name in ("listen", "http"):
            host, _ = split_address(getattr(self, name))
            if not is_loopback(host) and not self.token_file:
                raise ValueError(
                    f"{name} is {host}, which other machines can reach: give --token-file, "
                    "or listen on 127.0.0.1"
                )
        if self.heartbeat_s >= self.lease_s:
            raise ValueError("heartbeat_s must be less than lease_s, or every lease runs out")
        return self

    @property
    def stored_kv_dtype(self) -> str:
        """What the KV cache stores."""
        return self.dtype if self.kv_dtype == "auto" else self.kv_dtype

    def token(self) -> str | None:
        """The cluster's token, or None where there is none. Raises `ConfigError`."""
        return read_token(self.token_file)


def read_token(file: str) -> str | None:
    """The token in `file`, or None where no file is named. Raises `ConfigError`."""
    if not file:
        return None
    try:
        token = Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file cannot be read: {error}") from error
    if len(token) < 16:
        raise ConfigError("token_file holds fewer than 16 characters; write a longer token")
    if not (token.isascii() and token.isprintable()):  # all that gRPC metadata can carry
        raise ConfigError("token_file must hold one line of printable ASCII")
    return token


def option_names(kind: NodeKind) -> list[str]:
    """Names of the options that a node of this kind reads, in the order of the model."""
    return [
        name
        for name, field in Config.model_fields.items()
        if kind in field.json_schema_extra["kinds"]  # type: ignore[index, operator]
    ]


def load_config(
    kind: NodeKind,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    file: str | None = None,
) -> Config:
    """Put the configuration of one node together. Raises `ConfigError` with what to change.

    `flags` holds only what was given on the command line. A file may carry the options of every
    kind of node; one that does not concern `kind` is checked all the same.
    """
    values: dict[str, Any] = {}
    if file:
        values.update(_read_yaml(file))
    for name in option_names(kind):
        if (text := environ.get(ENV_PREFIX + name.upper())) is not None:
            values[name] = text
    values.update(flags)
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from error


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{file} must hold `name: value` lines")
    return content


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{name} is no option; `baton prefill --help` lists them"
    return f"{name}: {message}" if name else message


def split_address(address: str) -> tuple[str, int]:
    """'HOST:PORT' or '[IPV6]:PORT' as (host, port). Raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
