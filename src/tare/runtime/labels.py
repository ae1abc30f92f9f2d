"""AppArmor profiles and SELinux contexts: what a container is to have, by what CRI asks for and what the node enforces (pure, but for `kernel`).

What is asked for and is not there is an error, never passed over: a container that was to be confined must not run unconfined.
What is not asked for is the node's default, where the node has one. How a process comes to be confined is `handlers.labels`'.

Source: CRI SecurityProfile and SELinuxOption; apparmor(7), selinux(8), and the file lxc_contexts of container policies.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime.records import ProfileType, SecurityProfile, SELinuxOptions

APPARMOR_DEFAULT = "tare-default"
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
    return Kernel(profiles=profiles, contexts=contexts)


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
    """A profile's name, which this kernel must know. Raises as `apparmor_profile`."""
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


def mount_data(label: str) -> str:
    """The label of all files of a new file system, as a piece of mount(2)'s data, where commas part the options: the quotes are the kernel's."""
    return f'context="{label}"'
