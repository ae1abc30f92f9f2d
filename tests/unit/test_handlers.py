"""Runtime handlers without a process: settings, what another runtime is told, what its program says that it can do, who gets which."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tare.config import HandlerConfig, RuntimeConfig, load
from tare.errors import FailedPrecondition, InvalidArgument, Unavailable
from tare.handlers import oci, oci_bundle
from tare.handlers.commands import Ended
from tare.handlers.oci_features import Features
from tare.handlers.oci_files import Bundle, encoded
from tare.handlers.processes import Process
from tare.runtime.handlers import Handlers
from tare.runtime.records import NamespaceMode, NamespaceOptions, PodConfig, PodMetadata, PodSecurity

# Settings


def settings(tmp_path: Path, text: str) -> RuntimeConfig:
    """Those of a file."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load(str(file)).runtime


def test_settings(tmp_path: Path) -> None:
    text = '[runtime]\ndefault_handler = "a"\n[runtime.handlers.a]\ntype = "oci"\npath = "/a"\noptions = ["--x"]\nsandbox = true\n'
    found = settings(tmp_path, text + '[runtime.handlers.b-2]\npath = "/b"\n')
    assert found.handlers == {
        "a": HandlerConfig(path="/a", options=("--x",), sandbox=True),
        "b-2": HandlerConfig(path="/b"),
    }
    assert found.default_handler == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[runtime.handlers.builtin]\npath = "/a"', "and not builtin"),
        ('[runtime.handlers."a/b"]\npath = "/a"', "lower-case letters"),
        ('[runtime.handlers."-a"]\npath = "/a"', "lower-case letters"),
        ('[runtime.handlers.a]\npath = "a"', "absolute path"),
        ("[runtime.handlers.a]", "absolute path"),
        ('[runtime.handlers.a]\npath = "/a"\ntype = "shim"', "shim"),
        ('[runtime.handlers.a]\npath = "/a"\noption = []', "unknown key option in [runtime.handlers.a]"),
        ('[runtime.handlers.a]\npath = "/a"\noptions = "x"', "array"),
        ('[runtime.handlers]\na = "/a"', "is not a table"),
        ('[runtime]\nhandlers = "a"', "is not a table"),
        ('[runtime]\ndefault_handler = "a"', "no [runtime.handlers.a]"),
    ],
)
def test_settings_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        settings(tmp_path, text)
    assert words in str(failure.value)


# What a runtime is told


def spec(**changes: Any) -> dict[str, Any]:
    """What `runtime.spec` makes, in short."""
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "/x", "readonly": True},
        "process": {"args": ["a"], "env": ["HOSTNAME=web", "A=b"], "stdin": True, "terminal": False, "cwd": "/"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {
                "destination": "/v",
                "type": "overlay",
                "source": "overlay",
                "options": ["ro", "lowerdir=/a:/b"],
                "subPath": "s",
            },
        ],
        "directories": ["/data"],
        "annotations": {"k": "v"},
        "linux": {
            "namespaces": [{"type": "mount"}],
            "cgroupsPath": "/old",
            "resources": {
                "devices": [{"allow": False}],
                "memory": {"limit": 1},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            },
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
        },
    } | changes


def told(*, sandbox: bool = False) -> dict[str, Any]:
    return oci_bundle.configuration(spec(), rootfs="/r", volume="/vol", cgroup="/new", sandbox=sandbox)


def test_what_a_runtime_is_told() -> None:
    given = spec()
    config = told()
    assert given == spec()
    assert config == {
        "ociVersion": "1.0.2",
        "root": {"path": "/r", "readonly": True},
        "process": {"args": ["a"], "env": ["HOSTNAME=web", "A=b"], "terminal": False, "cwd": "/"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/v", "type": "bind", "source": "/vol/0", "options": ["rbind", "ro"]},
        ],
        "annotations": {"k": "v"},
        "linux": {
            "namespaces": [{"type": "mount"}],
            "cgroupsPath": "/new",
            "resources": {"devices": [{"allow": False}]},
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
        },
    }


