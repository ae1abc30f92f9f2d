"""Shares this machine's whole tree with a guest, and makes sure that the guest cannot write to it.

    python -m scripts.vm.share DESCRIPTOR        a listening unix socket on which the guest's QEMU is the one client

It becomes virtiofsd, in a mount namespace of its own in which every mount is read-only: what virtiofsd (of QEMU 7.2) has no option for.
"""

from __future__ import annotations

import os
import sys

from tare.launch import linux

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


def command(descriptor: int) -> list[str]:
    """virtiofsd's command line. Everything may be cached, since a guest lives for minutes and sees the tree of its start."""
    options = ("source=/", "sandbox=chroot", "cache=always", "log_level=err")
    return [VIRTIOFSD, f"--fd={descriptor}", *(word for option in options for word in ("-o", option))]


def main() -> None:
    """Become virtiofsd."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, b"/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount_setattr(linux.AT_FDCWD, b"/", linux.AT_RECURSIVE, linux.MOUNT_ATTR_RDONLY)
    os.execv(VIRTIOFSD, command(int(sys.argv[1])))


if __name__ == "__main__":
    main()
