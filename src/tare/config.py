"""The daemon's settings: what a TOML file may say, with a default for everything.

    [daemon]   root, run, socket, log_level, log_format
    [images]   hosts_dir, policy, decryption_keys_dir, auth_file, parallel_layers, progress_timeout, min_rate, range_size,
               max_manifest_size, max_layer_size, max_layer_entries, disk_reserve, keep_blobs, pinned, gc_high, gc_low, gc_min_age
    [network]  mode, bridge, subnet, subnet6, mtu, isolation; conf_dir, conf_template, bin_dirs, cache_dir, plugin_timeout, gc
    [network.networks.NAME]  bridge, subnet, subnet6, mtu, isolation
    [runtime]  default_handler, refuse_missing_sources, pods_per_logger, max_log_line, cgroup_root, cgroup_driver, cdi_spec_dirs, criu
    [runtime.handlers.NAME]  type, path, options, sandbox
    [streaming]  address, port, tls_cert, tls_key, idle_timeout, hangup_grace, orphan_grace
    [nri]      enable, socket, connections, plugin_path, plugin_config_path, registration_timeout, request_timeout
    [nri.default_validator]  enable, reject_…, required_plugins, tolerate_missing_plugins_annotation
    [metrics]  address
    [tracing]  endpoint, sampling_ratio, service_name

Unknown keys are errors: a setting that is misspelt must not be silently a default.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import msgspec

from tare.errors import InvalidArgument

POLICY = "/etc/tare/policy.toml"
BUILTIN = "builtin"
HANDLER_NAME = re.compile("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # as a Kubernetes RuntimeClass has it
RESERVED_NETWORKS = ("default", "pod", "host", "none")  # what the command line calls something else


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Where the daemon keeps what lasts (`root`), what a reboot ends (`run`), and where it listens (`socket`, under `run` unless told).

    `log_level` is read again at a SIGHUP.
    """

    root: str = "/var/lib/tare"
    run: str = "/run/tare"
    socket: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"


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


