"""AppArmor profiles and SELinux contexts: what a container is to have, and what is written so that it has it (pure, but for `kernel`).

    AppArmor   "exec NAME"  → /proc/self/attr/apparmor/exec        before exec, in the container's process
    SELinux    context      → /proc/self/attr/exec                 likewise; its files': context="…" in the mount's data

What is asked for and is not there is an error, never passed over: a container that was to be confined must not run unconfined.
What is not asked for is the node's default, where the node has one.

Source: CRI SecurityProfile and SELinuxOption; OCI runtime-spec, config.md ("apparmorProfile", "selinuxLabel") and config-linux.md
("Mount Label"); apparmor(7), selinux(8), and the file lxc_contexts of container policies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime.records import ProfileType, SecurityProfile, SELinuxOptions

APPARMOR_DEFAULT = "tare-default"
APPARMOR_FILES = ("/proc/self/attr/apparmor/exec", "/proc/self/attr/exec")
SELINUX_FILE = "/proc/self/attr/exec"
PROCESS, FILES = "system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0"
"""What container policies name where the node's policy does not say it."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
LEVEL = re.compile(r"s\d{1,2}(-s\d{1,2})?(:c\d{1,4}([.,]c\d{1,4})*(-s\d{1,2}:c\d{1,4}([.,]c\d{1,4})*)?)?")
LONGEST_PROFILE = 4096
CATEGORIES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What this node enforces: loaded AppArmor profiles (None: there is no AppArmor), and SELinux's contexts for containers (None: it is off)."""

    profiles: frozenset[str] | None = None
    contexts: Contexts | None = None
    apparmor_file: str = APPARMOR_FILES[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """The node's default contexts of a container's process, and of its files."""

    process: str = PROCESS
    files: str = FILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """OCI's process.selinuxLabel and linux.mountLabel; "" where there is none."""

    process: str = ""
    mount: str = ""


def kernel(root: Path = Path("/")) -> Kernel:
    """What the node under `root` enforces, from its sysfs and its SELinux policy's configuration. Raises OSError where it cannot be read."""
    profiles: frozenset[str] | None = None
    security = root / "sys/kernel/security/apparmor/profiles"
    if (root / "sys/module/apparmor/parameters/enabled").is_file() and security.is_file():
        lines = security.read_text().splitlines()
        profiles = frozenset(line.rpartition(" (")[0] for line in lines)
    contexts: Contexts | None = None
    if (root / "sys/fs/selinux/enforce").is_file():
        policy = (
            policy_name((root / "etc/selinux/config").read_text()) if (root / "etc/selinux/config").is_file() else ""
        )
        file = root / f"etc/selinux/{policy or 'targeted'}/contexts/lxc_contexts"
        contexts = parse_contexts(file.read_text() if file.is_file() else "")
    apparmor_file = APPARMOR_FILES[0 if (root / APPARMOR_FILES[0][1:]).exists() else 1]
    return Kernel(profiles=profiles, contexts=contexts, apparmor_file=apparmor_file)


def policy_name(config: str) -> str:
    """SELINUXTYPE in the text of /etc/selinux/config; "" where it is not said."""
    found = re.search(r"^\s*SELINUXTYPE\s*=\s*(\w[\w-]*)\s*$", config, re.M)
    return found[1] if found else ""


def parse_contexts(text: str) -> Contexts:
    """lxc_contexts: lines such as process = "system_u:system_r:container_t:s0"."""
    values = dict(re.findall(r'^\s*(process|file)\s*=\s*"([^"\s]+)"\s*$', text, re.M))
    return Contexts(process=values.get("process", PROCESS), files=values.get("file", FILES))


def apparmor_profile(wanted: SecurityProfile | None, node: Kernel, *, privileged: bool) -> str:
    """OCI's process.apparmorProfile; "" for none.

    Nothing asked for is the default profile where it is loaded; a privileged container has none. Raises InvalidArgument for what is no name,
    FailedPrecondition for a profile that is not loaded, or that a kernel without AppArmor is asked for.
    """
    if wanted is None:
        return APPARMOR_DEFAULT if not privileged and APPARMOR_DEFAULT in (node.profiles or ()) else ""
    if wanted.type is ProfileType.UNCONFINED or privileged:
        return ""
    if wanted.type is ProfileType.RUNTIME_DEFAULT:
        # Where there is no AppArmor the runtime's default is none.
        if node.profiles is None:
            return ""
        return loaded(APPARMOR_DEFAULT, node)
    return loaded(wanted.localhost_ref.removeprefix("localhost/"), node)


def loaded(name: str, node: Kernel) -> str:
    """A profile's name, which this kernel must know: what OCI's process.apparmorProfile asks for. Raises as `apparmor_profile`."""
    doing = f"confine the container by AppArmor profile {name!r}"
    if (
        not name
        or len(name) > LONGEST_PROFILE
        or any(character in name for character in "\0\n")
        or name != name.strip()
    ):
        raise InvalidArgument(doing, cause="it is no name of a profile")
    if node.profiles is None:
        raise FailedPrecondition(doing, cause="this node's kernel does not have AppArmor")
    if name != "unconfined" and name not in node.profiles:
        hint = "load it on the node: apparmor_parser --replace FILE"
        raise FailedPrecondition(doing, cause="this node's kernel has no such profile loaded", hint=hint)
    return name


def apparmor_write(profile: str, node: Kernel) -> tuple[str, bytes]:
    """(file, what to write to it) in the process that is to exec under the profile."""
    return node.apparmor_file, f"exec {profile}".encode()


def selinux_labels(wanted: SELinuxOptions | None, node: Kernel, *, privileged: bool, seed: str) -> Labels:
    """The contexts of a container's process and files.

    Parts that are not given are the node's; the level, where it is not given, is a pair of categories that `seed` (a pod's ID) picks,
    so that a pod's containers share their files and pods do not. Raises InvalidArgument for what is no part of a context,
    FailedPrecondition where SELinux is off and something is asked for.
    """
    asked = wanted is not None and any((wanted.user, wanted.role, wanted.type, wanted.level))
    if node.contexts is None:
        if asked:
            cause = "SELinux is off on this node"
            raise FailedPrecondition("label the container", cause=cause, hint="leave seLinuxOptions out")
        return Labels()
    if privileged and not asked:
        return Labels()
    options = wanted or SELinuxOptions()
    for key, value, pattern in (
        ("user", options.user, NAME),
        ("role", options.role, NAME),
        ("type", options.type, NAME),
        ("level", options.level, LEVEL),
    ):
        if value and not pattern.fullmatch(value):
            raise InvalidArgument("label the container", cause=f"{value!r} is no SELinux {key}")
    process, files = split(node.contexts.process), split(node.contexts.files)
    level = options.level or f"{process[3]}:{categories(seed)}"
    own = (options.user or process[0], options.role or process[1], options.type or process[2], level)
    return Labels(process=":".join(own), mount=":".join((*files[:3], level)))


def split(context: str) -> tuple[str, str, str, str]:
    """user, role, type, level."""
    user, role, kind, level = [*context.split(":", 3), "", "", "", ""][:4]
    return user, role, kind, level or "s0"


def categories(seed: str) -> str:
    """A pair out of half a million, such as c12,c800; the same for the same seed."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    first, second = number % CATEGORIES, number // CATEGORIES % (CATEGORIES - 1)
    second += second >= first
    return f"c{min(first, second)},c{max(first, second)}"


def check_labels(process: Mapping[str, object], linux: Mapping[str, object], node: Kernel) -> None:
    """OCI's apparmorProfile, selinuxLabel and mountLabel of a configuration. Raises InvalidArgument, FailedPrecondition."""
    profile = text(process, "process", "apparmorProfile")
    if profile:
        loaded(profile, node)
    for section, path, key in ((process, "process", "selinuxLabel"), (linux, "linux", "mountLabel")):
        label = text(section, path, key)
        if not label:
            continue
        doing = f"apply {path}.{key}"
        if len(label.split(":")) < 3 or any(character.isspace() or character in '"\0' for character in label):
            raise InvalidArgument(doing, cause=f"{label!r} is not user:role:type:level")
        if node.contexts is None:
            raise FailedPrecondition(doing, cause="SELinux is off on this node")


def text(section: Mapping[str, object], path: str, key: str) -> str:
    """A member that is a string; "" where it is absent."""
    value = section.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidArgument(f"read {path}.{key}", cause=f"{value!r} is not a string")
    return value or ""


def selinux_write(label: str) -> tuple[str, bytes]:
    """(file, what to write to it) in the process that is to exec with the label."""
    return SELINUX_FILE, label.encode()


def mount_context(label: str) -> tuple[str, str]:
    """The option (name, value) of a new file system whose files all have a label; fsconfig(2) takes both as they are."""
    return "context", label


def mount_data(label: str) -> str:
    """The same as a piece of mount(2)'s data, where commas part the options: the quotes are the kernel's."""
    return f'context="{label}"'
