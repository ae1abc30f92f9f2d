"""What another runtime is told of a container: from Tare's configuration to one that any OCI runtime takes. Pure.

Tare has made the root file system, image volumes, directories and control groups itself, so these are named and no more:

    root.path          where the root file system is mounted
    an image volume    a bind mount of where Tare has mounted it
    directories        Tare's own field, done: left out; so is process.stdin
    linux.resources    the devices alone: the group's other limits are set. A sandbox is told what it has of memory and CPU as well
    hostname           for a sandbox, which has no use for the pod's UTS namespace: what the container's environment says
    ociVersion         1.0.2: nothing here is newer, and older runtimes refuse a higher number
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tare.errors import InvalidArgument
from tare.handlers import options, volumes

Json = dict[str, Any]

VERSION = "1.0.2"
NO_RRO = "RROUnsupported: "  # what kubelet looks for at the beginning of an error
OWN = ("directories",)
OWN_OF_PROCESS = ("stdin", "seccomp", "container")
OF_A_SANDBOX = ("memory", "cpu")


def configuration(spec: Mapping[str, Any], *, rootfs: str, volume: str, cgroup: str, sandbox: bool) -> Json:
    """config.json. `rootfs` is where the root is mounted, `volume`/N where image volume number N is, `cgroup` the group's path."""
    linux = dict(spec["linux"])
    told = ("devices", *(OF_A_SANDBOX if sandbox else ()))
    linux["resources"] = {key: value for key, value in linux.get("resources", {}).items() if key in told}
    linux["cgroupsPath"] = cgroup
    numbers = {mount["destination"]: number for number, (mount, _) in enumerate(image_volumes(spec))}
    mounts = [
        bound(mount, f"{volume}/{numbers[mount['destination']]}") if mount["destination"] in numbers else mount
        for mount in spec.get("mounts", ())
    ]
    own_name = {"hostname": hostname(spec)} if sandbox and hostname(spec) else {}
    return {
        **{key: value for key, value in spec.items() if key not in OWN},
        **own_name,
        "ociVersion": VERSION,
        "root": {**spec.get("root", {}), "path": rootfs},
        "process": process(spec["process"]),
        "mounts": mounts,
        "linux": linux,
    }


def hostname(spec: Mapping[str, Any]) -> str:
    """The pod's, as the container's environment has it."""
    names = [entry.removeprefix("HOSTNAME=") for entry in spec["process"]["env"] if entry.startswith("HOSTNAME=")]
    return names[-1] if names else ""


def process(own: Mapping[str, Any]) -> Json:
    """An OCI process object."""
    return {key: value for key, value in own.items() if key not in OWN_OF_PROCESS}


def image_volumes(spec: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], options.Flags]]:
    """The mounts that are image volumes, in order."""
    parsed = [(mount, options.of(mount)) for mount in spec.get("mounts", ())]
    return [(mount, flags) for mount, flags in parsed if volumes.layers(mount, flags)]


def bound(mount: Mapping[str, Any], source: str) -> Json:
    """An image volume as a bind mount: its flags, without the layers."""
    kept = [option for option in mount.get("options", ()) if not option.startswith("lowerdir=")]
    return {"destination": mount["destination"], "type": "bind", "source": source, "options": ["rbind", *kept]}


def check(spec: Mapping[str, Any], name: str, *, idmap: bool, user_namespaces: bool, recursive_read_only: bool) -> None:
    """Raise InvalidArgument for what a runtime of these abilities would get wrong without saying so."""
    doing = f"make a container by runtime handler {name}"
    if not user_namespaces and any(item["type"] == "user" for item in spec["linux"]["namespaces"]):
        raise InvalidArgument(doing, cause="it does not support user namespaces")
    if not idmap and any(mount.get("uidMappings") or mount.get("gidMappings") for mount in spec.get("mounts", ())):
        raise InvalidArgument(doing, cause="it does not support mounts with mappings of their own")
    if not recursive_read_only:
        for mount in spec.get("mounts", ()):
            if "rro" in mount.get("options", ()):
                cause = f"it does not support recursively read-only mounts, as {mount['destination']} is to be"
                raise InvalidArgument(f"{NO_RRO}{doing}", cause=cause)
