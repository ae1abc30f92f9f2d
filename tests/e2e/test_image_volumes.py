"""Image volumes, artifacts, declared volumes and the policy through the gRPC socket of a real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.images import busybox_image, make_image
from tests.support.node import Node, busy_node
from tests.support.registry import Registry
from tests.support.signing import Key, upload_artifact, upload_signature

pytestmark = pytest.mark.root

KEY = Key.make("ecdsa")


class Site:
    """A node, a registry with images to mount, and the node's policy file."""

    def __init__(self, node: Node, registry: Registry, directory: Path) -> None:
        self.node = node
        self.registry = registry
        self.directory = directory

    def name(self, image: str) -> str:
        """A name in the registry."""
        return f"{self.registry.url}/{image}"

    def policy(self, text: str = "") -> None:
        """What the policy is from now on."""
        (self.directory / "policy.toml").write_text(text.format(registry=self.registry.url))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("volumes")
    (directory / "team.pub").write_bytes(KEY.public)
    (directory / "policy.toml").touch()
    settings = f'[images]\npolicy = "{directory}/policy.toml"\n'
    with Registry(directory / "registry") as registry, busy_node("volumes", settings=settings) as node:
        site = Site(node, registry, directory)
        tree = make_image(directory / "tree", [{"d/a": "lower", "d/b": "b", "top": "t"}, {"d/a": "upper"}])
        registry.push(tree, "vol/tree:1")
        config: dict[str, object] = {"Volumes": {"/var/lib/db": {}, "/tmp": {}, "data/": {}}}
        registry.push(busybox_image(directory / "declared", config=config), "vol/declared:1")
        upload_artifact(registry, "vol/model:1", {"model.bin": b"weights", "c/x": b"{}"}, directory / "artifact")
        for image in ("vol/tree:1", "vol/declared:1", "vol/model:1"):
            node.pull(site.name(image))
        yield site


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """The site, on which each test must leave nothing."""
    yield shared
    shared.policy()
    shared.node.remove_all()
    assert shared.node.settled() == []


def volume(image: str, sub_path: str = "", *, readonly: bool = True) -> pb.Mount:
    """A mount of an image at /v."""
    spec = pb.ImageSpec(image=image, user_specified_image=image)
    return pb.Mount(container_path="/v", image=spec, image_sub_path=sub_path, readonly=readonly)


def output(site: Site, name: str, mount: pb.Mount, command: str) -> list[str]:
    """What a container with this mount writes."""
    pod = site.node.run_pod(name)
    config = site.node.container_config("main", "sh", "-c", command, mounts=[mount])
    container = site.node.start(site.node.create(pod, config))
    assert site.node.wait(container).exit_code == 0, site.node.log(container)
    return site.node.log(container)


def test_an_image_is_mounted_and_told_of(site: Site) -> None:
    node, name = site.node, site.name("vol/tree:1")
    pod = node.run_pod("mounted")
    container = node.create(pod, node.container_config("main", "sleep", "1000", mounts=[volume(name)]))
    node.start(container)
    shown = node.exec(container, "sh", "-c", "cat /v/d/a /v/d/b /v/top; touch /v/x 2>&1").stdout.decode()
    assert shown == "upperbttouch: /v/x: Read-only file system\n"
    (mount,) = node.status(container).mounts
    assert (mount.container_path, mount.readonly, mount.image.image) == ("/v", True, name)
    assert mount.image.image_ref == node.pull(name)


@pytest.mark.parametrize(("path", "listed"), [("d", ["a", "b"]), ("./d/", ["a", "b"])])
def test_a_sub_path(site: Site, path: str, listed: list[str]) -> None:
    assert output(site, f"sub-{len(path)}", volume(site.name("vol/tree:1"), path), "ls /v") == listed