Isolation = Literal["link-local", "node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedNetworkConfig:
    """A network beside the default one, for pods that ask for it by name; keys as `NetworkConfig` has them."""

    bridge: str = ""
    subnet: str = ""
    subnet6: str = ""
    mtu: int = 0
    isolation: tuple[Isolation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The embedded network. An empty `bridge` or `subnet` means chosen: `tare0` and 10.85.0.0/16 for the instance at /run/tare, others by hash.

    An empty `subnet6` means that pods have IPv4 alone. `isolation` keeps pods from what the node alone should reach: "link-local" from
    169.254.0.0/16 and fe80::/10 (a cloud's metadata, resolvers of the node), "node" from the node's own addresses. `networks` are
    further ones by name.

    With `mode` "cni" pods get their network by the first configuration in `conf_dir` and the plugins in `bin_dirs`, each of which is ended
    after `plugin_timeout` seconds; results are kept in `cache_dir`, which is every runtime's. `conf_template` makes a configuration of the pod
    CIDR that the cluster gives. `gc` has plugins give up, at start, what belongs to no pod of this or any runtime with that cache.
    """

    mode: Literal["embedded", "cni"] = "embedded"
    bridge: str = ""
    subnet: str = ""
    subnet6: str = ""
    mtu: int = 0
    isolation: tuple[Isolation, ...] = ()
    networks: dict[str, NamedNetworkConfig] = field(default_factory=dict)
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
    Pods that name no runtime handler get `default_handler`: "builtin", or one of `handlers`. `criu` is the program for checkpoints, by name or path.
    """

    default_handler: str = BUILTIN
    refuse_missing_sources: tuple[str, ...] = ()
    pods_per_logger: int = 16
    max_log_line: int = 16384
    cgroup_root: str = "/sys/fs/cgroup"
    cgroup_driver: Literal["auto", "cgroupfs", "systemd"] = "auto"
    cdi_spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    criu: str = "criu"
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
class ValidatorConfig:
    """What NRI plugins may not adjust, and which of them must have seen every new container, by name or by index and name.

    Pods ask for further ones in annotations "required-plugins.noderesource.dev". One with the annotation `tolerate_missing_plugins_annotation`
    set to "true" does without any.
    """

    enable: bool = False
    reject_oci_hook_adjustment: bool = False
    reject_runtime_default_seccomp_adjustment: bool = False
    reject_unconfined_seccomp_adjustment: bool = False
    reject_custom_seccomp_adjustment: bool = False
    reject_namespace_adjustment: bool = False
    reject_sysctl_adjustment: bool = False
    required_plugins: tuple[str, ...] = ()
    tolerate_missing_plugins_annotation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NriConfig:
    """Plugins of the node (NRI), which connect to `socket` if `connections` may be made, or are programs in `plugin_path` and started here.

    Those have their own settings in `plugin_config_path`. An empty `socket` or `plugin_path` means chosen: /var/run/nri/nri.sock and
    /opt/nri/plugins for the instance at /run/tare; nri.sock in its run directory, and no programs, for others. Times are in seconds.
    """

    enable: bool = True
    socket: str = ""
    connections: bool = True
    plugin_path: str = ""
    plugin_config_path: str = "/etc/nri/conf.d"
    registration_timeout: float = 5.0
    request_timeout: float = 2.0
    default_validator: ValidatorConfig = field(default_factory=ValidatorConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where Prometheus finds the daemon's own metrics: an IP address and a port ("127.0.0.1:9464", "[::1]:9464"), or nowhere."""

    address: str = ""

    def place(self) -> tuple[str, int]:
        """Address and port. Raises ValueError where that is none."""
        host, mark, port = self.address.rpartition(":")
        if not mark or not port.isascii() or not port.isdecimal() or int(port) > 0xFFFF:
            raise ValueError(f"{self.address!r} is not ADDRESS:PORT")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if (ip_address(bare).version == 6) != (bare != host):
            raise ValueError(f"{self.address!r}: an IPv6 address, and no other, is in brackets")
        return bare, int(port)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """Which OpenTelemetry collector gets traces, over OTLP with gRPC ("http://127.0.0.1:4317", "https://…" with TLS), if any.

    Callers decide for their own traces; of calls that bring no decision the part `sampling_ratio` (0 to 1) is kept.
    """

    endpoint: str = ""
    sampling_ratio: float = 1.0
    service_name: str = "tare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    nri: NriConfig = field(default_factory=NriConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)

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
    check_watching(config, path)
    given = {"root": root, "run": run, "socket": socket}
    told: dict[str, Any] = {key: str(Path(value).absolute()) for key, value in given.items() if value}
    daemon = replace(config.daemon, **told)
    return replace(config, daemon=daemon)


def check_keys(table: dict[str, object], path: str | None) -> None:
    """Raise InvalidArgument for the first section or key that Tare does not know."""
    known: dict[str, type[Any]] = {
        "daemon": DaemonConfig,
        "images": ImagesConfig,
        "network": NetworkConfig,
        "runtime": RuntimeConfig,
        "streaming": StreamingConfig,
        "nri": NriConfig,
        "metrics": MetricsConfig,
        "tracing": TracingConfig,
    }
    for section, keys in table.items():
        if section not in known:
            raise InvalidArgument(f"read configuration {path}", cause=f"unknown section [{section}]")
        if not isinstance(keys, dict):
            raise InvalidArgument(f"read configuration {path}", cause=f"[{section}] is not a table")
        for key in keys:
            if key not in {item.name for item in fields(known[section])}:
                raise InvalidArgument(f"read configuration {path}", cause=f"unknown key {key} in [{section}]")
    check_networks(table.get("network") or {}, path)
    check_handlers(table.get("runtime") or {}, path)
    nri = table.get("nri")
    validator = nri.get("default_validator") if isinstance(nri, dict) else None
    for key in validator if isinstance(validator, dict) else ():
        if key not in {item.name for item in fields(ValidatorConfig)}:
            cause = f"unknown key {key} in [nri.default_validator]"
            raise InvalidArgument(f"read configuration {path}", cause=cause)


def check_watching(config: Config, path: str | None) -> None:
    """Raise InvalidArgument for an address of metrics or traces that is none."""
    doing, tracing = f"read configuration {path}", config.tracing
    if config.metrics.address:
        try:
            config.metrics.place()
        except ValueError as error:
            raise InvalidArgument(doing, cause=f"[metrics] address: {error}") from error
    if tracing.endpoint and not re.fullmatch(r"https?://[^/\s]+:\d+/?", tracing.endpoint):
        cause = f"[tracing] endpoint: {tracing.endpoint!r} is not http://HOST:PORT or https://HOST:PORT"
        raise InvalidArgument(doing, cause=cause)
    if not 0.0 <= tracing.sampling_ratio <= 1.0:
        raise InvalidArgument(doing, cause=f"[tracing] sampling_ratio: {tracing.sampling_ratio} is not from 0 to 1")


def differences(before: Config, after: Config) -> list[str]:
    """The keys that two configurations do not have the same under, as "section.key"."""
    found = []
    for section in fields(Config):
        one, other = getattr(before, section.name), getattr(after, section.name)
        changed = (key.name for key in fields(one) if getattr(one, key.name) != getattr(other, key.name))
        found += [f"{section.name}.{key}" for key in changed]
    return found


def check_networks(network: object, path: str | None) -> None:
    """Raise InvalidArgument for the first thing that is wrong with a named network, or with what is set for no network at all."""
    doing = f"read configuration {path}"
    settings = network if isinstance(network, dict) else {}
    networks = settings.get("networks", {})
    if not isinstance(networks, dict):
        raise InvalidArgument(doing, cause="[network.networks] is not a table")
    if settings.get("mode") == "cni":
        for key in ("networks", "isolation"):
            if settings.get(key):
                cause = f'[network] {key} is the embedded network\'s, and mode is "cni"'
                raise InvalidArgument(doing, cause=cause, hint="with CNI that is up to its plugins")
    for name, keys in networks.items():
        section = f"[network.networks.{name}]"
        if name in RESERVED_NETWORKS or not HANDLER_NAME.fullmatch(name):
            taken = ", ".join(RESERVED_NETWORKS)
            cause = f"{section}: a network's name is lower-case letters, digits and dashes, and none of {taken}"
            raise InvalidArgument(doing, cause=cause)
        if not isinstance(keys, dict):
            raise InvalidArgument(doing, cause=f"{section} is not a table")
        for key in keys:
            if key not in {item.name for item in fields(NamedNetworkConfig)}:
                raise InvalidArgument(doing, cause=f"unknown key {key} in {section}")


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