def test_a_sandbox_is_told_of_its_size_and_its_name() -> None:
    config = told(sandbox=True)
    assert config["linux"]["resources"] == {"devices": [{"allow": False}], "memory": {"limit": 1}}
    assert config["hostname"] == "web"


def test_a_filter_that_an_exec_would_bring_is_the_containers_own_already() -> None:
    assert oci_bundle.process({"args": ["a"], "seccomp": {}, "stdin": False}) == {"args": ["a"]}


def test_bytes_that_are_no_text_go_out_as_they_came() -> None:
    value = {"env": [os.fsdecode(b"A=\xff\xc3\xa4")]}
    assert encoded(value) == b'{"env": ["A=\xff\xc3\xa4"]}'


def test_what_a_runtime_would_get_wrong() -> None:
    mapped = {"destination": "/m", "uidMappings": [{}]}
    user = {"namespaces": [{"type": "user"}]}
    read_only = {"destination": "/r", "type": "bind", "source": "/s", "options": ["rbind", "ro", "rro"]}
    nothing = {"idmap": False, "user_namespaces": False, "recursive_read_only": False}
    oci_bundle.check(spec(), "x", **nothing)
    everything = dict.fromkeys(nothing, True)
    oci_bundle.check(spec(mounts=[mapped, read_only], linux=user), "x", **everything)
    with pytest.raises(InvalidArgument, match="handler x: it does not support mounts"):
        oci_bundle.check(spec(mounts=[mapped]), "x", **everything | {"idmap": False})
    with pytest.raises(InvalidArgument, match="handler x: it does not support user"):
        oci_bundle.check(spec(linux=user), "x", **everything | {"user_namespaces": False})
    with pytest.raises(InvalidArgument) as refused:
        oci_bundle.check(spec(mounts=[read_only]), "x", **everything | {"recursive_read_only": False})
    assert str(refused.value).startswith("RROUnsupported: ") and "/r" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("no json\n", ""),
        ("[1]\n3\n", ""),
        ('{"level":"info","msg":"a"}\n', ""),
        ('{"level":"error","msg":"a"}\n{"level":"error","msg":"b"}\n{"level":"warning","msg":"c"}\n', "b"),
        ('{"level":"fatal","msg":"a"}\n{"level":"error"', "a"),
        ('{"level":"error","msg":""}\n', ""),
    ],
)
def test_the_last_error_of_a_log(text: str, words: str) -> None:
    assert oci.last_error(text) == words


# What its program says


class Program:
    """Answers for a program: exit code, standard error and standard output by the last word of its command line."""

    def __init__(self, **answers: tuple[int, str, str]) -> None:
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.asked: list[list[str]] = []

    async def capture(self, argv: list[str], *, timeout: float) -> tuple[Ended, str]:
        self.asked.append(argv)
        code, words, text = self.answers[argv[-1].lstrip("-")]
        return Ended(code, words), text


