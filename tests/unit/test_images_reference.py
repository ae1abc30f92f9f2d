"""Names of images: what people write and what it means (Docker's reference grammar)."""

from __future__ import annotations

import pytest

from tare.errors import InvalidArgument
from tare.images.reference import MalformedReference, Reference, is_digest, parse

HEX = "a" * 64
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox:1", "docker.io/library/busybox:1"),
        ("grafana/loki:3.0", "docker.io/grafana/loki:3.0"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
        ("[::1]:5000/a:1", "[::1]:5000/a:1"),
        ("quay.io/x/y-z__w.v:T_1.2-3", "quay.io/x/y-z__w.v:T_1.2-3"),
        ("Registry/x", "Registry/x:latest"),
        ("foo.com", "docker.io/library/foo.com:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1@{DIGEST}", f"docker.io/library/busybox:1@{DIGEST}"),
        (f"a.io/b@sha512:{HEX}{HEX}", f"a.io/b@sha512:{HEX}{HEX}"),
        (f"a.io/{HEX}", f"a.io/{HEX}:latest"),
    ],
)
def test_names_are_normalised_as_docker_does(text: str, meaning: str) -> None:
    assert str(parse(text)) == meaning
    assert parse(meaning) == parse(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        (HEX, "image ID"),
        ("UPPER", "lowercase"),
        ("a/UPPER", "lowercase"),
        ("x:", "no tag"),
        ("x:" + "t" * 129, "no tag"),
        ("x:-t", "no tag"),
        ("x@sha256:abc", "no digest"),
        (f"x@sha256:{'A' * 64}", "no digest"),
        (f"x@md5:{'a' * 32}", "no digest"),
        ("a//b", "''"),
        ("/a", "''"),
        ("a/", "''"),
        ("a___b", "separators"),
        ("a..b/c", "address"),
        ("x y", "separators"),
        ("x\n", "separators"),
        ("é", "separators"),
        ("host:/x", "address"),
        ("-host.io/x", "address"),
        ("../../etc/x", "address"),
        ("a.io/" + "x/" * 130 + "y", "255"),
        ("x" * 2000, "1024"),
    ],
)
def test_malformed_names_say_why(text: str, word: str) -> None:
    with pytest.raises(MalformedReference, match=word) as caught:
        parse(text)
    assert isinstance(caught.value, InvalidArgument)
    assert len(str(caught.value)) < 800


def test_a_digest_decides_over_a_tag() -> None:
    both = parse(f"quay.io/a/b:1@{DIGEST}")
    assert (both.tag, both.digest, both.target, both.tagged) == ("1", DIGEST, DIGEST, None)
    tagged = parse("quay.io/a/b:1")
    assert (tagged.target, tagged.tagged) == ("1", "quay.io/a/b:1")
    assert tagged.at(DIGEST) == f"quay.io/a/b@{DIGEST}"
    assert tagged.with_digest(DIGEST) == both
    assert tagged == Reference("quay.io", "a/b", "1")


def test_digests_are_whole_and_lowercase() -> None:
    assert is_digest(DIGEST)
    assert not is_digest(DIGEST[:-1])
    assert not is_digest(DIGEST + "\n")
    assert not is_digest(f"sha1:{'a' * 40}")
