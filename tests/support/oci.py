"""Bundles, and OCI runtimes to run them: Tare's command line, and those of others that can be its oracle on this machine.

A `Runtime` is called with the words of runc's command line. Its containers are in a directory of the test's own, and what is
left of them when a test ends is deleted by force. crun refuses a machine with cgroup v1 and v2 side by side, so it is an
oracle in a guest with v2 alone.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tare.oci import templates

T = TypeVar("T")
SCRIPT = Path(__file__).parents[2] / "bin" / "tare-oci"
BUSYBOX = "/bin/busybox"
SECONDS = 20.0
V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
ORACLES = ("tare", "runc", *(["crun"] if V2 else []))


def command(name: str) -> list[str]:
    """What starts a runtime."""
    if name != "tare":
        return [shutil.which(name) or f"/usr/sbin/{name}"]
    installed = Path(sys.prefix) / "bin" / "tare-oci"
    return [str(installed if installed.exists() else SCRIPT)]


class Runtime:
    """One runtime, with a root directory of its own."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self.made: list[str] = []

    def argv(self, *words: str) -> list[str]:
        """A call's words."""
        return [*command(self.name), "--root", str(self.root), *words]

    def call(
        self, *words: str, check: bool = True, stdin: str | None = None, cwd: Path | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end. With `check` it must succeed."""
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        done = subprocess.run(
            self.argv(*words), capture_output=True, text=True, timeout=SECONDS, check=False, cwd=cwd, **given, **more
        )
        if check:
            assert done.returncode == 0, (self.name, words, done.returncode, done.stdout, done.stderr)
        return done

    def quietly(self, *words: str, cwd: Path) -> None:
        """Run what leaves a process behind, which holds the streams that it was given: a file, not a pipe that somebody waits for."""
        with open(cwd / "output", "ab") as output:
            done = subprocess.run(
                self.argv(*words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=SECONDS,
                check=False,
                cwd=cwd,
            )
        assert done.returncode == 0, (self.name, words, (cwd / "output").read_text())

    def name_one(self) -> str:
        """A container ID of nobody's."""
        made = f"test-{uuid.uuid4().hex[:12]}"
        self.made.append(made)
        return made

    def state(self, container: str) -> dict[str, Any]:
        """What `state` prints."""
        found: dict[str, Any] = json.loads(self.call("state", container).stdout)
        return found

    def until(self, container: str, status: str) -> dict[str, Any]:
        """Its state, once that is this one."""
        return wait_for(lambda: found if (found := self.state(container))["status"] == status else None)

    def close(self) -> None:
        """Delete what is left."""
        for container in self.made:
            self.call("delete", "--force", container, check=False)


class Bundle:
    """A bundle whose configuration is `spec`'s, with busybox as its root, to be changed before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rootfs = path / "rootfs"
        self.config = copy.deepcopy(templates.spec())
        self.config["ociVersion"] = "1.0.2"  # the newest that crun 1.8 knows
        self.process["terminal"] = False
        for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "mnt"):
            (self.rootfs / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.rootfs / "bin")
        listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
        for applet in listed:
            if applet != "busybox":
                (self.rootfs / "bin" / applet).symlink_to("busybox")
        (self.rootfs / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")

    @property
    def process(self) -> dict[str, Any]:
        """process."""
        found: dict[str, Any] = self.config["process"]
        return found

    @property
    def linux(self) -> dict[str, Any]:
        """linux."""
        found: dict[str, Any] = self.config["linux"]
        return found

    def write(self, *args: str) -> None:
        """Write config.json, with these as process.args."""
        if args:
            self.process["args"] = list(args)
        (self.path / "config.json").write_text(json.dumps(self.config))

    def shell(self, runtime: Runtime, script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a script in a container of this bundle, to its end."""
        self.write("sh", "-c", script)
        return runtime.call("run", "--bundle", str(self.path), runtime.name_one(), check=check)

    def output(self, runtime: Runtime, script: str) -> str:
        """What a script in a container of this bundle prints."""
        return self.shell(runtime, script).stdout.strip()

    def start(self, runtime: Runtime, *args: str) -> str:
        """A container in which a program runs."""
        self.write(*(args or ("sleep", "1000")))
        name = runtime.name_one()
        runtime.quietly("run", "--detach", "--bundle", str(self.path), name, cwd=self.path)
        return name

    def create(self, runtime: Runtime, *args: str) -> str:
        """A container that is created, and not started."""
        self.write(*(args or ("sleep", "1000")))
        name = runtime.name_one()
        runtime.quietly("create", "--bundle", str(self.path), name, cwd=self.path)
        return name


def wait_for(look: Callable[[], T | None], seconds: float = SECONDS) -> T:
    """What `look` finds, once it does."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.01)
    return found
