"""Who may pull what: htpasswd and bearer tokens against the real docker-registry; credentials go nowhere else and are never shown."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.errors import UnknownError
from tare.images.auth import RegistryAuth
from tare.images.errors import PullError
from tests.support.image_service import files_of, image_service, write_hosts
from tests.support.images import make_image
from tests.support.proxy import Asked, Fault, FaultProxy
from tests.support.registry import Registry
from tests.support.tokens import TokenServer

pytestmark = pytest.mark.root

PASSWORD = "pass-w0rd"
ALICE = RegistryAuth(username="alice", password=PASSWORD)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with htpasswd, and the images of alice and bob in it."""
    directory = tmp_path_factory.mktemp("locked")
    layout = make_image(directory / "layout", [{"secret": "s"}])
    with Registry(directory / "registry", users={"alice": PASSWORD, "bob": "b"}) as registry:
        registry.push(layout, "alice/image:1", credentials=f"alice:{PASSWORD}")
        yield registry


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    """A token server that lets alice at everything, bob at his own, everybody at what is public."""
    allowed = {"alice": {"*"}, "bob": {"bob/*"}, "": {"public/*"}}
    with TokenServer(
        tmp_path_factory.mktemp("tokens"), users={"alice": PASSWORD, "bob": "b"}, allowed=allowed
    ) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tokens: TokenServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for bearer tokens."""
    directory = tmp_path_factory.mktemp("guarded")
    layout = make_image(directory / "layout", [{"secret": "s"}])
    with Registry(directory / "registry", token=tokens.auth) as registry:
        for name in ("alice/image:1", "bob/image:1", "public/image:1"):
            registry.push(layout, name, credentials=f"alice:{PASSWORD}")
        yield registry


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "auth",
    [ALICE, RegistryAuth(auth=encoded(f"alice:{PASSWORD}")), RegistryAuth(username="bob", password="b")],
)
def test_basic(locked: Registry, tmp_path: Path, auth: RegistryAuth) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            assert (await service.pull(f"{locked.url}/alice/image:1", auth)).size > 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("auth", "words"),
    [
        (None, "none were given"),
        (RegistryAuth(), "none were given"),
        (RegistryAuth(username="alice", password="wr0ng-one"), "status 401"),
        (RegistryAuth(username="eve", password=PASSWORD), "status 401"),
        (RegistryAuth(username="alice", password=PASSWORD, server_address="other.example"), "none were given"),
        (RegistryAuth(auth="no base64"), "not base64"),
    ],
)
def test_without_the_right_password_nothing_is_answered_from_the_cache_either(
    locked: Registry, tmp_path: Path, auth: RegistryAuth | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        async with image_service(tmp_path) as service:
            for cached in (False, True):
                if cached:
                    await service.pull(f"{locked.url}/alice/image:1", ALICE)
                with pytest.raises(UnknownError, match=words) as caught:
                    await service.pull(f"{locked.url}/alice/image:1", auth)
                said = str(caught.value) + caplog.text
                assert f"pull image {locked.url}/alice/image:1" in said
                assert not any(
                    secret in said
                    for secret in ("wr0ng-one", PASSWORD, encoded("alice:wr0ng-one"), encoded(f"alice:{PASSWORD}"))
                )
            assert len(service.list()) == 1

    asyncio.run(main())


def test_a_refusal_is_not_tried_again(locked: Registry, tmp_path: Path) -> None:
    async def main() -> None:
        with FaultProxy(locked.url) as proxy:
            async with image_service(tmp_path) as service:
                with pytest.raises(UnknownError):
                    await service.pull(f"{proxy.url}/alice/image:1", RegistryAuth(username="alice", password="x"))
                assert len(proxy.seen) == 2

    asyncio.run(main())


def test_every_pull_of_a_cached_image_asks_with_its_own_credentials(locked: Registry, tmp_path: Path) -> None:
    async def main() -> None:
        with FaultProxy(locked.url) as proxy:
            async with image_service(tmp_path) as service:
                await service.pull(f"{proxy.url}/alice/image:1", ALICE)
                proxy.seen.clear()
                await service.pull(f"{proxy.url}/alice/image:1", RegistryAuth(username="bob", password="b"))
                asked = [(request.method, request.headers.get("authorization")) for request in proxy.seen]
                assert asked == [("HEAD", None), ("HEAD", f"Basic {encoded('bob:b')}")]

    asyncio.run(main())


def test_bearer(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            tokens.seen.clear()
            await service.pull(f"{guarded.url}/alice/image:1", ALICE)
            (asked,) = tokens.seen
            assert asked.method == "GET"
            assert (asked.fields["scope"], asked.fields["account"]) == ("repository:alice/image:pull", "alice")
            assert asked.authorization == f"Basic {encoded(f'alice:{PASSWORD}')}"

    asyncio.run(main())


def test_bearer_for_anybody_and_by_identity_token(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            tokens.seen.clear()
            await service.pull(f"{guarded.url}/public/image:1", None)
            await service.pull(f"{guarded.url}/bob/image:1", RegistryAuth(identity_token="idt-bob"))
            assert [(asked.method, asked.authorization) for asked in tokens.seen] == [("GET", ""), ("POST", "")]
            assert tokens.seen[1].fields["refresh_token"] == "idt-bob"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("image", "auth", "words"),
    [
        ("alice/image:1", None, "status 401"),
        ("alice/image:1", RegistryAuth(username="bob", password="b"), "status 401"),
        (
            "bob/image:1",
            RegistryAuth(username="bob", password="wr0ng-one"),
            "authorise at .*status 401: UNAUTHORIZED: no such user",
        ),
        ("bob/image:1", RegistryAuth(identity_token="idt-eve"), "authorise at .*status 401"),
        ("bob/image:1", RegistryAuth(registry_token="not.a.token"), "status 401"),
    ],
)
def test_bearer_refused(guarded: Registry, tmp_path: Path, image: str, auth: RegistryAuth | None, words: str) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            await service.pull(f"{guarded.url}/public/image:1", None)
            with pytest.raises(PullError, match=words) as caught:
                await service.pull(f"{guarded.url}/{image}", auth)
            said = str(caught.value)
            assert not any(
                secret in said for secret in ("wr0ng-one", encoded("bob:wr0ng-one"), "idt-eve", "not.a.token")
            )
            assert len(service.list()) == 1

    asyncio.run(main())


def test_a_registry_token_is_used_as_it_is(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    token = tokens._token("bob", "repository:bob/image:pull")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            tokens.seen.clear()
            await service.pull(f"{guarded.url}/bob/image:1", RegistryAuth(registry_token=token))
            assert tokens.seen == []

    asyncio.run(main())


def test_who_joins_a_download_that_is_refused_tries_for_himself(guarded: Registry, tmp_path: Path) -> None:
    """Two pulls of the same content under two names: the first is refused while the second waits for what it fetches."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        fetching, bob_is_in = asyncio.Event(), asyncio.Event()
        refused: list[str] = []

        def script(asked: Asked) -> Fault | None:
            if asked.method == "HEAD" and "/bob/" in asked.path and "authorization" in asked.headers:
                loop.call_soon_threadsafe(bob_is_in.set)
            if not asked.is_blob or refused:
                return None
            refused.append(asked.path)
            loop.call_soon_threadsafe(fetching.set)
            asyncio.run_coroutine_threadsafe(bob_is_in.wait(), loop).result(10)
            return Fault(status=403, body=b"no longer")

        with FaultProxy(guarded.url, script) as proxy:
            async with image_service(tmp_path) as service:
                first = asyncio.create_task(service.pull(f"{proxy.url}/alice/image:1", ALICE))
                await fetching.wait()
                bob = RegistryAuth(username="bob", password="b")
                image = await service.pull(f"{proxy.url}/bob/image:1", bob)
                with pytest.raises(PullError, match="status 403"):
                    await first
                assert image.repo_tags == (f"{proxy.url}/bob/image:1",)

    asyncio.run(main())


