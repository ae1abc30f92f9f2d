"""What keeper and launcher run on: a copy of the interpreter that nothing can overwrite, alone with the modules they need."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tare.errors import InternalError
from tare.handlers.interpreter import start_keeper
from tare.launch.plan import SEALS
from tests.support.launch import Launch, in_launch
from tests.support.mounts import mounted_tmpfs

pytestmark = pytest.mark.root

# In a PID namespace of its own, where the sysctl is: start a keeper, show what it runs on and what happens to a write, end it.
FORBIDDEN = """
import os, sys, time
from pathlib import Path
from tare.handlers.interpreter import start_keeper
from tare.launch import packets, wire
Path("/proc/sys/vm/memfd_noexec").write_text(sys.argv[2])
run = Path(sys.argv[1])
for name in ("tasks", "exits", "pods", "containers", "loggers", "rootfs"):
    (run / name).mkdir()
start_keeper(run)
for _ in range(1000):
    try:
        keeper = packets.connect(str(run / "keeper.sock"))
        break
    except OSError:
        time.sleep(0.005)
packets.send(keeper, wire.HELLO, 1)
fields = packets.receive(keeper)[2]
print(os.readlink(f"/proc/{fields[1]}/exe"))
try:
    os.open(f"/proc/{fields[2]}/exe", os.O_WRONLY)
except OSError as error:
    print(error.strerror)
packets.send(keeper, wire.QUIT, 1)
print(packets.receive(keeper)[0])
"""


def test_the_image_is_sealed(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for name in ("keeper", "launcher"):
            exe = f"/proc/{launch.pid_of(name)}/exe"
            assert os.readlink(exe) == "/memfd:tare (deleted)"
            fd = os.open(exe, os.O_RDONLY)
            try:
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
                real = Path(sys.executable).resolve()
                assert os.fstat(fd).st_size == real.stat().st_size
                assert os.pread(fd, 1 << 20, 0) == real.read_bytes()[: 1 << 20]
            finally:
                os.close(fd)
            with pytest.raises(OSError):
                os.close(os.open(exe, os.O_WRONLY))

    in_launch(tmp_path, body)


def test_nothing_of_the_daemon_is_inherited(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for name in ("keeper", "launcher"):
            entry = Path(f"/proc/{launch.pid_of(name)}")
            assert (entry / "environ").read_bytes() == b"PATH=/usr/sbin:/usr/bin:/sbin:/bin\0"
            assert (entry / "cwd").readlink() == Path("/")
            targets = {fd.name: str(fd.readlink()) for fd in (entry / "fd").iterdir()}
            log = str(launch.run_directory / "launch.log")
            assert (targets["0"], targets["1"], targets["2"]) == ("/dev/null", log, log)
            kinds = {target.partition(":")[0] for number, target in targets.items() if int(number) > 2}
            assert kinds <= {"socket", "pipe", "anon_inode", "pid", str(launch.run_directory / "keeper.lock")}, targets
            words = (entry / "cmdline").read_bytes().split(b"\0")
            assert words[1:6] == [b"-I", b"-S", b"-E", b"-B", b"-c"]

    async def with_open_files(launch: Launch) -> None:
        await body(launch)

    secret = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(secret, True)
    try:
        in_launch(tmp_path, with_open_files)
    finally:
        os.close(secret)


def test_no_third_party_module_and_no_heavy_one(tmp_path: Path) -> None:
    """What is mapped and what was imported: the C modules show in the maps, the rest in an image started the same way."""

    async def body(launch: Launch) -> None:
        maps = Path(f"/proc/{launch.pid_of('launcher')}/maps").read_text()
        assert "site-packages" not in maps and "libssl" not in maps and "libsqlite" not in maps
        rollup = Path(f"/proc/{launch.pid_of('launcher')}/smaps_rollup").read_text()
        private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
        assert private < 6000  # kB

    in_launch(tmp_path, body)
    package = Path(start_keeper.__code__.co_filename).parents[2]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import tare.launch.keeper; print(*sorted(sys.modules))"
    command = [str(Path(sys.executable).resolve()), "-I", "-S", "-E", "-B", "-c", code, str(package)]
    modules = set(subprocess.check_output(command, text=True).split())
    heavy = {
        "asyncio",
        "threading",
        "logging",
        "subprocess",
        "typing",
        "dataclasses",
        "pathlib",
        "json",
        "re",
        "ssl",
        "tempfile",
    }
    assert not modules & heavy
    ours = {module for module in modules if module.startswith("tare")}
    assert all(module == "tare" or module.startswith("tare.launch") for module in ours), ours


NAME = Path(sys.executable).resolve().name


@pytest.mark.parametrize(
    ("setting", "image", "words"),
    [("1", "/memfd:tare (deleted)", "Text file busy"), ("2", f"/{NAME}", "Read-only file system")],
)
def test_a_kernel_that_forbids_executable_memory(tmp_path: Path, setting: str, image: str, words: str) -> None:
    """The sysctl vm.memfd_noexec: 1 wants it asked for, 2 forbids it; then the interpreter is seen through a read-only overlay."""
    environment = os.environ | {"PYTHONPATH": str(Path(start_keeper.__code__.co_filename).parents[2])}
    command = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", sys.executable, "-c", FORBIDDEN]
    result = subprocess.run(
        [*command, str(tmp_path), setting], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [image, words, "1"]


def test_memory_that_cannot_be_sealed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to seal what it holds pages of, here what is mapped for writing; then too the overlay serves."""
    create = os.memfd_create
    held: list[mmap.mmap] = []

    def create_held(name: str, flags: int) -> int:
        fd = create(name, flags)
        if name == "tare":
            os.ftruncate(fd, mmap.PAGESIZE)
            held.append(mmap.mmap(fd, mmap.PAGESIZE))
        return fd

    monkeypatch.setattr(os, "memfd_create", create_held)

    async def body(launch: Launch) -> None:
        assert held
        for name in ("keeper", "launcher"):
            exe = f"/proc/{launch.pid_of(name)}/exe"
            assert os.readlink(exe) == f"/{NAME}"
            with pytest.raises(OSError, match="Read-only file system"):
                os.close(os.open(exe, os.O_WRONLY))

    try:
        in_launch(tmp_path, body)
    finally:
        for memory in held:
            memory.close()


def test_a_start_that_cannot_be(tmp_path: Path) -> None:
    """The reason is in the error or in the log that it names."""
    with mounted_tmpfs(tmp_path / "run") as run, pytest.raises(InternalError) as caught:
        (run / "launch.log").mkdir()
        start_keeper(run)
    assert str(caught.value) == f"start the keeper: Is a directory: {run}/launch.log"
