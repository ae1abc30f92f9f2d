"""What [network] may say of networks by name, and what not; and how the command line asks for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.cli import request
from tare.config import load
from tare.errors import InvalidArgument
from tare.network.embedded import ANNOTATION

BLUE = '[network.networks.blue]\nsubnet = "10.7.0.0/24"\n'


def settings(directory: Path, text: str) -> str:
    """A file of settings."""
    path = directory / "tare.toml"
    path.write_text(text)
    return str(path)


def test_networks_by_name(tmp_path: Path) -> None:
    text = f'[network]\nisolation = ["link-local"]\n{BLUE}isolation = ["node", "link-local"]\n[network.networks.a-b]\n'
    network = load(settings(tmp_path, text)).network
    assert network.isolation == ("link-local",)
    assert sorted(network.networks) == ["a-b", "blue"]
    assert (network.networks["blue"].subnet, network.networks["blue"].isolation) == (
        "10.7.0.0/24",
        ("node", "link-local"),
    )
    assert network.networks["a-b"].bridge == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[network.networks.host]\n",
            r"\[network.networks.host\]: a network's name is lower-case .* default, pod, host",
        ),
        ("[network.networks.Blue]\n", "a network's name is lower-case letters"),
        ('[network.networks."-"]\n', "a network's name is lower-case letters"),
        ("[network]\nnetworks = 3\n", r"\[network.networks\] is not a table"),
        ("[network]\nnetworks.blue = 3\n", r"\[network.networks.blue\] is not a table"),
        (f"{BLUE}mask = 3\n", r"unknown key mask in \[network.networks.blue\]"),
        (f"{BLUE}mtu = '3'\n", "Expected `int`, got `str`"),
        ('[network]\nisolation = ["moon"]\n', "Invalid enum value 'moon'"),
        (f'[network]\nmode = "cni"\n{BLUE}', r"networks is the embedded network's, and mode is .cni.* its plugins"),
        ('[network]\nmode = "cni"\nisolation = ["node"]\n', "isolation is the embedded network's"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        load(settings(tmp_path, text))


@pytest.mark.parametrize(
    ("network", "annotation"), [("pod", None), ("host", None), ("blue", "blue"), ("default", "default")]
)
def test_the_command_line_asks_by_annotation(network: str, annotation: str | None) -> None:
    options = request.RunOptions(image="busybox", token="0" * 32, log_directory="/logs", network=network)
    assert request.pod_config(options).annotations.get(ANNOTATION) == annotation
