"""What a child is to do, as data: a list of primitive steps that `steps` walks.

A step is a tuple `(operation, label, argument, …)`. The operation is a name in `steps.OPERATIONS`; the label is what an
error calls it ("mount /proc"). Descriptors that a step opens go into numbered slots, which later steps name. A plan is a
dictionary of marshal's plain types (it is read by the same code that writes it, never from anyone else):

    before       in the process in between, if there is one (`between`), or in an exec's first process; `making` is what
                 an error calls the making of the child after that
    entered      in an exec's first process, when it has entered the container's namespaces
    steps        before the gate: cgroup, namespaces, mounts, pivot, working directory, standard streams
    outside      lists of steps for the helper in the node's namespaces, each run when a step `outside` asks for it;
                 `lingers` where one of them is asked for after the gate
    final        after the gate: credentials, limits, seccomp
    argv, env    bytes; `paths` are the candidates for argv[0], in order
    inherit      the first descriptor that the program does not inherit, where that is not 3

It travels in a sealed memfd, so that an environment never enters the heap of launcher or logger.
"""

from __future__ import annotations

import fcntl
import marshal
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Step = tuple[Any, ...]
    Plan = dict[str, Any]

MARSHAL_VERSION = 2  # the form that every Python 3 reads alike
MAX_SIZE = 16 << 20
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
EBUSY = 16
ATTEMPTS = 4


def seal(plan: Plan) -> int:
    """The plan in a sealed memfd; the descriptor is the caller's."""
    data = marshal.dumps(plan, MARSHAL_VERSION)
    if len(data) > MAX_SIZE:
        raise OSError(7, f"the plan is {len(data)} bytes long, at most {MAX_SIZE} are possible")
    for _ in range(ATTEMPTS - 1):
        try:
            return sealed(data)
        except OSError as error:
            # Memory cannot be sealed while the kernel itself holds a page of it (reclaim, compaction); other pages may do.
            if error.errno != EBUSY:
                raise
    return sealed(data)


def sealed(data: bytes) -> int:
    """A memfd with these bytes, sealed against every change."""
    fd = os.memfd_create("tare-plan", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(fd: int) -> Plan:
    """The plan in a memfd."""
    size = os.fstat(fd).st_size
    plan: Plan = marshal.loads(os.pread(fd, size, 0))
    return plan
