"""The three files of a pod that give names: /etc/hostname, /etc/hosts and /etc/resolv.conf, as text. Pure.

Writing them, and mounting them into containers, is the runtime's. Values come from clients: one that would add a line is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from tare.errors import InvalidArgument

MAX_HOSTNAME = 64  # HOST_NAME_MAX of Linux
# Where a node's own resolver settings are; the first may name only a stub on the loopback, behind which are the second's.
HOST_RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
LOCAL_NAMES = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def hostname_file(hostname: str) -> str:
    """/etc/hostname. Raises InvalidArgument for a name that the kernel or the file cannot hold."""
    return check_hostname(hostname) + "\n"


def hosts_file(hostname: str, ips: Sequence[str]) -> str:
    """/etc/hosts, as hosts(5) has it: the local names, and the pod's own at its addresses. Raises InvalidArgument.

    Where the name is a full one (a.b.c) the short one stands after it, by which `hostname -f` finds the full one.
    """
    name = check_hostname(hostname)
    short = name.partition(".")[0]
    names = f"{name} {short}" if short and short != name else name
    return LOCAL_NAMES + "".join(f"{check_address(ip)}\t{names}\n" for ip in ips if name)


def resolv_conf(
    servers: Sequence[str],
    searches: Sequence[str],
    options: Sequence[str],
    host: str,
    *,
    host_network: bool = False,
) -> str:
    """/etc/resolv.conf, as resolv.conf(5) has it: from the request if that says anything, otherwise the node's.

    `host` is the text of the node's file (`host_resolv_conf`). Its servers on the loopback are left out unless the pod shares the node's
    network: inside a pod nothing listens there. Raises InvalidArgument.
    """
    if not servers and not searches and not options:
        lines = host.splitlines()
        return "".join(f"{line}\n" for line in lines if host_network or not is_loopback_server(line))
    text = f"search {' '.join(check_word(word, 'DNS search domain') for word in searches)}\n" if searches else ""
    text += "".join(f"nameserver {check_address(server)}\n" for server in servers)
    return text + (f"options {' '.join(check_word(word, 'DNS option') for word in options)}\n" if options else "")


def host_resolv_conf(texts: Sequence[str]) -> str:
    """Of the texts of the node's files (those of HOST_RESOLV_CONF that exist) the first that names a server a pod can reach, or the first."""
    reachable = (
        text for text in texts if any(is_server(line) and not is_loopback_server(line) for line in text.splitlines())
    )
    return next(reachable, texts[0] if texts else "")


def is_server(line: str) -> bool:
    """Whether a line of resolv.conf names a server."""
    words = line.split()
    return len(words) > 1 and words[0] == "nameserver"


def is_loopback_server(line: str) -> bool:
    """Whether a line of resolv.conf names a server on the loopback."""
    if not is_server(line):
        return False
    try:
        return ipaddress.ip_address(line.split()[1].partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_hostname(hostname: str) -> str:
    """The name if it is one line without blanks that the kernel can hold, or empty."""
    if len(hostname.encode()) > MAX_HOSTNAME:
        raise InvalidArgument(f"use hostname {hostname!r}", cause=f"it has more than {MAX_HOSTNAME} bytes")
    return check_word(hostname, "hostname") if hostname else hostname


def check_word(word: str, kind: str) -> str:
    """The word if it is one: not empty, without blanks, line ends and other control characters, and no comment."""
    if not word or not word.isprintable() or any(character.isspace() or character in "#;" for character in word):
        raise InvalidArgument(f"use {kind} {word!r}", cause="it is not one word")
    return word


def check_address(address: str) -> str:
    """The address if it is IPv4 or IPv6, with or without a zone."""
    try:
        ipaddress.ip_address(check_word(address, "address"))
    except ValueError as error:
        raise InvalidArgument(f"use address {address!r}", cause=str(error)) from error
    return address
