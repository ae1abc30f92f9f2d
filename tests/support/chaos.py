"""A random workload under random kills of Tare's own processes, with what must hold whatever happens.

    workers   pods whose containers write numbered lines and end with a planned code, execs in them, pulls and removals of an image
    killer    every now and then: SIGKILL for daemon, launcher, a logger, the keeper, or several of them; the daemon is started again

Each worker draws what it does from the seed and its own number, so that a seed gives the same plans again (not the same moments).
A call that fails because somebody was killed is made again, as a kubelet does.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.node import Node

R = TypeVar("R")
AGAIN = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
RETRY_SECONDS = 60.0
TOGETHER_NS = 10 * 10**9
LOG_SECONDS = 20.0  # for the lines of a container that has ended, after its logger was killed
KINDS = {"launcher": "tare-launcher", "logger": "tare-logger", "keeper": "tare-keeper"}
VICTIMS = (
    ("daemon",),
    ("daemon",),
    ("launcher",),
    ("launcher",),
    ("logger",),
    ("logger",),
    ("keeper",),
    ("daemon", "launcher"),
    ("launcher", "logger"),
    ("daemon", "logger"),
    ("keeper", "launcher"),
    ("daemon", "keeper", "launcher", "logger"),
)
PADDINGS = (0, 0, 10, 200, 5000, 20_000)


@dataclass(frozen=True, slots=True)
class Job:
    """What a container does: so many numbered lines, each so long, a pause after some of them, and a code."""

    lines: int
    padding: int
    pause_every: int
    code: int
    stopped: bool  # it goes on for ever after its lines, and is stopped

    @property
    def script(self) -> str:
        """For a shell."""
        pause = f"[ $((i % {self.pause_every})) -ne 0 ] || sleep 0.05" if self.pause_every else ":"
        last = "exec sleep 100000" if self.stopped else f"exit {self.code}"
        pad = f"p=$(head -c {self.padding} /dev/zero | tr '\\0' x)" if self.padding else "p="
        return (
            f"{pad}; i=0; while [ $i -lt {self.lines} ]; do echo $i $p; i=$((i+1)); {pause}; done; echo end >&2; {last}"
        )


def job(chance: random.Random) -> Job:
    """One at random."""
    padding = chance.choice(PADDINGS)
    return Job(
        lines=chance.randrange(1, 40 if padding > 1000 else 400),
        padding=padding,
        pause_every=chance.choice((0, 3, 20, 50)),
        code=chance.choice((0, 0, 1, 7, 200)),
        stopped=chance.random() < 0.3,
    )


def in_order(lines: list[bytes], wanted: list[bytes]) -> bool:
    """Whether these are some of the wanted, in their order, none twice."""
    rest = iter(wanted)
    return all(line in rest for line in lines)


def clock(at: int) -> str:
    """Of a time in ns since the epoch, what tells moments of a run apart: seconds of its hour."""
    return f"{at / 1e9 % 3600:.3f}"


def written(path: Path) -> dict[str, list[bytes]]:
    """The whole lines of each stream in a CRI log, partial ones put together."""
    found: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    open_ends = {"stdout": b"", "stderr": b""}
    for line in path.read_bytes().split(b"\n")[:-1]:
        _, stream, tag, text = line.split(b" ", 3)
        name = stream.decode()
        open_ends[name] += text
        if tag == b"F":
            found[name].append(open_ends[name])
            open_ends[name] = b""
    return found


@dataclass
class Chaos:
    """One run. What does not hold is noted in `broken`, with the seed's worker that saw it."""

    node: Node
    seed: int
    seconds: float
    broken: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    retried: set[str] = field(default_factory=set)  # pods of containers whose start was asked for again
    kills: dict[str, list[int]] = field(default_factory=dict)  # when, in ns since the epoch

    def run(self, workers: int) -> None:
        """All of it, to its end; the node runs afterwards."""
        self.until = time.monotonic() + self.seconds
        self.lock = threading.Lock()
        threads = [threading.Thread(target=self.guard, args=(f"worker {n}", self.work, n)) for n in range(workers)]
        threads.append(threading.Thread(target=self.guard, args=("images", self.images)))
        killer = threading.Thread(target=self.guard, args=("killer", self.kill))
        for thread in (*threads, killer):
            thread.start()
        for thread in (*threads, killer):
            thread.join()

    def guard(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """What goes wrong in a thread is part of the result."""
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - it ends this thread, and the test
            self.note(f"{name}: {type(error).__name__}: {error}")

    def told(self) -> str:
        """The kills, with their times, newest last."""
        found = sorted((at, victim) for victim, times in self.kills.items() for at in times)
        return ", ".join(f"{clock(at)} {victim}" for at, victim in found)

    def note(self, words: str) -> None:
        with self.lock:
            self.broken.append(words)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    # Calls

    def again(self, call: Callable[[], R], settled: Callable[[CallFailed], R | None] | None = None) -> R:
        """What a call answers, made again while it fails for want of a process. `settled` may know the answer from another failure."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                return call()
            except CallFailed as error:
                known = settled(error) if settled is not None else None
                if known is not None:
                    return known
                if error.status not in AGAIN or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    # Workers

    def work(self, number: int) -> None:
        """Pod after pod."""
        chance = random.Random(f"{self.seed}-{number}")
        turn = 0
        while time.monotonic() < self.until and not self.broken:
            name = f"chaos-{number}-{turn}"
            self.pod(name, chance)
            turn += 1

    def pod(self, name: str, chance: random.Random) -> None:
        """A pod from its making to its removal."""
        node = self.node
        config = node.pod_config(name)
        pod = self.again(lambda: node.run_pod(config))
        jobs = {f"c{index}": job(chance) for index in range(chance.choice((1, 1, 2)))}
        containers = {key: self.start(pod, name, key, task) for key, task in jobs.items()}
        for _ in range(chance.randrange(4)):
            self.exec(containers[chance.choice(sorted(jobs))], chance.randrange(100))
        for key, task in jobs.items():
            self.finish(name, containers[key], task)
        if chance.random() < 0.5:
            self.again(lambda: node.stop_pod(pod))
        self.again(lambda: node.remove_pod(pod))
        self.count("pods")

    def start(self, pod: str, name: str, key: str, task: Job) -> str:
        """A container that runs, or has run."""
        node = self.node
        config = node.container_config(key, "sh", "-c", task.script)
        container = self.again(lambda: node.create(pod, config))

        def runs(error: CallFailed) -> str | None:
            """An earlier call may have started it."""
            self.retried.add(name)
            if error.status != "FAILED_PRECONDITION":
                return None
            state = self.again(lambda: node.status(container)).state
            return container if state in (pb.CONTAINER_RUNNING, pb.CONTAINER_EXITED) else None

        return self.again(lambda: node.start(container), runs)

    def exec(self, container: str, number: int) -> None:
        """A command's output and code are its own, unless the container has ended, or somebody was killed over it."""
        node = self.node

        def over(error: CallFailed) -> pb.ExecSyncResponse | None:
            """The container has ended, or is about to be known as that."""
            if error.status in AGAIN:
                return None
            deadline = time.monotonic() + 5.0
            while self.again(lambda: node.status(container)).state == pb.CONTAINER_RUNNING:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)
            return pb.ExecSyncResponse()

        answer = self.again(lambda: node.exec(container, "sh", "-c", f"echo {number}; exit {number}"), over)
        if answer.stdout:
            self.count("execs")
            told = (answer.stdout, answer.exit_code)
            # Its process may have been killed with the container, after it wrote.
            if told not in ((f"{number}\n".encode(), number), (f"{number}\n".encode(), 137)):
                self.note(f"exec in {container} answered {told}, not {number}")

    def finish(self, pod: str, container: str, task: Job) -> None:
        """Its end, as planned; and its log, whole."""
        node = self.node
        if task.stopped:
            self.lines(pod, container, task)
            self.again(lambda: node.stop(container, timeout=0))
        deadline = time.monotonic() + RETRY_SECONDS
        while (status := self.again(lambda: node.status(container))).state != pb.CONTAINER_EXITED:
            assert time.monotonic() < deadline, f"container {container} of {pod} does not end"
            time.sleep(0.05)
        code = 137 if task.stopped else task.code
        told = (status.exit_code, status.reason)
        wanted = (code, "Completed" if code == 0 else "Error")
        unknown = told == (255, "Unknown") and self.may_be_unknown(status)
        if told != wanted and not unknown:
            self.note(f"container {container} of {pod} ended with {told}, not {wanted}: {status.message}")
        self.count("unknown ends" if unknown else "ends")
        self.check_log(pod, Path(status.log_path), task, status.finished_at)

    def may_be_unknown(self, status: pb.ContainerStatus) -> bool:
        """Whether nobody was left to wait for it: a keeper was killed, and the daemon, which would have asked the kernel, while it ran."""
        daemon = any(status.started_at <= at <= status.finished_at for at in self.kills.get("daemon", ()))
        return daemon and any(at <= status.finished_at for at in self.kills.get("keeper", ()))

    def holders_lost(self, ended_at: int) -> bool:
        """Whether both that hold what a container has written and nobody has logged, logger and keeper, were killed not long before its end,
        one before the other was replaced. Its last copies go with the container then."""
        kills = ([at for at in self.kills.get(kind, ()) if at <= ended_at] for kind in ("logger", "keeper"))
        return any(abs(first - second) < TOGETHER_NS for first, second in itertools.product(*kills))

    def check_log(self, pod: str, path: Path, task: Job, ended_at: int) -> None:
        """All lines, in order, none twice. A logger that was killed as the container ended is followed by one that drains it."""
        wanted = [(b"%d %s" % (index, b"x" * task.padding)).rstrip() for index in range(task.lines)]
        deadline = time.monotonic() + LOG_SECONDS
        late = False
        while True:
            found = written(path)
            lines = [line.rstrip() for line in found["stdout"]]
            if (lines, found["stderr"]) == (wanted, [b"end"]):
                self.count("late logs" if late else "logs")
                return
            if pod in self.retried and len(lines) > len(wanted) and lines[-len(wanted) :] == wanted:
                self.count("runs after one that was lost, with its launcher, as it began")
                return
            if time.monotonic() > deadline and self.holders_lost(ended_at) and in_order(lines, wanted):
                self.count("logs cut, with nobody left to hold them")
                return
            if time.monotonic() > deadline or (lines != wanted[: len(lines)] and not self.holders_lost(ended_at)):
                numbers = [line.split(b" ")[0].decode() for line in lines]
                at = next((i for i, (a, b) in enumerate(zip(lines, wanted, strict=False)) if a != b), len(lines))
                around = numbers[max(0, at - 2) : at + 3]
                what = f"{len(lines)} of {task.lines} lines, wrong from line {at} on: {around}"
                self.note(f"{path} of {pod}, ended at {clock(ended_at)}: {what}")
                return
            late = True
            time.sleep(0.1)

    def lines(self, pod: str, container: str, task: Job) -> None:
        """Until it has written all its lines."""
        deadline = time.monotonic() + RETRY_SECONDS
        path = Path(self.again(lambda: self.node.status(container)).log_path)
        while not path.exists() or b" stderr F end\n" not in path.read_bytes():
            assert time.monotonic() < deadline, f"container {container} of {pod} does not write"
            time.sleep(0.05)

    def images(self) -> None:
        """Pull and remove a second tag."""
        node = self.node
        other = node.image.replace(":1", ":2")
        while time.monotonic() < self.until and not self.broken:
            self.again(lambda: node.pull(other))
            self.again(lambda: node.remove_image(other))
            self.count("pulls")
            time.sleep(0.2)

    # The killer

    def kill(self) -> None:
        """Until the time is over. The last thing it does is to see the daemon run."""
        chance = random.Random(f"{self.seed}-killer")
        daemon = self.node.daemon
        while time.monotonic() < self.until and not self.broken:
            time.sleep(chance.uniform(0.2, 2.5))
            victims = chance.choice(VICTIMS)
            for victim in victims:
                self.kills.setdefault(victim, []).append(time.time_ns())
                if victim == "daemon":
                    daemon.kill()
                else:
                    self.kill_one(victim, chance)
                self.count(f"kills of a {victim}")
            if "daemon" in victims:
                time.sleep(chance.choice((0.0, 0.0, 0.5)))
                daemon.start()
            elif daemon.process is None or daemon.process.poll() is not None:
                self.note("the daemon has ended by itself")

    def kill_one(self, victim: str, chance: random.Random) -> None:
        """One of the instance's processes of a kind, if there is any now."""
        run = self.node.daemon.run
        found = [p for p in leaks.processes() if p.name == KINDS[victim] and str(run) in p.command.split(" ")]
        if victim == "launcher":  # not one that it has made, and that is no container yet
            recorded = (run / "launcher.pid").read_text().split()[0] if (run / "launcher.pid").exists() else ""
            found = [p for p in found if str(p.pid) == recorded]
        if not found:
            return
        chosen = chance.choice(sorted(found, key=lambda process: process.pid))
        try:
            pidfd = os.pidfd_open(chosen.pid)
        except ProcessLookupError:
            return
        try:
            if any(p.pid == chosen.pid and p.start == chosen.start for p in leaks.processes()):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)
