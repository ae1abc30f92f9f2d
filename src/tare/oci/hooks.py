"""The hooks that this command runs itself, in the node's namespaces: poststart and poststop. The others are steps of the container's making."""

from __future__ import annotations

import os

from tare.errors import FailedPrecondition
from tare.oci import logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.oci.config import Config
    from tare.oci.state import Container


def run(container: Container, spec: Config, point: str, status: str, pid: int) -> None:
    """All hooks of one point, in order. Raises FailedPrecondition for the first that fails; of poststop hooks that is a warning."""
    if not (spec.get("hooks") or {}).get(point):
        return
    from tare.handlers import hooks
    from tare.launch import hooks as runner

    told = hooks.rendered(hooks.state(spec, container.id, str(container.facts.get("bundle", "")), status, pid))
    for hook in hooks.parse(spec)[point]:
        environment = None if hook.env is None else tuple(os.fsencode(line) for line in hook.env)
        arguments = tuple(os.fsencode(word) for word in hook.args)
        try:
            runner.run(os.fsencode(hook.path), arguments, environment, hook.timeout, told, lambda: None)
        except OSError as error:
            failure = FailedPrecondition(f"run the {hook.label}", cause=error.strerror or str(error))
            if point != "poststop":
                raise failure from error
            logs.warning(f"container {container.id}: {failure}")
