"""What is said, and where: in the file that --log names, as lines of text or JSON in the form that podman and containerd read.

Errors go to standard error too. Warnings without a file only to a terminal, or with --debug: standard error is the container's as well,
and what is written there ends in its log.
"""

from __future__ import annotations

import os
import time

from tare.oci import documents

_settings: dict[str, object] = {"path": "", "json": False, "debug": False}


def configure(path: str, form: str, *, debug: bool) -> None:
    """From the global flags. The file is made now, as callers expect. Raises OSError."""
    _settings.update(path=path, json=form == "json", debug=debug)
    if path:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644))


def error(text: str) -> None:
    """What a command ends with."""
    write("error", text)
    if _settings["path"]:
        os.write(2, f"{text}\n".encode(errors="replace"))


def warning(text: str) -> None:
    """Something that was carried on from."""
    if _settings["path"] or _settings["debug"] or os.isatty(2):
        write("warning", text)


def debug(text: str) -> None:
    """Only with --debug."""
    if _settings["debug"]:
        write("debug", text)


def write(level: str, text: str) -> None:
    """One line, in the file or on standard error. Where it cannot be written there is nobody to tell."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if _settings["json"]:
        line = documents.encoded({"level": level, "msg": text, "time": moment})
    else:
        quoted = documents.encoded(text)
        line = b"time=%b level=%b msg=%b" % (documents.encoded(moment), level.encode(), quoted)
    path = _settings["path"]
    try:
        fd = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644) if path else os.dup(2)
    except OSError:
        fd = os.dup(2)
    try:
        os.write(fd, line + b"\n")
    finally:
        os.close(fd)
