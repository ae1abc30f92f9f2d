"""Seccomp profiles compiled to BPF by libseccomp.so.2, once for each content.

What libseccomp does not know, and what the profile is too old for, is `seccomp_newer`'s; `seccomp_shrink` makes the program smaller.

    <root>/seccomp/<key>.bpf    32 bytes of SHA-256 over the rest, then the program (struct sock_filter, 8 bytes each)

The key is a hash of the profile, the machine and the library's version. A file is written beside its place and renamed;
one that is damaged is compiled again. Loading a program into the kernel is the launcher's.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tare.errors import FailedPrecondition, InternalError, InvalidArgument, describe
from tare.handlers.compile import Filter
from tare.runtime.seccomp_newer import NOT_THERE, Table, number_of, prologue
from tare.runtime.seccomp_profile import ARCHITECTURES, check_profile, listener, notifies
from tare.runtime.seccomp_shrink import shrunk

log = logging.getLogger(__name__)

FORMAT = 3
REMEMBERED = 64
DIGEST = 32
MOST_INSTRUCTIONS = 4096

ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
OPERATORS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,  # for programs with threads; a container's process has one when its filter is loaded
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}
NEW_LISTENER, WAIT_KILLABLE_RECV = 8, 32
PASSING = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
ATTRIBUTE_OPTIMIZE, BINARY_TREE = 8, 2
EPERM, EEXIST = 1, 17
UNKNOWN_CALL = -1


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    ]


class SeccompCompiler:
    """Compiles OCI seccomp objects; programs are remembered in memory and in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._programs: dict[str, bytes] = {}
        self._lock = asyncio.Lock()

    async def compile(self, profile: Mapping[str, Any]) -> Filter:
        """The program and the flags to load it with.

        Raises InvalidArgument for what is no profile, FailedPrecondition where libseccomp is not installed.
        """
        import msgspec  # not by `tare oci`, which compiles by this module and has the standard library alone

        flags = filter_flags(profile)
        text = msgspec.json.encode(profile, order="deterministic").decode()
        key = text_key(text)
        if key not in self._programs:
            async with self._lock:
                if key not in self._programs:
                    self._remember(key, await asyncio.to_thread(self._load, profile, text))
        path, metadata = listener(profile) or ("", "")
        return Filter(program=self._programs[key], flags=flags, listener=path, metadata=metadata)

    def _remember(self, key: str, program: bytes) -> None:
        while len(self._programs) >= REMEMBERED:
            del self._programs[next(iter(self._programs))]
        self._programs[key] = program

    def _load(self, profile: Mapping[str, Any], text: str) -> bytes:
        check_profile("of the container", profile)
        library = load_library()
        path = self._directory / f"{text_key(f'{FORMAT} {os.uname().machine} {version(library)} {text}')}.bpf"
        program = read_program(path)
        if program is None:
            program = compile_profile(library, profile)
            write_program(path, program)
        return program


def text_key(text: str) -> str:
    """A name for content."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_program(path: Path) -> bytes | None:
    """A program that was kept; None where there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("read seccomp program %s: %s", path, describe(error))
        return None
    program = data[DIGEST:]
    if not program or hashlib.sha256(program).digest() != data[:DIGEST]:
        log.warning("%s is damaged and is compiled again", path)
        return None
    return program


