"""Chains of CNI plugins, run by nobody: in which order, with which version, and what is left out where a list says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tare.config import NetworkConfig
from tare.errors import InternalError
from tare.handlers.commands import Ended
from tare.network.cni import config
from tare.network.cni.cache import Attachment
from tare.network.cni.chain import Chain
from tare.network.cni.driver import CniNetwork, Held
from tare.network.cni.plugins import Plugins
from tare.state.database import Database

VERSIONS = json.dumps({"supportedVersions": list(config.VERSIONS)})
ATTACHED = Attachment(container_id="c", network="pods", interface="eth0", netns="/n", config=b"", result={"ips": []})


class Recorder:
    """Answers VERSION, and to all else what `answer` says of (verb, plugin); notes (verb, plugin, what it was told)."""

    def __init__(self, answer: Callable[[str, str], tuple[int, str]] = lambda verb, kind: (0, "")) -> None:
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self._answer = answer

    async def capture(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout: float
    ) -> tuple[Ended, str]:
        verb, kind = env["CNI_COMMAND"], Path(argv[0]).name
        self.calls.append((verb, kind, json.loads(stdin)))
        code, output = (0, VERSIONS) if verb == "VERSION" else self._answer(verb, kind)
        return Ended(code, ""), output

    def order(self, verb: str) -> list[str]:
        """Which plugins were called with a verb."""
        return [kind for called, kind, _ in self.calls if called == verb]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("one", "two"):
        (directory / name).touch(0o755)
    return directory


def chain(programs: Path, recorder: Recorder) -> Chain:
    return Chain(Plugins(recorder, [str(programs)], 1.0))


def two(version: str, **more: Any) -> str:
    plugins = [{"type": "one"}, {"type": "two"}]
    return json.dumps({"cniVersion": version, "name": "pods", "plugins": plugins, **more})


def test_deletion_goes_backwards_and_ends_at_the_first_failure(programs: Path) -> None:
    recorder = Recorder(lambda verb, kind: (1, '{"code": 5, "msg": "no"}') if kind == "two" else (0, ""))
    with pytest.raises(InternalError, match=r"plugin two, DEL: no; input or output failed \(code 5\)"):
        asyncio.run(chain(programs, recorder).delete(config.parse(two("1.0.0"), "a.conflist"), ATTACHED))
    assert recorder.order("DEL") == ["two"]


@pytest.mark.parametrize("version", config.VERSIONS)
def test_what_a_version_has(programs: Path, version: str) -> None:
    """DEL is told the result since 0.4.0, which brought CHECK; STATUS and GC came with 1.1.0."""
    recorder = Recorder()
    network, runs = config.parse(two(version), "a.conflist"), chain(programs, recorder)

    async def all_of_it() -> None:
        await runs.delete(network, ATTACHED)
        await runs.check(network, ATTACHED)
        await runs.status(network)
        assert await runs.collect(network, [("c", "eth0")]) == []

    asyncio.run(all_of_it())
    told = {verb: value for verb, _, value in recorder.calls}
    assert ("prevResult" in told["DEL"]) == ("CHECK" in told) == (version != "0.3.1")
    assert ("STATUS" in told) == ("GC" in told) == (version == "1.1.0")
    assert recorder.order("DEL") == ["two", "one"]
    if version == "1.1.0":
        assert told["GC"]["cni.dev/valid-attachments"] == [{"containerID": "c", "ifname": "eth0"}]


def test_what_a_list_goes_without(programs: Path) -> None:
    recorder = Recorder()
    network = config.parse(two("1.1.0", disableCheck=True, disableGC="true"), "a.conflist")
    runs = chain(programs, recorder)
    asyncio.run(runs.check(network, ATTACHED))
    assert asyncio.run(runs.collect(network, [])) == [] and recorder.calls == []


def test_collection_goes_past_a_failure(programs: Path) -> None:
    recorder = Recorder(lambda verb, kind: (int(kind == "one"), "nonsense"))
    failures = asyncio.run(chain(programs, recorder).collect(config.parse(two("1.1.0"), "a.conflist"), []))
    assert recorder.order("GC") == ["one", "two"]
    assert [str(error) for error in failures] == [
        "collect what belongs to no pod: network pods of a.conflist: at step plugin one, GC: it ended with 1; it printed 'nonsense'"
        " (bring a build of the plugin that works here, or take it out of the list)"
    ]


def test_versions_are_asked_once_for_a_program(programs: Path) -> None:
    recorder = Recorder()
    runs, network = chain(programs, recorder), config.parse(two("1.0.0"), "a.conflist")
    asyncio.run(runs.ready(network))
    asyncio.run(runs.ready(network))
    assert recorder.order("VERSION") == ["one", "two"]
    (programs / "two").write_text("a newer one")
    asyncio.run(runs.ready(network))
    assert recorder.order("VERSION") == ["one", "two", "two"]


@pytest.mark.parametrize("wanted", [True, False])
def test_collection_at_start_can_be_switched_off(programs: Path, tmp_path: Path, wanted: bool) -> None:
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / "a.conflist").write_text(two("1.1.0"))
    settings = NetworkConfig(
        mode="cni",
        conf_dir=str(tmp_path / "net.d"),
        cache_dir=str(tmp_path / "cache"),
        bin_dirs=(str(programs),),
        gc=wanted,
    )
    recorder, database = Recorder(), Database(tmp_path / "state.db")

    async def start() -> None:
        network = CniNetwork(database, settings, recorder)
        await network.setup()
        await network.recover(set())
        async with asyncio.timeout(10):
            while len(recorder.order("GC")) < 2 * wanted:
                await asyncio.sleep(0.01)
        for _ in range(5):  # more turns than GC would take to begin
            await network.look()
        assert network.status() is None
        await network.close()

    asyncio.run(start())
    database.close()
    assert recorder.order("GC") == ["one", "two"] * wanted
    assert recorder.order("STATUS") == ["one", "two"]


def test_a_deletion_before_recovery_is_left_to_the_background(programs: Path, tmp_path: Path) -> None:
    """A daemon that starts finishes what was under way, and must not wait for a plugin with each pod."""
    settings = NetworkConfig(mode="cni", conf_dir=str(tmp_path), cache_dir=str(tmp_path), bin_dirs=(str(programs),))
    recorder, database = Recorder(), Database(tmp_path / "state.db")
    held = Held(network="pods", netns="/n", config=two("1.1.0"), args=(), capabilities={})

    async def start() -> None:
        network = CniNetwork(database, settings, recorder, active=False)
        database.table("cni_attachments", Held).put("a", held)
        await network.detach("a")
        assert (recorder.calls, network.describe()["deletionsDue"]) == ([], {"a": "left by an earlier daemon"})
        await network.recover(set())
        async with asyncio.timeout(10):
            while network.describe()["deletionsDue"]:
                await asyncio.sleep(0.01)
        assert recorder.order("DEL") == ["two", "one"]
        database.table("cni_attachments", Held).put("b", held)
        await asyncio.gather(network.detach("b"), network.detach("b"))
        assert recorder.order("DEL") == ["two", "one"] * 2
        await network.close()

    asyncio.run(start())
    database.close()
