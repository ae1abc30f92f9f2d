"""How the daemon is watched: log lines, counters of calls and steps, spans in the caller's trace; and nothing of it where nobody asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tare import subject
from tare.config import Config, MetricsConfig, TracingConfig, differences, load
from tare.cri.v1 import api_pb2 as pb
from tare.errors import InvalidArgument, NotFound, ResourceExhausted
from tare.observe import logs
from tare.observe.endpoint import MAX_CONNECTIONS, Endpoint
from tare.observe.gauges import Gauges
from tare.observe.metrics import Metrics
from tare.observe.tracing import Tracing, ids
from tare.observe.watch import Watch
from tare.state.database import Database
from tare.state.operations import Operation, Operations, Step
from tests.support.cri_ports import Client, MemoryImages, MemoryRuntime, serving

RUNTIME = "runtime.v1.RuntimeService"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    """A line of the log."""
    return logging.LogRecord("tare.x", level, __file__, 1, message, (), None)


async def formatted(form: logging.Formatter, message: str, names: Mapping[str, str]) -> str:
    """A line, written by work that is about these."""
    subject.bind(**names)
    return form.format(record(message))


# The log


def test_a_json_line_has_what_it_is_about_and_its_trace() -> None:
    form = logs.Json(lambda: {"trace_id": TRACE})
    line = json.loads(asyncio.run(formatted(form, "é\nx", {"method": "StartContainer", "pod": "p1", "container": ""})))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "tare.x",
        "message": "é\nx",
        "method": "StartContainer",
        "pod": "p1",
        "trace_id": TRACE,
    }


def test_a_json_line_is_one_line_with_its_traceback() -> None:
    try:
        raise ValueError("so\nit is")
    except ValueError:
        failed = logging.LogRecord("tare.x", logging.ERROR, __file__, 1, "failed: %d", (3,), sys.exc_info())
    text = logs.Json().format(failed)
    line = json.loads(text)
    assert "\n" not in text
    assert line["message"] == "failed: 3"
    assert "ValueError: so\nit is" in line["exception"]


def test_a_console_line_adds_what_its_words_do_not_say() -> None:
    names = {"method": "StopContainer", "pod": "p1", "container": "c1"}
    assert asyncio.run(formatted(logs.Console(), "container c1 ended", names)).endswith(
        "INFO tare.x: container c1 ended [method=StopContainer pod=p1]"
    )
    assert logs.Console().format(record("nothing")).endswith("INFO tare.x: nothing")


def test_a_binding_is_its_tasks_own() -> None:
    async def task(name: str) -> Mapping[str, str]:
        subject.bind(pod=name)
        await asyncio.sleep(0)
        return subject.bound()

    async def play() -> tuple[Mapping[str, str], ...]:
        subject.bind(method="M")
        found = await asyncio.gather(asyncio.create_task(task("a")), asyncio.create_task(task("b")))
        return (*found, subject.bound())

    assert asyncio.run(play()) == ({"method": "M", "pod": "a"}, {"method": "M", "pod": "b"}, {"method": "M"})


def test_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.Logger("root", logging.INFO)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    assert (logs.set_level("debug"), logs.level(), logs.set_level("error"), logs.level()) == (
        "info",
        "debug",
        "debug",
        "error",
    )
    with pytest.raises(InvalidArgument, match="the levels are debug, info"):
        logs.set_level("loud")
    assert logs.level() == "error"


# Settings


@pytest.mark.parametrize(
    ("text", "place"), [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("[::1]:0", ("::1", 0)), ("0.0.0.0:1", ("0.0.0.0", 1))]
)
def test_addresses(text: str, place: tuple[str, int]) -> None:
    assert MetricsConfig(address=text).place() == place


@pytest.mark.parametrize(
    "lines",
    [
        '[metrics]\naddress = "localhost:1"',
        '[metrics]\naddress = "127.0.0.1"',
        '[metrics]\naddress = "::1:9464"',
        '[metrics]\naddress = "127.0.0.1:65536"',
        '[tracing]\nendpoint = "127.0.0.1:4317"',
        '[tracing]\nendpoint = "http://collector"',
        "[tracing]\nsampling_ratio = 1.5",
        '[daemon]\nlog_level = "loud"',
        '[daemon]\nlog_format = "xml"',
    ],
)
def test_settings_that_are_refused(tmp_path: Path, lines: str) -> None:
    (tmp_path / "config.toml").write_text(lines)
    with pytest.raises(InvalidArgument, match=lines.partition("\n")[2].partition(" ")[0]):
        load(str(tmp_path / "config.toml"))


def test_differences_name_their_keys() -> None:
    other = Config(metrics=MetricsConfig(address="127.0.0.1:1"), tracing=TracingConfig(sampling_ratio=0.5))
    assert differences(Config(), Config()) == []
    assert differences(Config(), other) == ["metrics.address", "tracing.sampling_ratio"]


# Calls


@asynccontextmanager
async def watched(path: Path, watch: Watch, images: MemoryImages | None = None) -> AsyncIterator[Client]:
    """A server whose calls are watched, and a client."""
    async with serving(path / "s", MemoryRuntime(), images, watch) as client:
        yield client


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample."""
    return metrics.registry.get_sample_value(name, labels)


