"""Boots the guest, shows what its command writes while it writes it, and ends it.

    this process ── spawns ──► QEMU          virtio-serial port `tare.output` = a socket to us; kernel console = JOB/console
                └── spawns ──► virtiofsd     the whole tree of this machine, read-only (`share`)

Emulation (TCG) alone: it works everywhere. Both children die with this process, however that ends, and run with less priority than the rest.
What the guest does is in `init.sh` and `run.sh`; where its kernel comes from, in `kernel`.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scripts.vm.kernel import Kernel
from scripts.vm.output import Output

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MEMORY_MB = 2048
DISK_GB = 8
CPUS = 2
NICENESS = 10
END_SECONDS = 10
LAST_LINES = 40
JOB = "job-"
UNUSABLE = re.compile(r"[\s,%$'\"\\]")
GENERATED = frozenset({"build", "dist"})


CONFINEMENTS = {
    "": "",
    "selinux": "lsm=landlock,lockdown,yama,integrity,selinux,bpf",
    "apparmor": "lsm=landlock,lockdown,yama,integrity,apparmor,bpf",
}
"""Kernel options, by the security module that they bring."""


class GuestFailed(Exception):
    """The guest did not tell how its command ended. Says why, and what its console showed last."""


class GuestImpossible(GuestFailed):
    """A directory's name cannot be handed to the guest."""


class GuestTimedOut(GuestFailed):
    """The guest was ended since its time was over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What to boot: `script` is run by sh, in the guest, as root; `append` is added to the kernel's command line.

    `confinement` is the security module that confines processes, one of CONFINEMENTS; "" is the kernel's own choice. `policy` is what
    SELinux enforces, as a directory for /etc/selinux.
    """

    kernel: Kernel
    script: str
    systemd: bool
    confinement: str = ""
    policy: Path | None = None
    append: str = ""


def check_place(what: str, path: Path) -> None:
    """Raise GuestImpossible for a directory that QEMU's options, the kernel's command line or the guest's mounts have no way to name."""
    if UNUSABLE.search(str(path)):
        raise GuestImpossible(
            f"{what} is {path}: white space, commas, quotes, '%', '$' and '\\' in it do not get to the guest"
        )
    if path.is_relative_to("/mnt"):
        raise GuestImpossible(f"{what} is {path}: the guest has something else on /mnt")


