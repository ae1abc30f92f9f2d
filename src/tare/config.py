"""The daemon's settings: what a TOML file may say, with a default for everything.

    [daemon]   root, run, socket, log_level
    [images]   hosts_dir, policy, decryption_keys_dir, auth_file, parallel_layers, progress_timeout, min_rate, range_size,
               max_manifest_size, max_layer_size, max_layer_entries, disk_reserve, keep_blobs, pinned, gc_high, gc_low, gc_min_age
    [network]  mode, bridge, subnet, subnet6, mtu; conf_dir, conf_template, bin_dirs, cache_dir, plugin_timeout, gc
    [runtime]  default_handler, refuse_missing_sources, pods_per_logger, max_log_line, cgroup_root, cgroup_driver, cdi_spec_dirs
    [runtime.handlers.NAME]  type, path, options, sandbox
    [streaming]  address, port, tls_cert, tls_key, idle_timeout, hangup_grace, orphan_grace

Unknown keys are errors: a setting that is misspelt must not be silently a default.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import msgspec

from tare.errors import InvalidArgument

POLICY = "/etc/tare/policy.toml"
BUILTIN = "builtin"
HANDLER_NAME = re.compile("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # as a Kubernetes RuntimeClass has it


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Where the daemon keeps what lasts (`root`), what a reboot ends (`run`), and where it listens (`socket`, under `run` unless told)."""

    root: str = "/var/lib/tare"
    run: str = "/run/tare"
    socket: str = ""
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """Pulling and keeping. Times in seconds, sizes in bytes, `gc_high` and `gc_low` in percent of the disk.

    `progress_timeout` ends a blob on which nothing arrives, or, over so long, less than `min_rate` bytes a second. Blobs of more than
    `range_size` are fetched in ranges of that size, several at a time. A layer unpacks to at most `max_layer_size` bytes and
    `max_layer_entries` entries; a pull that would leave less than `disk_reserve` free is not begun. Images that match one of the
    globs in `pinned` are never collected; others are, once the disk is `gc_high` full, until it is `gc_low` full, if nobody has used
    them for `gc_min_age`. `auth_file` is a docker config.json with credentials, or helpers that have them, for pulls that bring none. `policy` says
    whose images may be used (at its usual place it may be absent: all may); `decryption_keys_dir` has private keys for encrypted layers.
    """

    hosts_dir: str = "/etc/tare/hosts"
    policy: str = POLICY
    decryption_keys_dir: str = "/etc/tare/keys"
    auth_file: str = ""
    parallel_layers: int = 3
    progress_timeout: float = 60.0
    min_rate: int = 8 << 10
    range_size: int = 64 << 20
    max_manifest_size: int = 4 << 20
    max_layer_size: int = 64 << 30
    max_layer_entries: int = 2_000_000
    disk_reserve: int = 64 << 20
    keep_blobs: bool = True
    pinned: tuple[str, ...] = ()
    gc_high: float = 85.0
    gc_low: float = 80.0
    gc_min_age: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The embedded network. An empty `bridge` or `subnet` means chosen: `tare0` and 10.85.0.0/16 for the instance at /run/tare, others by hash.

    An empty `subnet6` means that pods have IPv4 alone.

    With `mode` "cni" pods get their network by the first configuration in `conf_dir` and the plugins in `bin_dirs`, each of which is ended
    after `plugin_timeout` seconds; results are kept in `cache_dir`, which is every runtime's. `conf_template` makes a configuration of the pod
    CIDR that the cluster gives. `gc` has plugins give up, at start, what belongs to no pod of this or any runtime with that cache.
    """

    mode: Literal["embedded", "cni"] = "embedded"
    bridge: str = ""
    subnet: str = ""
    subnet6: str = ""
    mtu: int = 0
    conf_dir: str = "/etc/cni/net.d"
    conf_template: str = ""
    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    cache_dir: str = "/var/lib/cni"
    plugin_timeout: float = 20.0
    gc: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerConfig:
    """A runtime handler beside the built-in one: an OCI runtime's command line, the program at `path` with `options` before each command.

    `sandbox` says that the process it makes on the node is not the container's own but a sandbox around it (gVisor, Kata): then
    signals go through its `kill`, and it is told of limits on memory and CPU, which are otherwise the control group's business.
    """

    type: Literal["oci"] = "oci"
    path: str
    options: tuple[str, ...] = ()
    sandbox: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Pods and containers. A bind source matching a path in `refuse_missing_sources` is refused when it is absent instead of being made.

    `cgroup_driver` says who makes control groups: "systemd", "cgroupfs" (they are made as directories), or "auto": systemd where it runs
    the node with v2. `cdi_spec_dirs` have the files that describe devices by name; a device of a later one hides that of an earlier one.
    Pods that name no runtime handler get `default_handler`: "builtin", or one of `handlers`.
    """

    default_handler: str = BUILTIN
    refuse_missing_sources: tuple[str, ...] = ()
    pods_per_logger: int = 16
    max_log_line: int = 16384
    cgroup_root: str = "/sys/fs/cgroup"
    cgroup_driver: Literal["auto", "cgroupfs", "systemd"] = "auto"
    cdi_spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    handlers: dict[str, HandlerConfig] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingConfig:
    """Where exec, attach and port-forward are streamed: an IP address and a TCP port (0: any free one), with TLS where there is a certificate.

    A session on which nothing is said for `idle_timeout` seconds ends. A terminal whose client has vanished hangs up, and what has not ended
    after `hangup_grace` seconds is killed; a command without one reaches the end of its input, and is killed after `orphan_grace` seconds (0: it is
    left to itself).
    """

    address: str = "127.0.0.1"
    port: int = 0
    tls_cert: str = ""
    tls_key: str = ""
    idle_timeout: float = 4 * 3600.0
    hangup_grace: float = 10.0
    orphan_grace: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)

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
    known: dict[str, type[DaemonConfig | ImagesConfig | NetworkConfig | RuntimeConfig | StreamingConfig]] = {
        "daemon": DaemonConfig,
        "images": ImagesConfig,
        "network": NetworkConfig,
        "runtime": RuntimeConfig,
        "streaming": StreamingConfig,
    }
    for section, keys in table.items():
        if section not in known:
            raise InvalidArgument(f"read configuration {path}", cause=f"unknown section [{section}]")
        if not isinstance(keys, dict):
            raise InvalidArgument(f"read configuration {path}", cause=f"[{section}] is not a table")
        for key in keys:
            if key not in {item.name for item in fields(known[section])}:
                raise InvalidArgument(f"read configuration {path}", cause=f"unknown key {key} in [{section}]")
    check_handlers(table.get("runtime") or {}, path)


