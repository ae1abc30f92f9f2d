"""The texts of /etc/hostname, /etc/hosts and /etc/resolv.conf."""

from __future__ import annotations

import pytest

from tare.errors import InvalidArgument
from tare.network.files import host_resolv_conf, hostname_file, hosts_file, resolv_conf

HOST = "# by the node\nnameserver 127.0.0.53\nnameserver 192.0.2.53\nsearch lan\n"


def test_hostname() -> None:
    assert hostname_file("web-0") == "web-0\n"
    assert hostname_file("") == "\n"


@pytest.mark.parametrize("name", ["a b", "a\nb", "x" * 65, "ü" * 33, "a\0b", "a#b"])
def test_a_hostname_that_would_break_the_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="hostname"):
        hostname_file(name)
    with pytest.raises(InvalidArgument, match="hostname"):
        hosts_file(name, ("10.0.0.2",))


def test_hosts_has_the_local_names_and_the_pods() -> None:
    text = hosts_file("web-0", ("10.85.0.2", "fd00::2"))
    assert text.startswith("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    assert text.endswith("10.85.0.2\tweb-0\nfd00::2\tweb-0\n")
    assert hosts_file("", ("10.85.0.2",)) == hosts_file("web-0", ())


def test_hosts_refuses_what_is_no_address() -> None:
    with pytest.raises(InvalidArgument, match=r"10\.0\.0"):
        hosts_file("web-0", ("10.0.0",))


def test_resolv_conf_from_the_request() -> None:
    text = resolv_conf(("10.96.0.10", "fe80::1%eth0"), ("ns.svc.cluster.local", "lan"), ("ndots:5", "edns0"), HOST)
    assert text == (
        "search ns.svc.cluster.local lan\nnameserver 10.96.0.10\nnameserver fe80::1%eth0\noptions ndots:5 edns0\n"
    )
    assert resolv_conf((), (), ("ndots:1",), HOST) == "options ndots:1\n"


def test_resolv_conf_of_the_node_without_what_a_pod_cannot_reach() -> None:
    assert resolv_conf((), (), (), HOST) == "# by the node\nnameserver 192.0.2.53\nsearch lan\n"
    assert resolv_conf((), (), (), HOST, host_network=True) == HOST
    assert (
        resolv_conf((), (), (), "nameserver ::1\nnameserver nonsense\nnameserver\n")
        == "nameserver nonsense\nnameserver\n"
    )


@pytest.mark.parametrize(
    ("servers", "searches", "options"),
    [
        (("10.0.0.1\nnameserver 6.6.6.6",), (), ()),
        (("resolver.example",), (), ()),
        ((), ("a b",), ()),
        ((), ("",), ()),
        ((), ("a\nnameserver 6.6.6.6",), ()),
        ((), (), ("ndots:5\noptions x",)),
        ((), (), ("#",)),
    ],
)
def test_resolv_conf_refuses_what_would_add_a_line(
    servers: tuple[str, ...], searches: tuple[str, ...], options: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidArgument):
        resolv_conf(servers, searches, options, HOST)


def test_of_the_nodes_files_the_one_that_a_pod_can_use() -> None:
    stub, real = "nameserver 127.0.0.53\noptions edns0\n", "nameserver 192.0.2.53\n"
    assert host_resolv_conf([stub, real]) == real
    assert host_resolv_conf([real, stub]) == real
    assert host_resolv_conf([HOST, real]) == HOST
    assert host_resolv_conf([stub]) == stub
    assert host_resolv_conf([]) == ""


def test_a_full_name_has_the_short_one_after_it() -> None:
    assert hosts_file("web-0.shop.example", ("10.85.0.2",)).endswith("\n10.85.0.2\tweb-0.shop.example web-0\n")
