"""Mirrors, their order and what they are asked; TLS with authorities and client certificates of hosts.toml."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.images.errors import PullError, RegistryUnavailable
from tests.support.certificates import Certificate, self_signed
from tests.support.image_service import files_of, image_service, write_hosts
from tests.support.images import make_image
from tests.support.proxy import Fault, FaultProxy
from tests.support.registry import Registry, TlsFiles

pytestmark = pytest.mark.root

NAME = "registry.invalid"  # a registry that cannot be reached (RFC 6761)


def mirror(proxy: FaultProxy, settings: str = "") -> str:
    return f'[host."http://{proxy.url}"]\n{settings}\n'


def test_mirrors_are_asked_in_order_and_told_whom_they_stand_for(
    registry: Registry, layout: Path, tmp_path: Path
) -> None:
    digest = registry.push(layout, "mirrored/image:1")

    async def main() -> None:
        missing = Fault(status=404, body=b"{}")
        with (
            FaultProxy(registry.url, lambda _: missing) as first,
            FaultProxy(registry.url) as second,
            FaultProxy(registry.url) as third,
        ):
            write_hosts(tmp_path, NAME, mirror(first) + mirror(second, 'header = { X-One = "1" }') + mirror(third))
            async with image_service(tmp_path) as service:
                image = await service.pull(f"{NAME}/mirrored/image:1", None)
                assert image.repo_tags == (f"{NAME}/mirrored/image:1",)
                assert image.repo_digests == (f"{NAME}/mirrored/image@{digest}",)
                assert len(first.seen) >= 1 and len(second.seen) >= 4 and not third.seen
                for asked in (*first.seen, *second.seen):
                    assert asked.path.endswith(f"?ns={NAME}")
                assert all(asked.headers["x-one"] == "1" for asked in second.seen)

    asyncio.run(main())


def test_the_registry_is_asked_last_and_without_ns(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "mirrored/last:1")

    async def main() -> None:
        with FaultProxy(registry.url, lambda _: Fault(drop=True)) as broken, FaultProxy(registry.url) as own:
            write_hosts(tmp_path, own.url, f'server = "http://{own.url}"\n' + mirror(broken))
            async with image_service(tmp_path) as service:
                await service.pull(f"{own.url}/mirrored/last:1", None)
                assert broken.seen
                assert not any("ns=" in asked.path for asked in own.seen)

    asyncio.run(main())


def test_a_mirror_without_resolve_serves_digests_only(registry: Registry, layout: Path, tmp_path: Path) -> None:
    digest = registry.push(layout, "mirrored/pull:1")

    async def main() -> None:
        with FaultProxy(registry.url) as copy, FaultProxy(registry.url) as own:
            write_hosts(tmp_path, own.url, f'server = "http://{own.url}"\n' + mirror(copy, 'capabilities = ["pull"]'))
            async with image_service(tmp_path) as service:
                await service.pull(f"{own.url}/mirrored/pull:1", None)
                assert [asked.path.partition("?")[0] for asked in own.seen] == ["/v2/mirrored/pull/manifests/1"]
                assert all(digest in asked.path or asked.is_blob for asked in copy.seen)
                assert len(copy.seen) == 4
                copy.seen.clear()
                await service.pull(f"{own.url}/mirrored/pull@{digest}", None)
                assert len(copy.seen) == 1

    asyncio.run(main())


def test_override_path(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "mirrored/path:1")

    async def main() -> None:
        with FaultProxy(registry.url) as proxy:
            for settings, expected in (
                ("", "/cache/v2/mirrored/path"),
                ("override_path = true", "/cache/mirrored/path"),
            ):
                proxy.seen.clear()
                write_hosts(tmp_path, NAME, f'[host."http://{proxy.url}/cache"]\n{settings}\n')
                async with image_service(tmp_path) as service:
                    with pytest.raises(PullError):
                        await service.pull(f"{NAME}/mirrored/path:1", None)
                assert proxy.seen[0].path.startswith(expected)

    asyncio.run(main())


def test_a_change_of_the_file_holds_at_once(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "mirrored/live:1")

    async def main() -> None:
        with FaultProxy(registry.url) as proxy:
            async with image_service(tmp_path) as service:
                with pytest.raises(RegistryUnavailable):
                    await service.pull(f"{NAME}/mirrored/live:1", None)
                write_hosts(tmp_path, "_default", mirror(proxy))
                await service.pull(f"{NAME}/mirrored/live:1", None)
                write_hosts(tmp_path, "_default", "nonsense")
                with pytest.raises(PullError, match=r"hosts\.toml"):
                    await service.pull(f"{NAME}/mirrored/live:1", None)

    asyncio.run(main())


def test_when_all_fail_the_registrys_own_words_come_first(registry: Registry, tmp_path: Path) -> None:
    async def main() -> None:
        with FaultProxy(registry.url, lambda _: Fault(status=403)) as one, FaultProxy(registry.url) as own:
            write_hosts(tmp_path, own.url, f'server = "http://{own.url}"\n' + mirror(one))
            async with image_service(tmp_path) as service:
                with pytest.raises(PullError) as caught:
                    await service.pull(f"{own.url}/not/there:1", None)
                said = str(caught.value)
                assert said.index("not found: status 404: MANIFEST_UNKNOWN") < said.index(
                    f"before: HEAD manifest at {one.url}: status 403"
                )
                assert f"at step resolve: GET manifest at {own.url}" in said

    asyncio.run(main())


def test_wrong_bytes_from_a_mirror_are_fetched_elsewhere(registry: Registry, tmp_path: Path, noise: bytes) -> None:
    registry.push(make_image(tmp_path / "layout", [{"f": noise}, {"g": "h"}]), "mirrored/wrong:1")

    async def main() -> None:
        with (
            FaultProxy(registry.url, lambda asked: Fault(corrupt=True) if asked.is_blob else None) as bad,
            FaultProxy(registry.url) as own,
        ):
            write_hosts(tmp_path, own.url, f'server = "http://{own.url}"\n' + mirror(bad))
            async with image_service(tmp_path) as service:
                image = await service.pull(f"{own.url}/mirrored/wrong:1", None)
                assert (service.layer_paths(image)[1] / "f").read_bytes() == noise
                assert len(bad.blobs()) == len(own.blobs()) == 3
                assert len(files_of(tmp_path)) == 4 + 2

    asyncio.run(main())


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, Registry, Certificate, Certificate]]:
    """A registry on TLS, one that asks for client certificates too, the servers' certificate and the clients'."""
    directory = tmp_path_factory.mktemp("tls")
    server, client = self_signed(directory, "server"), self_signed(directory, "client")
    with Registry(directory / "registry") as plain:
        plain.push(make_image(directory / "layout", [{"a": "b"}]), "tls/image:1")
    tls = TlsFiles(server.certificate, server.key)
    both = TlsFiles(server.certificate, server.key, client.certificate)
    with Registry(directory / "registry", tls=tls) as one, Registry(directory / "registry", tls=both) as two:
        yield one, two, server, client


Secure = tuple[Registry, Registry, Certificate, Certificate]


def try_tls(directory: Path, registry: Registry, settings: str) -> None:
    async def main() -> None:
        write_hosts(directory, registry.url.replace(":", "_") + "_", f'server = "https://{registry.url}"\n{settings}')
        async with image_service(directory) as service:
            await service.pull(f"{registry.url}/tls/image:1", None)

    asyncio.run(main())


def test_a_certificate_authority_of_the_file(secure: Secure, tmp_path: Path) -> None:
    try_tls(tmp_path, secure[0], f'ca = "{secure[2].certificate}"')


def test_skip_verify(secure: Secure, tmp_path: Path) -> None:
    try_tls(tmp_path, secure[0], "skip_verify = true")


def test_an_unknown_certificate_is_not_trusted_and_never_answered_by_plain_http(secure: Secure, tmp_path: Path) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            with pytest.raises(RegistryUnavailable, match=r"not to be trusted: .*self-signed.*ca = "):
                await service.pull(f"{secure[0].url}/tls/image:1", None)

    asyncio.run(main())


@pytest.mark.parametrize("pair", [True, False])
def test_client_certificates(secure: Secure, tmp_path: Path, pair: bool) -> None:
    client = secure[3]
    both = tmp_path / "both.pem"
    both.write_text(client.certificate.read_text() + client.key.read_text())
    value = f'[["{client.certificate}", "{client.key}"]]' if pair else '"../../both.pem"'
    try_tls(tmp_path, secure[1], f'ca = "{secure[2].certificate}"\nclient = {value}')


def test_without_the_client_certificate_that_is_asked_for(secure: Secure, tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="certificate"):
        try_tls(tmp_path, secure[1], f'ca = "{secure[2].certificate}"')


def test_a_file_that_is_not_there_is_named(secure: Secure, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"the certificate /nowhere/ca\.pem named in hosts\.toml: No such file"):
        try_tls(tmp_path, secure[0], 'ca = "/nowhere/ca.pem"')
