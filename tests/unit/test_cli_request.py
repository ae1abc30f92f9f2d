"""`tare run`'s options as CRI requests."""

from __future__ import annotations

import os

import pytest

from tare.cli.request import (
    CPU_PERIOD,
    MASKED_PATHS,
    READONLY_PATHS,
    RUN_ANNOTATION,
    RunOptions,
    container_config,
    parse_environment,
    parse_size,
    parse_user,
    parse_volume,
    pod_config,
)
from tare.cri.v1 import api_pb2
from tare.errors import InvalidArgument


def options(**changes: object) -> RunOptions:
    return RunOptions(**{"image": "busybox", "token": "f" * 32, "log_directory": "/l", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 1 << 20), ("64m", 64 << 20), ("64MiB", 64 << 20), ("1.5g", 3 << 29), ("10kb", 10240), ("7b", 7)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "m", "-1m", "1x", "1 m", "1e3", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_size(text)


def test_a_volume_has_a_source_a_destination_and_maybe_a_mode() -> None:
    assert parse_volume("/a:/b") == api_pb2.Mount(host_path="/a", container_path="/b")
    assert parse_volume("/a:/b:ro").readonly
    assert parse_volume("a:/b").host_path == os.path.join(os.getcwd(), "a")
    for bad in ("/a", "/a:b", "/a:/b:rx", ":/b", "/a:", "/a:/b:ro:x"):
        with pytest.raises(InvalidArgument):
            parse_volume(bad)


def test_a_user_is_a_name_or_numbers() -> None:
    assert parse_user("www-data") == {"run_as_username": "www-data"}
    assert parse_user("5") == {"run_as_user": api_pb2.Int64Value(value=5)}
    assert parse_user("5:6")["run_as_group"] == api_pb2.Int64Value(value=6)
    for bad in ("", "5:", ":6", "www:data", "5:www"):
        with pytest.raises(InvalidArgument):
            parse_user(bad)


def test_a_variable_without_a_value_is_handed_on() -> None:
    assert parse_environment(("A=1=2", "B", "C"), {"B": "x"}) == {"A": "1=2", "B": "x"}
    with pytest.raises(InvalidArgument):
        parse_environment(("=1",), {})


def test_a_container_has_limits_and_the_usual_paths_hidden() -> None:
    config = container_config(options(cpus=0.5, memory="64m", command=("sh", "-c", "true"), entrypoint="/init"))
    assert config.linux.resources.cpu_quota == CPU_PERIOD // 2
    assert config.linux.resources.memory_limit_in_bytes == 64 << 20
    assert (list(config.command), list(config.args)) == (["/init"], ["sh", "-c", "true"])
    security = config.linux.security_context
    assert tuple(security.masked_paths) == MASKED_PATHS
    assert tuple(security.readonly_paths) == READONLY_PATHS
    assert security.seccomp.profile_type == api_pb2.SecurityProfile.RuntimeDefault


def test_a_privileged_container_has_nothing_hidden() -> None:
    security = container_config(options(privileged=True)).linux.security_context
    assert not security.masked_paths
    assert not security.readonly_paths
    assert security.seccomp.profile_type == api_pb2.SecurityProfile.Unconfined


def test_a_name_makes_the_pod_unique_and_the_annotation_each_run() -> None:
    pod = pod_config(options(name="web"))
    assert (pod.metadata.name, pod.metadata.uid, pod.hostname) == ("web", "web", "web")
    assert pod.annotations[RUN_ANNOTATION] == "f" * 32
    nameless = pod_config(options())
    assert (nameless.metadata.name, nameless.metadata.uid) == ("run-ffffffff", "f" * 32)


def test_the_hosts_network_has_the_hosts_name() -> None:
    pod = pod_config(options(network="host"))
    assert pod.hostname == ""
    assert pod.linux.security_context.namespace_options.network == api_pb2.NODE
    for changes in ({"network": "host", "hostname": "x"}, {"name": "a/b"}, {"labels": ("x",)}):
        with pytest.raises(InvalidArgument):
            pod_config(options(**changes))
    with pytest.raises(InvalidArgument):
        container_config(options(cpus=-1.0))
