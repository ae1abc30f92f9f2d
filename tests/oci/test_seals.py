"""A container has nothing to overwrite by /proc/self/exe (CVE-2019-5736), and a command's code is kept only as long as it is its sources'."""

from __future__ import annotations

import errno
import marshal
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare import __version__
from tare.oci import inspection, seals, stock
from tests.support.oci import SCRIPT, Bundle, Runtime, command, wait_for

pytestmark = pytest.mark.root
PACKAGE = Path(stock.__file__).parents[1]

STOLEN = """
import os, sys
with open("/out", "a") as out:
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try:
            os.open("/proc/self/exe", flags)
            out.write("opened ")
        except OSError as error:
            out.write(f"{error.errno} ")
"""


def test_the_waiting_process_cannot_be_written_through(tare: Runtime, bundle: Bundle) -> None:
    name = bundle.create(tare)
    exe = f"/proc/{tare.state(name)['pid']}/exe"
    assert os.statvfs(exe).f_flag & os.ST_RDONLY
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(OSError) as refused:
            os.open(exe, flags)
        assert refused.value.errno in (errno.EROFS, errno.ETXTBSY)
    assert refused.value.errno == errno.EROFS


def test_a_container_that_executes_it_cannot_write_to_it(tare: Runtime, bundle: Bundle) -> None:
    interpreter = Path(os.path.realpath(sys.executable))
    for library in ("/lib", "/usr/lib", "/lib64"):
        place = bundle.rootfs / library.strip("/")
        place.mkdir(parents=True)
        bundle.config["mounts"].append(
            {"destination": library, "type": "bind", "source": library, "options": ["rbind", "ro"]}
        )
    bundle.config["root"]["readonly"] = False
    (bundle.rootfs / "stolen.py").write_text(STOLEN)
    before = interpreter.read_bytes()
    bundle.write("/proc/self/exe", "-ISE", "/stolen.py")
    done = tare.call("run", "--bundle", str(bundle.path), tare.name_one(), check=False)
    assert (bundle.rootfs / "out").exists(), done.stderr
    said = (bundle.rootfs / "out").read_text()
    # While it runs the kernel says so first to who would only write; to who would cut it off it says that the mount is read-only.
    assert said.split() in ([str(errno.ETXTBSY), str(errno.EROFS)], [str(errno.EROFS)] * 2)
    assert interpreter.read_bytes() == before


def test_without_the_mount_it_starts_again_from_a_clone(tare: Runtime, bundle: Bundle) -> None:
    bundle.write("sleep", "1000")
    name = tare.name_one()
    words = " ".join(tare.argv("create", "--bundle", str(bundle.path), name))
    hidden = f"{seals.DIRECTORY}"
    script = f"mount -t tmpfs -o ro none {hidden} && exec {words}"
    with open(bundle.path / "output", "ab") as output:
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=30, check=True)
    assert os.statvfs(f"/proc/{tare.state(name)['pid']}/exe").f_flag & os.ST_RDONLY


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this interpreter's mount is going to be, in a directory of the test's own."""
    monkeypatch.setattr(seals, "DIRECTORY", str(tmp_path / "sealed"))
    found = Path(seals.folder_of(os.path.realpath(sys.executable))) / seals.INTERPRETER
    yield found
    while seals.mounted(str(found)):
        subprocess.run(["umount", str(found)], check=True)


def mounts(place: Path) -> list[str]:
    """The numbers of what is mounted there."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[0] for line in lines if line.split()[4] == str(place)]


def test_what_it_is_mounted_over_does_not_run(place: Path) -> None:
    """An empty file that may be executed is a script that does nothing, well."""
    place.parent.mkdir(parents=True)
    place.touch(mode=0o755)
    seals.keep(os.path.realpath(sys.executable))
    assert place.samefile(sys.executable)
    subprocess.run(["umount", str(place)], check=True)
    assert place.stat().st_size == 0
    done = subprocess.run(["sh", "-c", f"exec {place}"], capture_output=True, check=False)
    assert done.returncode == 126


def test_it_is_mounted_once_and_for_each_interpreter(place: Path) -> None:
    real = os.path.realpath(sys.executable)
    seals.keep(real)
    first = mounts(place)
    assert len(first) == 1
    seals.keep(real)
    assert mounts(place) == first
    assert seals.folder_of("/bin/sh") != seals.folder_of(real)