def write_program(path: Path, program: bytes) -> None:
    """Keep a program. Where that cannot be done it is compiled again the next time."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            draft.write_bytes(hashlib.sha256(program).digest() + program)
            draft.rename(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("keep seccomp program %s: %s", path, describe(error))


def load_library() -> ctypes.CDLL:
    """libseccomp, with its functions' types. Raises FailedPrecondition."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        hint = "install it: apt install libseccomp2"
        raise FailedPrecondition(
            "compile a seccomp profile", cause="libseccomp.so.2 is not there", hint=hint
        ) from error
    context, word, number = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    library.seccomp_init.restype, library.seccomp_init.argtypes = context, [word]
    library.seccomp_release.restype, library.seccomp_release.argtypes = None, [context]
    library.seccomp_attr_set.argtypes = [context, number, word]
    library.seccomp_arch_resolve_name.restype = word
    library.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_arch_add.argtypes = [context, word]
    library.seccomp_arch_native.restype, library.seccomp_arch_native.argtypes = word, []
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_syscall_resolve_name_arch.argtypes = [word, ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [context, word, number, ctypes.c_uint, ctypes.POINTER(Comparison)]
    library.seccomp_export_bpf.argtypes = [context, number]
    library.seccomp_version.restype = ctypes.POINTER(ctypes.c_uint)
    return library


def version(library: ctypes.CDLL) -> str:
    """The library's version, "2.5.4"."""
    numbers = library.seccomp_version()
    return ".".join(str(numbers[index]) for index in range(3))


def compile_profile(library: ctypes.CDLL, profile: Mapping[str, Any]) -> bytes:
    """The BPF program of a checked profile. Raises InvalidArgument."""
    default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    if not context:
        raise InternalError("compile a seccomp profile", cause="libseccomp does not accept the default action")
    try:
        # Older libraries have no binary tree: then the program is a list, and slower.
        library.seccomp_attr_set(context, ATTRIBUTE_OPTIMIZE, BINARY_TREE)
        tokens = add_architectures(library, context, profile.get("architectures") or ())
        for item in profile.get("syscalls") or ():
            answer = action(item["action"], item.get("errnoRet"))
            if answer != default:
                add_rules(library, context, answer, item)
        passing = profile["defaultAction"] in PASSING
        first = prologue(
            [table(library, token, profile, default, passing=passing) for token in tokens],
            absent=not passing and default != NOT_THERE,
        )
        return checked(shrunk(first + export(library, context)))
    finally:
        library.seccomp_release(context)


def action(name: str, value: int | None) -> int:
    """libseccomp's number for an action; `value` is errno or what a tracer is told (EPERM if absent)."""
    carries = name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
    return ACTIONS[name] | ((EPERM if value is None else value) & 0xFFFF if carries else 0)


def add_architectures(library: ctypes.CDLL, context: int, names: Any) -> list[int]:
    """The others that this machine can run; its own is always there, and what cannot run here needs no filter. All tokens."""
    tokens = [library.seccomp_arch_native()]
    possible = ARCHITECTURES.get(os.uname().machine, ())
    for name in names:
        if name not in possible:
            continue
        token = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
        check(library.seccomp_arch_add(context, token), f"add architecture {name}")
        if token not in tokens:
            tokens.append(token)
    return tokens


def table(library: ctypes.CDLL, token: int, profile: Mapping[str, Any], default: int, *, passing: bool) -> Table:
    """The numbers that a profile's calls have in one architecture, and the actions of those that libseccomp has no name for.

    It cannot be given conditions for these: such a call is not there where the default lets calls pass, and else has the default action.
    """
    found = Table(token=token)
    for item in profile.get("syscalls") or ():
        answer = action(item["action"], item.get("errnoRet"))
        for name in item["names"]:
            number = library.seccomp_syscall_resolve_name_arch(token, name.encode())
            newer = number_of(name, token) if number == UNKNOWN_CALL else None
            if newer is not None and not item.get("args"):
                found.actions.setdefault(newer, answer)
            elif newer is not None and passing:
                found.actions.setdefault(newer, NOT_THERE)
            found.name(number & 0xFFFFFFFF if newer is None and number >= 0 else -1 if newer is None else newer)
    found.actions = {number: answer for number, answer in found.actions.items() if answer != default}
    return found


def add_rules(library: ctypes.CDLL, context: int, answer: int, item: Mapping[str, Any]) -> None:
    """One entry of `syscalls`. Calls that this library does not know are left to the default action."""
    alternatives = conditions(item.get("args") or [])
    for name in item["names"]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == UNKNOWN_CALL:
            continue
        for comparisons in alternatives:
            array = (Comparison * len(comparisons))(*comparisons)
            result = library.seccomp_rule_add_array(context, answer, number, len(comparisons), array)
            check(result, f"add a rule for {name}")


def conditions(args: list[Mapping[str, Any]]) -> list[list[Comparison]]:
    """Alternatives, each a list of conditions that must hold together.

    As in runc: conditions on different arguments are to hold together, but if one argument has several, each is an alternative.
    """
    comparisons = [
        Comparison(arg["index"], OPERATORS[arg["op"].removeprefix("SCMP_CMP_")], arg["value"], arg.get("valueTwo") or 0)
        for arg in args
    ]
    if len({arg["index"] for arg in args}) < len(args):
        return [[comparison] for comparison in comparisons]
    return [comparisons]


def export(library: ctypes.CDLL, context: int) -> bytes:
    """The program's bytes."""
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        check(library.seccomp_export_bpf(context, fd), "write the program")
        program = os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)
    return program


def checked(program: bytes) -> bytes:
    """The program, which the kernel must take."""
    if len(program) // 8 > MOST_INSTRUCTIONS:
        cause = f"it comes to {len(program) // 8} instructions, the kernel takes {MOST_INSTRUCTIONS}"
        raise InvalidArgument("compile a seccomp profile", cause=cause)
    return program


def filter_flags(profile: Mapping[str, Any]) -> int:
    """SECCOMP_FILTER_FLAG_ bits. Where the profile names none, no speculation mitigations are forced on the container, as in runc.

    With NEW_LISTENER, which a profile with SCMP_ACT_NOTIFY comes to, seccomp(2) returns the listener. Without it there is nobody whose
    answer could be waited for, and the kernel refuses to be told how.
    """
    names = profile.get("flags")
    bits = FLAGS["SECCOMP_FILTER_FLAG_SPEC_ALLOW"] if names is None else 0
    for name in names or ():
        if name not in FLAGS:
            raise InvalidArgument("compile a seccomp profile", cause=f"flag {name!r} is not supported")
        bits |= FLAGS[name]
    return bits | NEW_LISTENER if notifies(profile) else bits & ~WAIT_KILLABLE_RECV


def check(result: int, doing: str) -> None:
    """libseccomp returns negative errno numbers. A rule that is there already is no failure."""
    if result < 0 and result != -EEXIST:
        raise InvalidArgument(f"compile a seccomp profile: {doing}", cause=os.strerror(-result))