def test_calls_are_counted_by_method_and_code(tmp_path: Path) -> None:
    metrics = Metrics()

    async def play() -> None:
        async with watched(tmp_path, Watch(metrics), MemoryImages(failure=ResourceExhausted("pull"))) as client:
            await client.runtime.Version(pb.VersionRequest())
            await client.runtime.Version(pb.VersionRequest())
            for call in (
                client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id="ab")),
                client.images.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image="busybox"))),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
            pieces = [piece async for piece in client.runtime.StreamContainers(pb.StreamContainersRequest())]
            assert pieces == []
            follower = client.runtime.GetContainerEvents(pb.GetEventsRequest())
            await follower.initial_metadata()
            assert value(metrics, "tare_calls", service=RUNTIME, method="GetContainerEvents") == 1
            follower.cancel()
            while value(metrics, "tare_calls", service=RUNTIME, method="GetContainerEvents"):
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(play(), 30))
    counts = {
        (sample.labels["method"], sample.labels["code"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "tare_call_seconds_count"
    }
    assert counts == {
        ("Version", "OK"): 2,
        ("ContainerStatus", "NOT_FOUND"): 1,
        ("PullImage", "UNKNOWN"): 1,
        ("StreamContainers", "OK"): 1,
        ("GetContainerEvents", "CANCELLED"): 1,
    }
    assert value(metrics, "tare_calls", service=RUNTIME, method="Version") == 0


# Operations


async def nothing(_: str) -> None:
    """A step that works."""


async def fail(_: str) -> None:
    """One that does not."""
    raise NotFound("find it")


async def fail_in_undo(_: str) -> None:
    """One whose undo does not."""
    raise RuntimeError("a defect")


SOUND: Operation[str] = Operation("RunPodSandbox", (Step("one", nothing, nothing), Step("two", nothing)))
BROKEN: Operation[str] = Operation("PullImage", (Step("one", nothing, fail_in_undo), Step("two", fail, nothing)))


async def operate(directory: Path, watch: Watch) -> None:
    """One operation that works and one that does not."""
    database = Database(directory / "boot.db")
    try:
        operations = Operations(database, watch)
        await operations.run(SOUND, "x", {"pod": "p1"})
        with pytest.raises(NotFound):
            await operations.run(BROKEN, "x", {"reference": "busybox"})
    finally:
        database.close()


def test_steps_are_counted_and_what_takes_them_back(tmp_path: Path) -> None:
    metrics = Metrics()
    asyncio.run(operate(tmp_path, Watch(metrics)))
    counts = {
        tuple(sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name in ("tare_operation_step_seconds_count", "tare_operation_seconds_count")
    }
    assert counts == {
        ("RunPodSandbox", "OK"): 1,
        ("RunPodSandbox", "one", "OK"): 1,
        ("RunPodSandbox", "two", "OK"): 1,
        ("PullImage", "NOT_FOUND"): 1,
        ("PullImage", "one", "OK"): 1,
        ("PullImage", "two", "NOT_FOUND"): 1,
        ("PullImage", "undo two", "OK"): 1,
        ("PullImage", "undo one", "INTERNAL"): 1,
    }
    assert value(metrics, "tare_image_pull_seconds_count", code="NOT_FOUND") == 1


# Traces


def named(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans that came, by name."""
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_call_is_in_its_callers_trace_and_its_steps_are_in_it(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(TracingConfig(endpoint="http://127.0.0.1:1", sampling_ratio=0.0), exporter)
    watch = Watch(tracer=tracing)
    seen: list[Mapping[str, str]] = []

    class Images(MemoryImages):
        async def pull(self, reference: str, auth: object) -> object:  # type: ignore[override]
            # As a pull does it: in a task of its own, which the caller may leave.
            await asyncio.create_task(operate(tmp_path, watch))
            seen.append(ids())
            raise ResourceExhausted("pull", cause="no room")

    async def play() -> None:
        async with watched(tmp_path, watch, Images()) as client:
            request = pb.PullImageRequest(image=pb.ImageSpec(image="busybox"))
            with pytest.raises(grpc.aio.AioRpcError):
                await client.images.PullImage(request, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
            # Neither a caller that keeps nothing nor one that says nothing is traced at this ratio.
            await client.runtime.Version(
                pb.VersionRequest(), metadata=(("traceparent", f"00-{'1' * 32}-{PARENT}-00"), ("x-bin", b"\xff"))
            )
            await client.runtime.Version(pb.VersionRequest())

    asyncio.run(asyncio.wait_for(play(), 30))
    tracing.close()
    spans = named(exporter)
    assert set(spans) == {
        "runtime.v1.ImageService/PullImage",
        "RunPodSandbox",
        "RunPodSandbox one",
        "RunPodSandbox two",
        "PullImage",
        "PullImage one",
        "PullImage two",
        "PullImage undo one",
        "PullImage undo two",
    }
    call = spans["runtime.v1.ImageService/PullImage"]
    assert call.context is not None and call.parent is not None
    assert (f"{call.context.trace_id:032x}", f"{call.parent.span_id:016x}") == (TRACE, PARENT)
    assert call.status.description == "pull: no room"
    for child, parent in (("PullImage", call.name), ("PullImage undo one", "PullImage"), ("RunPodSandbox", call.name)):
        above = spans[parent].context
        found = spans[child].parent
        assert above is not None and found is not None and found.span_id == above.span_id
    assert spans["RunPodSandbox"].attributes == {"tare.pod.id": "p1"}
    assert seen == [{"trace_id": TRACE, "span_id": f"{call.context.span_id:016x}"}]
    assert ids() == {}


# Where nobody asks


def test_nothing_is_imported_that_nobody_asks_for() -> None:
    code = (
        "import sys, tare.app\n"
        "from tare.config import Config\n"
        "from tare.observe.observers import Observers\n"
        "assert Observers(Config()).watch is None\n"
        "print([name for name in ('prometheus_client', 'opentelemetry', 'aiohttp.web') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "[]\n"


def test_a_trace_without_its_packages_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from tare.config import Config, TracingConfig\n"
        "from tare.errors import FailedPrecondition\n"
        "from tare.observe.observers import Observers\n"
        "try:\n"
        "    Observers(Config(tracing=TracingConfig(endpoint='http://127.0.0.1:4317')))\n"
        "except FailedPrecondition as error:\n"
        "    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'tare[tracing]'" in result.stdout


# The endpoint


class Still(Gauges):
    """Gauges of nothing."""

    def __init__(self) -> None:
        self._families = []

    async def refresh(self) -> None:
        """Nothing to look at."""


def test_the_endpoint_has_so_many_connections_and_none_for_long() -> None:
    async def scrape(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def play() -> None:
        endpoint = Endpoint(Metrics().registry, Still(), "127.0.0.1", 0, life=3.0)
        await endpoint.start()
        try:
            first = await scrape(endpoint.port)
            assert first.startswith(b"HTTP/1.1 200 OK") and b"\r\nConnection: close\r\n" in first
            assert b"tare_build_info" in first
            silent = [await asyncio.open_connection("127.0.0.1", endpoint.port) for _ in range(MAX_CONNECTIONS)]
            assert await scrape(endpoint.port) == b""
            for reader, writer in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
            assert (await scrape(endpoint.port)).startswith(b"HTTP/1.1 200 OK")
        finally:
            await endpoint.stop()

    asyncio.run(asyncio.wait_for(play(), 60))


class Stuck(Still):
    """Gauges whose look does not end."""

    def __init__(self) -> None:
        super().__init__()
        self.looking = asyncio.Event()

    async def refresh(self) -> None:
        """For ever."""
        self.looking.set()
        await asyncio.Event().wait()


def test_an_answer_that_does_not_come_does_not_hold_up_the_daemons_end() -> None:
    async def play() -> None:
        gauges = Stuck()
        endpoint = Endpoint(Metrics().registry, gauges, "127.0.0.1", 0, life=300.0)
        await endpoint.start()
        _, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await gauges.looking.wait()
        async with asyncio.timeout(20):
            await endpoint.stop()
        writer.close()

    asyncio.run(asyncio.wait_for(play(), 60))