def test_credentials_do_not_go_to_a_mirror(locked: Registry, tmp_path: Path) -> None:
    async def main() -> None:
        with FaultProxy(locked.url) as mirror:
            write_hosts(tmp_path, locked.url, f'server = "http://{locked.url}"\n[host."http://{mirror.url}"]\n')
            async with image_service(tmp_path) as service:
                await service.pull(f"{locked.url}/alice/image:1", ALICE)
                assert mirror.seen
                assert not any("authorization" in asked.headers for asked in mirror.seen)

    asyncio.run(main())


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_credentials_do_not_follow_a_redirect(
    locked: Registry, registry: Registry, tmp_path: Path, status: int
) -> None:
    layout = make_image(tmp_path / "layout", [{"secret": "s"}])
    registry.push(layout, "alice/image:1")

    async def main() -> None:
        with FaultProxy(registry.url) as elsewhere:

            def script(asked: Asked) -> Fault | None:
                if asked.is_blob and "authorization" in asked.headers:
                    location = f"http://{elsewhere.url}{asked.path}?signature=hidden"
                    return Fault(status=status, headers={"Location": location})
                return None

            with FaultProxy(locked.url, script) as proxy:
                text = f'server = "http://{proxy.url}"\nheader = {{ X-Key = "k" }}\n'
                write_hosts(tmp_path, proxy.url, text)
                async with image_service(tmp_path) as service:
                    await service.pull(f"{proxy.url}/alice/image:1", ALICE)
                assert any("authorization" in asked.headers for asked in proxy.seen)
                assert all(asked.headers.get("x-key") == "k" for asked in proxy.seen)
                assert elsewhere.seen
                for asked in elsewhere.seen:
                    assert "authorization" not in asked.headers and "x-key" not in asked.headers

    asyncio.run(main())


def test_a_registry_that_asks_for_ever_is_answered_once(registry: Registry, tmp_path: Path) -> None:
    challenge = Fault(status=401, headers={"WWW-Authenticate": 'Basic realm="again"'})

    async def main() -> None:
        with FaultProxy(registry.url, lambda _: challenge) as proxy:
            async with image_service(tmp_path) as service:
                with pytest.raises(PullError, match="status 401"):
                    await service.pull(f"{proxy.url}/x/y:1", ALICE)
                assert len(proxy.seen) == 2
                assert files_of(tmp_path) == []

    asyncio.run(main())


@pytest.mark.parametrize("where", ["http://127.0.0.1:1/token", "http://{proxy}/token"])
def test_a_token_server_that_fails(registry: Registry, tmp_path: Path, where: str) -> None:
    async def main() -> None:
        def script(asked: Asked) -> Fault:
            if asked.path.startswith("/token"):
                return Fault(status=200, body=b'{"nothing": "here"}')
            realm = where.replace("{proxy}", asked.headers["host"])
            return Fault(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})

        with FaultProxy(registry.url, script) as proxy:
            async with image_service(tmp_path) as service:
                with pytest.raises(PullError, match=r"Connection refused|without a token"):
                    await service.pull(f"{proxy.url}/x/y:1", None)

    asyncio.run(main())
