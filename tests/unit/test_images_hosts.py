"""hosts.toml: containerd's files, and what is asked where."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.images.hosts import DIAL_SECONDS, Host, HostsError, folders, is_loopback, parse, read, upstream

FILE = Path("/hosts/quay.io/hosts.toml")


def write(hosts_dir: Path, folder: str, text: str) -> None:
    (hosts_dir / folder).mkdir(parents=True)
    (hosts_dir / folder / "hosts.toml").write_text(text)


def test_without_a_file_the_registry_itself(tmp_path: Path) -> None:
    assert read(tmp_path / "none", "quay.io") == (Host(url="https://quay.io", upstream=True),)
    assert upstream("docker.io").url == "https://registry-1.docker.io"
    assert upstream("reg.example:80").url == "http://reg.example:80"


@pytest.mark.parametrize(
    ("domain", "fallback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("127.0.0.1:443", False),
        ("10.0.0.1:5000", False),
        ("localhost.example", False),
    ],
)
def test_only_loopback_falls_back_to_plain_http(domain: str, fallback: bool) -> None:
    assert upstream(domain).plain_fallback is fallback
    assert upstream(domain).url.startswith("https://")


def test_folders_in_order() -> None:
    root = Path("/h")
    assert folders(root, "r.io:5000") == [root / "r.io_5000_", root / "r.io:5000", root / "_default"]
    assert folders(root, "r.io") == [root / "r.io", root / "_default"]
    assert folders(root, "[::1]:5000") == [root / "[::1]_5000_", root / "[::1]:5000", root / "_default"]


def test_the_first_folder_decides_and_default_is_for_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "r.io_5000_", '[host."http://one"]')
    write(tmp_path, "r.io:5000", '[host."http://two"]')
    write(tmp_path, "_default", '[host."http://three"]')
    assert [host.url for host in read(tmp_path, "r.io:5000")] == ["http://one", "https://r.io:5000"]
    assert [host.url for host in read(tmp_path, "other.io")] == ["http://three", "https://other.io"]
    assert read(tmp_path, "other.io")[0].namespace == "other.io"


def test_a_folder_without_a_file_is_the_registry_itself(tmp_path: Path) -> None:
    (tmp_path / "r.io").mkdir()
    write(tmp_path, "_default", '[host."http://three"]')
    assert [host.url for host in read(tmp_path, "r.io")] == ["https://r.io"]


def test_everything_that_a_file_can_say() -> None:
    text = """
        server = "https://up.quay.io"
        ca = "up.pem"
        [host."https://b.example/cache"]
          capabilities = ["pull"]
          skip_verify = true
          ca = ["one.pem", "/abs/two.pem"]
          client = [["c.pem", "c.key"], ["both.pem", ""]]
          dial_timeout = "1m1.5s"
          header = { X-One = "1", X-Two = ["2", "3"] }
        [host."http://a.example:8080/v2/proxy"]
          override_path = true
          client = "pair.pem"
        [host."c.example"]
    """
    b, a, c, server = parse(text, "quay.io", FILE)
    assert (b.url, b.path, b.capabilities, b.namespace) == (
        "https://b.example",
        "/cache/v2",
        frozenset({"pull"}),
        "quay.io",
    )
    assert b.skip_verify and b.ca == ("/hosts/quay.io/one.pem", "/abs/two.pem")
    assert b.client == (("/hosts/quay.io/c.pem", "/hosts/quay.io/c.key"), ("/hosts/quay.io/both.pem", ""))
    assert b.headers == (("X-One", "1"), ("X-Two", "2"), ("X-Two", "3"))
    assert b.dial_timeout == 61.5
    assert (a.url, a.path, a.client) == ("http://a.example:8080", "/v2/proxy", (("/hosts/quay.io/pair.pem", ""),))
    assert (c.url, c.path, c.upstream, c.dial_timeout) == ("https://c.example", "/v2", False, DIAL_SECONDS)
    assert (server.url, server.upstream, server.namespace) == ("https://up.quay.io", True, "quay.io")
    assert server.ca == ("/hosts/quay.io/up.pem",)
    assert "X-One" not in repr(b)


def test_capabilities() -> None:
    mirror, server = parse('[host."https://m"]\ncapabilities = ["pull"]', "quay.io", FILE)
    assert not mirror.serves(by_tag=True) and mirror.serves(by_tag=False)
    assert server.serves(by_tag=True) and server.serves(by_tag=False)


def test_docker_hub_is_known_by_two_names() -> None:
    (server,) = parse('server = "https://registry-1.docker.io"', "docker.io", FILE)
    assert server.namespace == ""
    mirror, own = parse('[host."https://mirror.gcr.io"]', "docker.io", FILE)
    assert (mirror.namespace, own.url, own.namespace) == ("docker.io", "https://registry-1.docker.io", "")


def test_a_loopback_registry_named_in_a_file_is_taken_at_its_word() -> None:
    (server,) = parse('server = "https://localhost:5000"', "localhost:5000", FILE)
    assert not server.plain_fallback
    mirror, own = parse('[host."https://localhost:5001"]', "localhost:5000", FILE)
    assert own.plain_fallback and not mirror.plain_fallback


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("server = ", "hosts.toml"),
        ("server = 3", "server a string"),
        ("host = 3", "tables"),
        ('[host]\n"x" = 3', "no table"),
        ('[host."ftp://x"]', "no http or https address"),
        ('[host."https://"]', "no http or https address"),
        ('[host."https://u:p@x"]', "no http or https address"),
        ('[host."https://x:99999"]', "no http or https address"),
        ('[host."https://x"]\ncapabilites = ["pull"]', "unknown key capabilites"),
        ('[host."https://x"]\ncapabilities = ["fly"]', "unknown capability fly"),
        ('[host."https://x"]\ncapabilities = 3', "array of strings"),
        ('[host."https://x"]\nskip_verify = "yes"', "neither true nor false"),
        ('[host."https://x"]\nclient = [["a"]]', "pair of files"),
        ('[host."https://x"]\nclient = 3', "array"),
        ('[host."https://x"]\ndial_timeout = 3', "no duration"),
        ('[host."https://x"]\ndial_timeout = "soon"', "no duration"),
        ('[host."https://x"]\nheader = 3', "no table"),
        ('[host."https://x"]\nheader = { A = "b\\nC: d" }', "not text"),
    ],
)
def test_mistakes_are_named_with_the_file(text: str, word: str) -> None:
    with pytest.raises(HostsError, match=word) as caught:
        parse(text, "quay.io", FILE)
    assert str(FILE) in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.io" / "hosts.toml").mkdir(parents=True)
    with pytest.raises(HostsError, match="directory"):
        read(tmp_path, "r.io")


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("10.0.0.1", "example.org", "::2", "")))