def test_code_is_kept_and_dropped_with_its_source(tmp_path: Path) -> None:
    source = tmp_path / "some.py"
    source.write_text("value = 1\n")
    entry = (str(source), stock.identity(str(source)), False, None)
    assert stock.fresh(entry)
    status = source.stat()
    source.write_text("value = 2\n")
    os.utime(
        source, ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # the same size and time: what tells them apart is ctime
    assert not stock.fresh(entry)
    source.unlink()
    assert not stock.fresh(entry)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The command, installed in a place of its own, whose sources may be changed."""
    library = tmp_path / "lib" / "python3" / "site-packages"
    shutil.copytree(PACKAGE, library / "tare", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))
    shutil.copy(SCRIPT, tmp_path / "bin" / "tare-oci")
    return tmp_path


def code_of(library: Path, kind: str = "look") -> Path:
    """The file of code of a package in this library."""
    return Path(f"{stock.DIRECTORY}/code-{sys.hexversion:x}-{kind}{str(library).replace('/', '-')}")


def kept(installed: Path) -> Path:
    """Its file of code."""
    return code_of(installed / "bin" / ".." / "lib" / "python3" / "site-packages")


def version(installed: Path) -> str:
    """What the command says it is."""
    argv = [str(installed / "bin" / "tare-oci"), "--version"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def test_code_is_not_kept_while_its_source_changes_and_not_used_after(installed: Path) -> None:
    try:
        assert version(installed) == f"tare-oci version {__version__}"
        assert not kept(installed).exists()  # the sources were written just now
        wait_for(lambda: (version(installed) and kept(installed).exists()) or None)
        for number in ("1", "22", "333"):  # of different lengths, for the sake of Python's own files of code
            source = installed / "lib" / "python3" / "site-packages" / "tare" / "__init__.py"
            source.write_text(f'__version__ = "{number}"\n')
            assert version(installed) == f"tare-oci version {number}"
    finally:
        kept(installed).unlink(missing_ok=True)


def test_commands_that_begin_together_leave_one_whole_file(installed: Path) -> None:
    argv = [str(installed / "bin" / "tare-oci"), "--version"]
    try:
        wait_for(lambda: (version(installed) and kept(installed).exists()) or None)
        whole = kept(installed).read_bytes()
        for _ in range(3):
            kept(installed).unlink()
            running = [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(4)]
            assert [process.wait() for process in running] == [0] * 4
            assert kept(installed).read_bytes() == whole
        assert [
            path for path in kept(installed).parent.iterdir() if path.name.startswith(f"{kept(installed).name}.")
        ] == []
    finally:
        kept(installed).unlink(missing_ok=True)


def test_a_damaged_file_of_code_costs_nothing_but_time(tare: Runtime) -> None:
    file = code_of(PACKAGE.parent)
    values: tuple[Any, ...] = (7, [], {}, {stock.__name__: ("x", (0, 0, 0, 0), False, None)})
    whole = wait_for(lambda: (tare.call("list") and file.exists() and file.read_bytes()) or None)
    old = marshal.loads(whole)
    path, _, *more = old[stock.__name__]
    values = (*values, {**old, stock.__name__: (path, (0, 0, 0, 0), *more)})
    for damage in (b"", b"\xff\xff\xff\xff", os.urandom(1000), whole[:-1], *(marshal.dumps(value) for value in values)):
        file.write_bytes(damage)
        assert tare.call("list", "--quiet").stdout == ""
    wait_for(lambda: (tare.call("list") and inspection.__name__ in marshal.loads(file.read_bytes())) or None)


def test_what_few_need_is_not_kept(tare: Runtime, bundle: Bundle) -> None:
    """All of it is read each time."""
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    bundle.output(tare, "true")
    file = code_of(PACKAGE.parent, "make")
    entries = wait_for(
        lambda: (bundle.output(tare, "true") == "" and file.exists() and marshal.loads(file.read_bytes())) or None
    )
    assert {"tare", "tare.oci.creating", "tare.launch.steps", "_ctypes"} <= entries.keys()
    assert not [name for name in entries if name.startswith("tare.runtime")] and "re" not in entries


def test_nobody_elses_file_of_code_is_believed(installed: Path) -> None:
    try:
        wait_for(lambda: (version(installed) and kept(installed).exists()) or None)
        marked = marshal.loads(kept(installed).read_bytes())
        evil = compile("print('evil')", "evil", "exec")
        marked[stock.__name__] = (*marked[stock.__name__][:3], evil)
        kept(installed).write_bytes(marshal.dumps(marked))
        os.chown(kept(installed), 1000, 1000)
        assert version(installed) == f"tare-oci version {__version__}"
    finally:
        kept(installed).unlink(missing_ok=True)


def test_the_script_is_found_through_links(tare: Runtime, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    first, second = tmp_path / "bin" / "runc", tmp_path / "other"
    first.symlink_to(command("tare")[0])
    second.symlink_to("bin/runc")
    for path in (first, second):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("tare-oci version ")