def arguments(guest: Guest, job: Path, share: int, output: int) -> list[str]:
    """QEMU's command line. `share` is a connection to virtiofsd, `output` is the other end of what we read."""
    kind = "systemd" if guest.systemd else "plain"
    root = "root=hostroot rootfstype=virtiofs ro cgroup_no_v1=all"
    # An emulator has translated a program's code before only if it lies where it lay before; and there is nothing to mitigate.
    quick = "norandmaps mitigations=off"
    modules = CONFINEMENTS[guest.confinement]
    options = f"console=ttyS0 panic=-1 quiet {root} {quick} {modules} {guest.append}"
    words = f"{guest.kernel.modules} {job} {REPOSITORY} {kind} {guest.policy or ''}"
    kernel = f"{options} init=/bin/sh -- {HERE}/init.sh {words}"
    # One thread for all CPUs: with one each, a kernel that patches its own code (a static key, as for the first CPU quota) while another
    # CPU runs it may die of it.
    accelerator = "tcg,thread=single,tb-size=512"
    memory = f"memory-backend-memfd,id=memory,size={MEMORY_MB}M,share=on"
    return [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35,memory-backend=memory", "-accel", accelerator, "-cpu", "max"),
        *("-smp", str(CPUS), "-m", f"{MEMORY_MB}M", "-object", memory),
        *("-chardev", f"socket,id=share,fd={share}", "-device", "vhost-user-fs-pci,chardev=share,tag=hostroot"),
        *("-chardev", f"socket,id=output,fd={output}", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=output,name=tare.output"),
        *("-drive", f"if=none,id=disk,file={job}/disk,format=raw,cache=unsafe,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=disk", "-serial", f"file:{job}/console"),
        *("-kernel", str(guest.kernel.image), "-append", kernel),
    ]


def run(guest: Guest, work: Path, seconds: float, show: Callable[[bytes], None]) -> int:
    """Boot the guest, hand its command's output to `show` as it comes, and return its exit code.

    A directory for this guest is made below `work` and removed. Raises GuestTimedOut after `seconds`, GuestFailed if it ended untold.
    """
    mark = f"tare-guest-{uuid.uuid4().hex}"
    sweep(work)
    with tempfile.TemporaryDirectory(dir=work, prefix=f"{JOB}{os.getpid()}-") as directory:
        job = Path(directory)
        (job / "command").write_text(guest.script)
        (job / "mark").write_text(f"{mark}\n")
        pack(REPOSITORY, job / "project.tar")
        make_disk(job / "disk")
        with booted(guest, job) as stream:
            try:
                return follow(stream, Output(mark), seconds, show)
            except GuestFailed as error:
                raise type(error)(f"{error}\n{last_words(job)}") from error


def sweep(work: Path) -> None:
    """Remove the directories of guests whose caller was killed."""
    for directory in work.glob(f"{JOB}*"):
        if not Path("/proc", directory.name.split("-")[1]).exists():
            shutil.rmtree(directory, ignore_errors=True)


def pack(repository: Path, archive: Path) -> None:
    """The project's files as they are now, since what is written to them while the guest runs must not reach it.

    Dot directories stay out: the guest finds the virtual environment in the shared tree.
    """
    with tarfile.open(archive, "w") as tar:
        for top in sorted(repository.iterdir()):
            if top.name.startswith(".") or top.name in GENERATED:
                continue
            for path in (top, *sorted(top.rglob("*"))):
                with suppress(FileNotFoundError):  # an interpreter's half-written cache, renamed meanwhile
                    tar.add(path, arcname=str(path.relative_to("/")), recursive=False)


def make_disk(path: Path) -> None:
    """An empty ext4 file system, which takes room only as it is written to."""
    with path.open("wb") as file:
        file.truncate(DISK_GB << 30)
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-E", options, str(path)], check=True, stdin=subprocess.DEVNULL)


@contextmanager
def booted(guest: Guest, job: Path) -> Iterator[socket.socket]:
    """A guest that boots: a socket to read what its command writes. It is ended with the context."""
    with ExitStack() as stack:
        errors = stack.enter_context((job / "errors").open("ab"))
        share = stack.enter_context(socket.socket(socket.AF_UNIX))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")
            listener.listen(1)
            share.connect(listener.getsockname())
            sharing = [sys.executable, "-m", "scripts.vm.share", str(listener.fileno())]
            stack.enter_context(child(sharing, (listener.fileno(),), errors))
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            descriptors = (share.fileno(), theirs.fileno())
            stack.enter_context(child(arguments(guest, job, *descriptors), descriptors, errors))
        yield ours


@contextmanager
def child(command: Sequence[str], descriptors: Sequence[int], errors: IO[bytes]) -> Iterator[None]:
    """A process that gets descriptors besides its streams, does not outlive this one, and has ended with the context."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "nice", "-n", str(NICENESS), *command],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=descriptors,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def follow(stream: socket.socket, output: Output, seconds: float, show: Callable[[bytes], None]) -> int:
    """Show what comes until it says how the command ended. Raises GuestTimedOut, and GuestFailed when nothing more comes."""
    deadline = time.monotonic() + seconds
    while output.code is None:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            show(output.rest())
            raise GuestTimedOut(f"the command was not done after {seconds:.0f} s")
        data = stream.recv(1 << 16)
        if not data:
            show(output.rest())
            raise GuestFailed("the guest ended before its command did")
        show(output.feed(data))
    return output.code


def last_words(job: Path) -> str:
    """The end of the guest's console, and what QEMU and virtiofsd said."""
    parts = []
    for name in ("console", "errors"):
        path = job / name
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        parts += [f"{name}:", *lines[-LAST_LINES:]]
    return "\n".join(parts)