def test_an_artifact_is_mounted(site: Site) -> None:
    name = site.name("vol/model:1")
    assert output(site, "artifact", volume(name), "echo $(cat /v/model.bin); ls -R /v; ! touch /v/x 2>/dev/null") == [
        "weights",
        "/v:",
        "c",
        "model.bin",
        "",
        "/v/c:",
        "x",
    ]
    site.node.remove_all()
    assert output(site, "file", volume(name, "model.bin"), "echo $(cat /v)") == ["weights"]


def test_layers_are_held_as_long_as_the_container(site: Site) -> None:
    node = site.node
    layout = make_image(site.directory / "held", [{"f": "held"}])
    site.registry.push(layout, "vol/held:1")
    image = node.pull(site.name("vol/held:1"))
    pod = node.run_pod("held")
    container = node.create(pod, node.container_config("main", "sh", "-c", "echo $(cat /v/f)", mounts=[volume(image)]))
    client = node.daemon.client
    client.call(client.images.RemoveImage, pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))
    layers = set((node.daemon.root / "layers").iterdir())
    node.start(container)
    node.wait(container)
    assert node.log(container) == ["held"]
    node.remove(container)
    client.call(
        client.images.RemoveImage, pb.RemoveImageRequest(image=pb.ImageSpec(image=node.pull(site.name("vol/held:1"))))
    )
    assert len(layers - set((node.daemon.root / "layers").iterdir())) == 1


def test_what_cannot_be_mounted(site: Site) -> None:
    node, name = site.node, site.name("vol/tree:1")
    pod = node.run_pod("refused")

    def refused(mount: pb.Mount, words: str, status: str = "UNKNOWN") -> None:
        node.refused(status, words, node.create, pod, node.container_config("main", "true", mounts=[mount]))

    refused(volume(name, "not/there"), "ImageVolumeMountFailed: mount image")
    refused(volume(name, "top/below"), "does not exist in the image")
    refused(volume(site.name("vol/absent:1")), "there is no such image")
    refused(volume("not a name"), "ImageVolumeMountFailed: mount image not a name")
    refused(volume(name, readonly=False), "read-only")
    refused(volume(name, "../d"), "..", "INVALID_ARGUMENT")
    refused(volume(name, "/d"), "must be relative", "INVALID_ARGUMENT")
    config = node.container_config("main", "true")
    config.image.image = site.name("vol/model:1")
    node.refused("INVALID_ARGUMENT", "is an OCI artifact", node.create, pod, config)


def test_declared_volumes_are_there(site: Site) -> None:
    node = site.node
    pod = node.run_pod("declared")
    config = node.container_config("main", "sh", "-c", "stat -c '%n %a %F' /var/lib/db /tmp /data; touch /var/lib/db/x")
    config.image.image = site.name("vol/declared:1")
    container = node.start(node.create(pod, config))
    assert node.wait(container).exit_code == 0
    mode = node.log(container)[1].split()[1]
    assert node.log(container) == ["/var/lib/db 755 directory", f"/tmp {mode} directory", "/data 755 directory"]


def test_the_policy_is_asked_again(site: Site) -> None:
    node = site.node
    name = site.name("team/app:1")
    digest = site.registry.push(busybox_image(site.directory / "app"), "team/app:1")
    image = node.pull(name)
    pod = node.run_pod("policy")
    signed = '[repositories]\n"{registry}/team" = {{ keys = ["team.pub"] }}\n'
    site.policy(signed)
    config = node.container_config("main", "true")
    config.image.image, config.image.user_specified_image = image, name
    node.refused("UNKNOWN", "SignatureValidationFailed: ", node.create, pod, config)
    mounted = node.container_config("other", "true", mounts=[volume(name)])
    node.refused("UNKNOWN", "SignatureValidationFailed: ", node.create, pod, mounted)
    node.refused("UNKNOWN", "SignatureValidationFailed: pull image", node.pull, name)
    upload_signature(site.registry, "team/app", digest, KEY, site.directory / "signature")
    assert node.pull(name) == image
    assert node.wait(node.start(node.create(pod, config))).exit_code == 0
    site.policy('default = "reject"')
    node.refused("UNKNOWN", "the default rule", node.create, pod, node.container_config("third", "true"))
