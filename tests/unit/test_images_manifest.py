"""Manifests, indexes and configurations: what is read, and what is refused in which words."""

from __future__ import annotations

import json

import pytest

from tare.images.manifest import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Index,
    Manifest,
    ManifestError,
    parse_config,
    parse_manifest,
)
from tare.images.records import ImageConfig

DIGEST = "sha256:" + "a" * 64
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def manifest(**changes: object) -> dict[str, object]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": DIGEST, "size": 7},
        "layers": [{"mediaType": OCI_LAYER, "digest": DIGEST, "size": 9}],
        **changes,
    }


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def test_oci_manifest() -> None:
    parsed = parse_manifest(dump(manifest(annotations={"a": "b"}, unknown=[1])))
    assert isinstance(parsed, Manifest)
    assert (parsed.config.size, parsed.layers[0].size, parsed.layers[0].media_type) == (7, 9, OCI_LAYER)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "application/vnd.cncf.helm.config.v1+json"),
        ({"artifactType": "application/vnd.tests.model"}, "application/vnd.tests.model"),
        ({"layers": []}, "application/vnd.cncf.helm.config.v1+json"),
    ],
)
def test_an_artifact_says_of_what_type(changes: dict[str, object], kind: str) -> None:
    config = {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": DIGEST, "size": 1}
    blob = {"mediaType": "image/png", "digest": DIGEST, "size": 1, "annotations": {"a": "b"}}
    parsed = parse_manifest(dump(manifest(**{"config": config, "layers": [blob], **changes})))
    assert isinstance(parsed, Manifest) and parsed.artifact_type == kind
    assert all(layer.annotations == {"a": "b"} for layer in parsed.layers)


def test_an_image_with_an_artifact_type_and_an_encrypted_layer_is_an_image() -> None:
    layer = {"mediaType": OCI_LAYER + "+encrypted", "digest": DIGEST, "size": 9}
    parsed = parse_manifest(dump(manifest(artifactType="x/y", layers=[layer])))
    assert isinstance(parsed, Manifest) and parsed.artifact_type == ""


def test_docker_manifest_and_list() -> None:
    layer = {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "digest": DIGEST, "size": 9}
    config = {"mediaType": DOCKER_CONFIG, "digest": DIGEST, "size": 7}
    assert isinstance(
        parse_manifest(dump(manifest(mediaType=DOCKER_MANIFEST, layers=[layer], config=config))), Manifest
    )
    entry = {
        "mediaType": DOCKER_MANIFEST,
        "digest": DIGEST,
        "size": 1,
        "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"},
    }
    parsed = parse_manifest(dump({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry]}))
    assert isinstance(parsed, Index)
    assert str(parsed.manifests[0].platform) == "linux/arm64/v8"


def test_a_document_without_a_type_is_told_by_its_shape_and_content_type() -> None:
    assert isinstance(parse_manifest(dump(manifest(mediaType=""))), Manifest)
    assert isinstance(parse_manifest(dump({"schemaVersion": 2, "manifests": []})), Index)
    assert isinstance(parse_manifest(dump({"schemaVersion": 2, "manifests": []}), f"{OCI_INDEX}; charset=utf-8"), Index)


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"schemaVersion": 1, "fsLayers": [], "history": []}, "schema 1"),
        ({"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"}, "schema 1"),
        (manifest(schemaVersion=3), "schema version 3"),
        (manifest(schemaVersion="2"), "Expected `int`"),
        (manifest(manifests=[]), "CVE-2021-41190"),
        ({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "layers": []}, "CVE-2021-41190"),
        ({"schemaVersion": 2, "mediaType": "text/html"}, "no image manifest"),
        (manifest(layers=[{"mediaType": "text/plain+encrypted", "digest": DIGEST, "size": 1}]), "unknown type"),
        (manifest(layers=[{"mediaType": "image/png", "digest": DIGEST, "size": 1}]), "unknown type"),
        (manifest(layers=[{"mediaType": OCI_LAYER, "digest": DIGEST, "size": 1}] * 501), "501 layers"),
        (manifest(layers=[{"mediaType": OCI_LAYER, "digest": "sha256:../../x", "size": 1}]), "no digest"),
        (manifest(layers=[{"mediaType": OCI_LAYER, "digest": DIGEST, "size": -1}]), "-1 bytes"),
        (manifest(layers="x"), "array"),
        ([], "object"),
    ],
)
def test_what_is_no_image_is_refused(document: object, word: str) -> None:
    with pytest.raises(ManifestError, match=word):
        parse_manifest(dump(document))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(data)
    with pytest.raises(ManifestError):
        parse_config(data)


def test_config_of_a_container() -> None:
    document = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
        "config": {
            "User": "1000:50",
            "Env": ["A=1", "A=2"],
            "Entrypoint": ["/e"],
            "Cmd": None,
            "WorkingDir": "/w",
            "Volumes": {"/b": {}, "/a": {}},
            "StopSignal": "SIGQUIT",
            "Labels": {"x": "y"},
            "ExposedPorts": {"80/tcp": {}},
            "Healthcheck": {"Test": ["NONE"]},
        },
        "history": [{"created_by": "x"}],
    }
    parsed = parse_config(dump(document))
    assert (str(parsed.platform), parsed.diff_ids) == ("linux/amd64", (DIGEST,))
    assert parsed.config == ImageConfig(
        user="1000:50",
        env=("A=1", "A=2"),
        entrypoint=("/e",),
        working_dir="/w",
        volumes=("/a", "/b"),
        stop_signal="SIGQUIT",
        labels={"x": "y"},
        exposed_ports=("80/tcp",),
    )


def test_config_may_be_nearly_empty() -> None:
    for document in ({}, {"config": None}, {"config": {}, "rootfs": {"type": "layers", "diff_ids": None}}):
        assert parse_config(dump(document)).config == ImageConfig()


def test_config_with_a_bad_diff_id_is_refused() -> None:
    with pytest.raises(ManifestError, match="diff ID"):
        parse_config(dump({"rootfs": {"type": "layers", "diff_ids": ["sha256:x"]}}))
