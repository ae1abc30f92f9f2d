"""What the node's settings do not allow plugins to do, and which plugins they demand (pure): NRI's default validator."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from tare.config import ValidatorConfig
from tare.errors import FailedPrecondition
from tare.nri.owners import Owners
from tare.nri.v1 import nri_pb2 as pb

REQUIRED = "required-plugins.noderesource.dev"
LONGEST = 1024  # characters of a list of names: it is a pod's own word, and nothing else goes on while it is read
TRUE, FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False")


class Refused(FailedPrecondition):
    """The node's settings do not allow it."""


def check(
    settings: ValidatorConfig,
    pod: pb.PodSandbox,
    before: pb.Container,
    owners: Owners,
    asked: Iterable[tuple[str, str]],
) -> None:
    """Raise Refused for the first thing that is not allowed. `before` is the container unadjusted, `asked` the plugins: (index, name)."""
    if not settings.enable:
        return
    offenders = {
        "OCI hooks": settings.reject_oci_hook_adjustment and owners.holder(before.id, pb.OciHooks),
        "the seccomp policy": reject_seccomp(settings, before) and owners.holder(before.id, pb.SeccompPolicy),
        "namespaces": settings.reject_namespace_adjustment and names(owners, before.id, pb.Namespace),
        "sysctls": settings.reject_sysctl_adjustment and names(owners, before.id, pb.Sysctl),
    }
    for thing, plugins in offenders.items():
        if plugins:
            cause = f"{plugins} adjusts {thing}, which [nri.default_validator] does not allow"
            raise Refused(f"make container {before.name}", cause=cause)
    check_required(settings, pod, before, asked)


def reject_seccomp(settings: ValidatorConfig, before: pb.Container) -> bool:
    """Whether a profile of the kind that was asked for is not to be adjusted."""
    kind = before.linux.seccomp_profile.profile_type
    if not before.linux.HasField("seccomp_profile") or kind == pb.SecurityProfile.UNCONFINED:
        return settings.reject_unconfined_seccomp_adjustment
    if kind == pb.SecurityProfile.RUNTIME_DEFAULT:
        return settings.reject_runtime_default_seccomp_adjustment
    return settings.reject_custom_seccomp_adjustment


def names(owners: Owners, container: str, thing: int) -> str:
    """Who has set entries of it; "" for nobody."""
    return ", ".join(dict.fromkeys(owners.holders(container, thing).values()))


def check_required(
    settings: ValidatorConfig, pod: pb.PodSandbox, before: pb.Container, asked: Iterable[tuple[str, str]]
) -> None:
    """Raise Refused where a plugin that has to see every container has not seen this one."""
    doing = f"make container {before.name}"
    if tolerated(settings, pod, before.name):
        return
    wanted = [*settings.required_plugins, *annotated(pod, before.name)]
    present = {name for index, own in asked for name in (own, f"{index}-{own}")}
    missing = [name for name in dict.fromkeys(wanted) if name not in present]
    if missing:
        cause = f"required NRI plugins are not there: {', '.join(missing)}"
        raise Refused(doing, cause=cause, hint="start them, or see [nri.default_validator]")


def annotated(pod: pb.PodSandbox, container: str) -> list[str]:
    """The plugins that the pod itself demands: a list in YAML or JSON."""
    text = effective(pod, REQUIRED, container)
    if text is None:
        return []
    if (
        len(text) > LONGEST or text.count("[") + text.count("{") > 1
    ):  # the parser takes half a second for what is nested so deep
        cause = f"annotation {REQUIRED} is no plain list of at most {LONGEST} characters"
        raise Refused(f"make container {container}", cause=cause)
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refused(f"make container {container}", cause=f"annotation {REQUIRED}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise Refused(f"make container {container}", cause=f"annotation {REQUIRED} is no list of names: {text!r}")
    return found


def tolerated(settings: ValidatorConfig, pod: pb.PodSandbox, container: str) -> bool:
    """Whether the pod may do without the plugins that are demanded."""
    key = settings.tolerate_missing_plugins_annotation
    text = effective(pod, key, container) if key else None
    if text is not None and text not in TRUE + FALSE:
        raise Refused(f"make container {container}", cause=f"annotation {key} is neither true nor false: {text!r}")
    return text in TRUE


def effective(pod: pb.PodSandbox, key: str, container: str) -> str | None:
    """An annotation that may be given for one container, for the pod, or without saying."""
    places = (f"{key}/container.{container}", f"{key}/pod", key)
    return next((pod.annotations[place] for place in places if place in pod.annotations), None)