def look(path: Path, program: Any) -> Features:
    """Asked once."""
    features = Features(HandlerConfig(path=str(path), options=("--x",)))
    asyncio.run(features.look(program))
    return features


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An executable file."""
    path = tmp_path / "program"
    path.touch(0o755)
    return path


def test_what_it_can_do(file: Path) -> None:
    answer = {"mountOptions": ["ro", "rro"], "linux": {"mountExtensions": {"idmap": {"enabled": True}}}}
    program = Program(features=(0, "", json.dumps(answer)))
    features = look(file, program)
    assert features.trouble() is None and features.recursive_read_only and features.idmap_mounts
    assert not features.user_namespaces
    asyncio.run(features.look(program))  # type: ignore[arg-type] # in the place of Commands
    assert program.asked == [[str(file), "--x", "features"]]


def test_one_that_does_not_say(file: Path) -> None:
    features = look(file, Program(features=(1, "unknown", ""), version=(0, "", "1")))
    assert features.trouble() is None and not features.recursive_read_only and not features.idmap_mounts


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (Program(features=(1, "", ""), version=(139, "crash", "")), "does not run: crash"),
        (Program(features=(0, "", "no json")), "does not run: Expecting value"),
    ],
)
def test_one_that_does_not_run(file: Path, program: Program, words: str) -> None:
    trouble = look(file, program).trouble()
    assert trouble is not None and f"{file} {words}" in trouble


def test_one_that_cannot_be_asked_is_asked_again(file: Path) -> None:
    class Lost(Program):
        async def capture(self, argv: list[str], *, timeout: float) -> tuple[Ended, str]:
            raise Unavailable("ask", cause="the launcher is not there")

    features = look(file, Lost())
    assert features.trouble() is None and not features.recursive_read_only
    answer = json.dumps({"mountOptions": ["rro"]})
    asyncio.run(features.look(Program(features=(0, "", answer))))  # type: ignore[arg-type] # in the place of Commands
    assert features.recursive_read_only


def test_one_that_comes_changes_and_goes(file: Path) -> None:
    features = look(file, Program(features=(1, "", ""), version=(1, "broken", "")))
    assert "broken" in str(features.trouble())
    file.unlink()
    assert features.trouble() == f"{file}: No such file or directory"
    with pytest.raises(FailedPrecondition, match=r"use runtime handler x: .*No such file"):
        features.require("x")
    file.touch(0o755)
    os.utime(file, (1, 1))
    asyncio.run(features.look(Program(features=(0, "", "{}"))))  # type: ignore[arg-type] # in the place of Commands
    assert features.trouble() is None
    file.chmod(0o644)
    if os.geteuid() != 0 or not os.access(file, os.X_OK):
        assert features.trouble() == f"{file} is not executable"


# Who gets which


def pod(pid: NamespaceMode = NamespaceMode.CONTAINER) -> PodConfig:
    """A pod's configuration."""
    metadata = PodMetadata(name="p", uid="u", namespace="n", attempt=0)
    return PodConfig(metadata=metadata, security=PodSecurity(namespaces=NamespaceOptions(pid=pid)))


def handlers(run: Path, default: str = "builtin", **programs: HandlerConfig) -> Handlers:
    builtin: Any = SimpleNamespace(commands=None, hooked=SimpleNamespace(kept=list))
    return Handlers(builtin, RuntimeConfig(default_handler=default, handlers=programs), run)


def test_the_choice(file: Path, tmp_path: Path) -> None:
    here, gone = HandlerConfig(path=str(file)), HandlerConfig(path="/no/such")
    boxed = HandlerConfig(path=str(file), sandbox=True)
    known = handlers(tmp_path, here=here, gone=gone, boxed=boxed)
    assert [known.choose(name, pod()) for name in ("", "builtin", "here", "boxed")] == ["", "builtin", "here", "boxed"]
    assert handlers(tmp_path, "here", here=here).choose("", pod()) == "here"
    assert handlers(tmp_path, "here", here=here).choose("builtin", pod()) == "builtin"
    with pytest.raises(InvalidArgument, match=r"no runtime handler other .*builtin, here, gone, boxed"):
        known.choose("other", pod())
    with pytest.raises(FailedPrecondition, match="handler gone: /no/such: No such file"):
        known.choose("gone", pod())
    assert known.choose("here", pod(NamespaceMode.POD)) == "here"
    with pytest.raises(FailedPrecondition, match="cannot share a PID namespace"):
        known.choose("boxed", pod(NamespaceMode.POD))
    assert known.missing() == "gone: /no/such: No such file or directory"
    assert [item.name for item in known.abilities()] == ["here", "boxed"]


def test_who_owns_what_is_told_by_the_bundles(file: Path, tmp_path: Path) -> None:
    """Also one whose handler is not in the settings any more, and one that was cut off before anything was in it."""
    run = tmp_path / "run"
    for name, handler in (("c1", "here"), ("c2", "lost")):
        bundle = Bundle(run, name)
        bundle.make(handler)
        bundle.put_process(Process(4, 5))
    (run / "bundles" / "c3").mkdir()
    known = handlers(run, here=HandlerConfig(path=str(file)))
    assert known.bundles() == ["c1", "c2", "c3"]
    assert Bundle(run, "c2").handler() == "lost" and Bundle(run, "c3").handler() == ""
    assert Bundle(run, "c1").process() == Process(4, 5) and Bundle(run, "c3").process() is None
