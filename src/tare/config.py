"""The daemon's settings: what a TOML file may say, with a default for everything.

    [daemon]   root, run, socket, log_level
    [images]   hosts_dir, parallel_layers, progress_timeout, max_manifest_size, keep_blobs
    [network]  mode, bridge, subnet, mtu
    [runtime]  default_handler, refuse_missing_sources, pods_per_logger, max_log_line, cgroup_root

Unknown keys are errors: a setting that is misspelt must not be silently a default.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import msgspec

from tare.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Where the daemon keeps what lasts (`root`), what a reboot ends (`run`), and where it listens (`socket`, under `run` unless told)."""

    root: str = "/var/lib/tare"
    run: str = "/run/tare"
    socket: str = ""
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """Pulling. Timeouts in seconds; `progress_timeout` ends a blob on which nothing arrives."""

    hosts_dir: str = "/etc/tare/hosts"
    parallel_layers: int = 3
    progress_timeout: float = 60.0
    max_manifest_size: int = 4 << 20
    keep_blobs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The embedded network. An empty `bridge` or `subnet` means chosen: `tare0` and 10.85.0.0/16 for the instance at /run/tare, others by hash."""

    mode: str = "embedded"
    bridge: str = ""
    subnet: str = ""
    mtu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Pods and containers. A bind source matching a path in `refuse_missing_sources` is refused when it is absent instead of being made."""

    default_handler: str = "builtin"
    refuse_missing_sources: tuple[str, ...] = ()
    pods_per_logger: int = 16
    max_log_line: int = 16384
    cgroup_root: str = "/sys/fs/cgroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def root(self) -> Path:
        """What survives a reboot."""
        return Path(self.daemon.root)

    @property
    def run(self) -> Path:
        """What belongs to this boot."""
        return Path(self.daemon.run)

    @property
    def socket(self) -> Path:
        """CRI's unix socket."""
        return Path(self.daemon.socket) if self.daemon.socket else self.run / "tare.sock"


def load(path: str | None, *, root: str | None = None, run: str | None = None, socket: str | None = None) -> Config:
    """The settings of the file at `path` (none: the defaults), with the command line's directories over them.

    Raises InvalidArgument, naming the file and the key.
    """
    table: dict[str, object] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"read configuration {path}", cause=error) from error
    check_keys(table, path)
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"read configuration {path}", cause=error) from error
    given = {"root": root, "run": run, "socket": socket}
    daemon = replace(config.daemon, **{key: str(Path(value).absolute()) for key, value in given.items() if value})
    return replace(config, daemon=daemon)


def check_keys(table: dict[str, object], path: str | None) -> None:
    """Raise InvalidArgument for the first section or key that Tare does not know."""
    known: dict[str, type[DaemonConfig | ImagesConfig | NetworkConfig | RuntimeConfig]] = {
        "daemon": DaemonConfig,
        "images": ImagesConfig,
        "network": NetworkConfig,
        "runtime": RuntimeConfig,
    }
    for section, keys in table.items():
        if section not in known:
            raise InvalidArgument(f"read configuration {path}", cause=f"unknown section [{section}]")
        if not isinstance(keys, dict):
            raise InvalidArgument(f"read configuration {path}", cause=f"[{section}] is not a table")
        for key in keys:
            if key not in {item.name for item in fields(known[section])}:
                raise InvalidArgument(f"read configuration {path}", cause=f"unknown key {key} in [{section}]")
