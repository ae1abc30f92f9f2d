"""System calls of processes as strace(1) sees them, whole and in order.

async with Trace(pid, tmp_path / "trace") as trace: …
calls = trace.calls()[some_pid]
"""

from __future__ import annotations

import asyncio
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

LINE = re.compile(r"^(\d+) +(.*)$")
CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(.*)$")
RESUMED = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$")
UNFINISHED = " <unfinished ...>"
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: its name, its arguments as strace writes them, and its result."""

    name: str
    arguments: str
    result: str

    def __str__(self) -> str:
        return f"{self.name}({self.arguments}) = {self.result}"

    @property
    def words(self) -> list[str]:
        """The strings among the arguments."""
        return STRING.findall(self.arguments)


def parse(text: str) -> dict[int, list[Call]]:
    """PID → calls, those that were interrupted by others' put together. A call stands where it ended; execve stands where it began."""
    found: dict[int, list[Call]] = {}
    pending: dict[int, str] = {}
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        pid, rest = int(match[1]), match[2]
        if rest.endswith(UNFINISHED):
            pending[pid] = rest.removesuffix(UNFINISHED)
            continue
        resumed = RESUMED.match(rest)
        if resumed is not None:
            rest = pending.pop(pid, f"{resumed[1]}(") + resumed[2]
        call = CALL.match(rest)
        if call is not None:
            found.setdefault(pid, []).append(Call(call[1], call[2].rstrip(), call[3]))
    return found


class Trace:
    """strace attached to a process and all that it makes from now on; `output` is a file, `options` are strace's."""

    def __init__(self, pid: int, output: Path, *options: str) -> None:
        self.pid = pid
        self.output = output
        self.options = options

    async def __aenter__(self) -> Trace:
        command = ["strace", "-f", "-q", "-s", "4096", *self.options, "-o", str(self.output), "-p", str(self.pid)]
        self.process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        while not self.attached():
            if self.process.returncode is not None:
                assert self.process.stderr is not None
                raise RuntimeError(f"strace ended: {(await self.process.stderr.read()).decode()}")
            await asyncio.sleep(0.005)
        return self

    def attached(self) -> bool:
        """Whether the process is being traced."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return f"TracerPid:\t{self.process.pid}\n" in status

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGINT)
        await self.process.communicate()

    def calls(self) -> dict[int, list[Call]]:
        """PID → its calls, once strace has ended."""
        return parse(self.output.read_text(errors="replace"))
