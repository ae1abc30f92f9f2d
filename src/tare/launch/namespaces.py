"""The child that makes a pod's namespaces and pins them by bind mounts, so that they outlive every process.

It sends back a netlink socket that lives in the new network namespace, by which the daemon sets up addresses without
entering it. Where the pod's containers share one PID namespace, this child is its PID 1: it stays to reap, with nothing.
"""

from __future__ import annotations

import os
import signal
import socket

from tare.launch import credentials, gates, linux, mounts, packets, plan, seccomp, steps, userns, wire
from tare.launch.machine import Machine

DOING = "make the pod's namespaces"
UNMAPPED = 0xFFFFFFFE - 1  # a uid that no mapping and no passwd file uses; −1 and −2 have meanings


def main(status: socket.socket, plan_fd: int) -> None:
    """Make, pin, answer; end, or stay as PID 1. The plan: `steps`, `pins` [(kind, file)], `network`, `stay`, `proc` (b"": none)."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        machine = Machine(status)
        steps.run(machine, steps.resolve(work["steps"]))
        pin(b"/proc/self", work)
        if work.get("proc"):
            pin_proc(work["proc"])
        answer(machine, work, UNMAPPED, UNMAPPED)
    except OSError as error:
        steps.fail(status, DOING, error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, DOING)


def with_owner(status: socket.socket, plan_fd: int, flags: int) -> None:
    """The same with a user namespace that owns the others: this process stays outside, to write its maps and to pin; its child is inside.

        outside                     inside
           ├─ GO (the maps are there) ──►│ becomes root, walks the steps
           │◄──────────────────── READY ─┤
           ├─ GO (all is pinned) ───────►│ answers the launcher

    The plan has also `uids`, `gids` (`userns`) and `nobody`, the IDs of a PID 1 that stays.
    """
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        machine = Machine(status)
        credentials.hide(machine)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        pid, pidfd = linux.clone3(flags & ~linux.CLONE_NEWIPC | linux.CLONE_PARENT)
        if pid == 0:
            ours.close()
            inhabit(machine, theirs, work, flags)
        theirs.close()
        packets.send(status, wire.CHILD, 0, (pid,), (pidfd,))
        entry = b"/proc/%d" % pid
        userns.write_maps(machine, entry, work["uids"], work["gids"])
        gates.say(ours, wire.GO)
        gates.until(ours, wire.READY)
        pin(entry, work)
        gates.say(ours, wire.GO)
        os._exit(0)
    except OSError as error:
        steps.fail(status, DOING, error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, DOING)


def inhabit(machine: Machine, maker: socket.socket, work: plan.Plan, flags: int) -> None:
    """The child inside. An IPC namespace is its maker's, and so made by root of the user namespace."""
    gates.until(maker, wire.GO)
    userns.become_root(machine)
    if flags & linux.CLONE_NEWIPC:
        linux.unshare(linux.CLONE_NEWIPC)
    steps.run(machine, steps.resolve(work["steps"]))
    gates.until_go(maker, wire.READY)
    maker.close()
    answer(machine, work, *work["nobody"])


def pin(entry: bytes, work: plan.Plan) -> None:
    """Bind a process's namespaces to files."""
    for kind, path in work["pins"]:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        linux.mount(entry + b"/ns/" + kind, path, None, linux.MS_BIND)


def pin_proc(path: bytes) -> None:
    """A /proc that shows this process's PID namespace, in which nobody else is yet, mounted for who is never in it."""
    os.mkdir(path, 0o700)
    attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC
    tree = mounts.new_filesystem(b"proc", attributes, ((b"source", b"proc"),))
    linux.move_mount(tree, linux.AT_FDCWD, path)
    os.close(tree)


def answer(machine: Machine, work: plan.Plan, uid: int, gid: int) -> None:
    """Tell the launcher that all is there; end, or stay."""
    fds = []
    if work["network"]:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        fds.append(netlink.fileno())
    if work["stay"]:
        become_nobody(machine, uid, gid)
    packets.send(machine.status, wire.OK, 0, (int(work["stay"]),), fds)
    if work["stay"]:
        only_reap()
    os._exit(0)


def become_nobody(machine: Machine, uid: int, gid: int) -> None:
    """An empty read-only root, an ID that nobody else uses, no capability, no keyring of the node's, not dumpable."""
    linux.set_name(b"tare-pod")
    credentials.session(machine)
    credentials.keyring(machine)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount_setattr(linux.AT_FDCWD, b"/", linux.AT_RECURSIVE, propagation=linux.MS_PRIVATE)
    linux.mount(
        b"tmpfs", b"/proc", b"tmpfs", linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, b"size=0"
    )
    os.chdir(b"/proc")
    linux.pivot_root(b".", b".")
    linux.umount(b".", linux.MNT_DETACH)
    os.chdir(b"/")
    for number in range(credentials.LAST_CAP + 1):
        try:
            linux.prctl(linux.PR_CAPBSET_DROP, number)
        except OSError:
            break  # past the last one that this kernel knows
    os.setgroups(())
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def only_reap() -> None:
    """Without a descriptor, and under a filter that allows nothing else: wait for whoever is left to PID 1, for ever."""
    program = linux.SeccompProgram(seccomp.reaper_program())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    linux.close_range(0)
    if program.load():
        os._exit(1)
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            continue