def check_handlers(runtime: object, path: str | None) -> None:
    """Raise InvalidArgument for the first thing that is wrong with a runtime handler, or with the choice of the default one."""
    doing = f"read configuration {path}"
    handlers = runtime.get("handlers", {}) if isinstance(runtime, dict) else {}
    if not isinstance(handlers, dict):
        raise InvalidArgument(doing, cause="[runtime.handlers] is not a table")
    for name, settings in handlers.items():
        section = f"[runtime.handlers.{name}]"
        if name == BUILTIN or not HANDLER_NAME.fullmatch(name):
            cause = f"{section}: a handler's name is lower-case letters, digits and dashes, and not {BUILTIN}"
            raise InvalidArgument(doing, cause=cause)
        if not isinstance(settings, dict):
            raise InvalidArgument(doing, cause=f"{section} is not a table")
        for key in settings:
            if key not in {item.name for item in fields(HandlerConfig)}:
                raise InvalidArgument(doing, cause=f"unknown key {key} in {section}")
        if not str(settings.get("path", "")).startswith("/"):
            raise InvalidArgument(doing, cause=f"{section}: path is not the absolute path of a program")
    default = runtime.get("default_handler", BUILTIN) if isinstance(runtime, dict) else BUILTIN
    if default != BUILTIN and default not in handlers:
        raise InvalidArgument(doing, cause=f"default_handler: there is no [runtime.handlers.{default}]")
