"""A real registry for a test: Debian's docker-registry as a child process on a free loopback port, filled by skopeo.

    with Registry(tmp_path / "registry") as registry:
        layout = make_image(tmp_path / "layout", [{"hello": "world"}])          # tests.support.images
        registry.push(layout, "demo/hello:latest")
        pull(f"{registry.url}/demo/hello:latest")

The registry listens on plain HTTP unless `tls` is given. `users` asks for basic auth by htpasswd; `token` delegates to a bearer token server
(`tests.support.tokens`). Contents stay in the directory given, so that a stopped registry can be started again.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

START_SECONDS = 30.0
RUN_SECONDS = 60.0
REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class TokenAuth:
    """Who gives tokens for a registry: the realm's URL, the service's and the issuer's names, and the PEM file with the issuer's certificate."""

    realm: str
    service: str
    issuer: str
    certificate: Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's certificate and key, and the authority of the clients' certificates where those are asked for."""

    certificate: Path
    key: Path
    client_authority: Path | None = None


class Registry:
    """One docker-registry process; a context manager that starts and stops it."""

    def __init__(
        self,
        directory: Path,
        *,
        users: Mapping[str, str] | None = None,
        token: TokenAuth | None = None,
        tls: TlsFiles | None = None,
        port: int = 0,
    ) -> None:
        self.directory = directory
        self.port = port
        self.log: list[str] = []
        self._users = dict(users or {})
        self._token = token
        self._tls = tls
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def url(self) -> str:
        """host:port, as it begins an image reference."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it listens. Raises RuntimeError with its log if it ends instead."""
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = self.directory / "config.json"
        configuration.write_text(json.dumps(self._configuration()))
        self._process = subprocess.Popen(
            ["docker-registry", "serve", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "OTEL_TRACES_EXPORTER": "none"},
        )
        listening = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self._process, listening), daemon=True)
        self._reader.start()
        if not listening.wait(START_SECONDS) or self.port == 0:
            self.stop()
            raise RuntimeError("docker-registry did not start:\n" + "".join(self.log))

    def stop(self) -> None:
        """End it; nothing happens if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert self._reader is not None and process.stderr is not None
            self._reader.join()
            process.stderr.close()

    def push(
        self,
        layout: Path,
        name: str,
        *,
        tag: str = "latest",
        credentials: str | None = None,
        all_platforms: bool = False,
        format: str = "",
    ) -> str:
        """Copy the image `tag` of an OCI layout to `name` ("demo/hello:1") and return the digest that the registry gives it.

        `format` "v2s2" makes it a Docker image; `all_platforms` copies an index with all of its images.
        """
        digest_file = self.directory / "pushed-digest"
        options = ["--dest-tls-verify=false", f"--digestfile={digest_file}"]
        options += ["--all"] if all_platforms else []
        options += [f"--dest-creds={credentials}"] if credentials else []
        options += [f"--format={format}"] if format else []
        run(
            "skopeo",
            "--insecure-policy",
            "copy",
            "--quiet",
            *options,
            f"oci:{layout}:{tag}",
            f"docker://{self.url}/{name}",
        )
        return digest_file.read_text().strip()

    def upload(self, layout: Path, name: str, *, tag: str = "latest") -> str:
        """As `push`, but byte for byte: skopeo compresses plain layers and refuses images that are not right. Plain HTTP, no credentials."""
        repository, _, label = name.partition(":")
        index = json.loads((layout / "index.json").read_text())
        found = (entry for entry in index["manifests"] if entry["annotations"][REF_NAME] == tag)
        return self._upload_manifest(layout, repository, label or "latest", next(found))

    def _upload_manifest(self, layout: Path, repository: str, label: str, descriptor: dict[str, str]) -> str:
        digest = descriptor["digest"]
        data = (layout / "blobs" / digest.replace(":", "/")).read_bytes()
        document = json.loads(data)
        for entry in document.get("manifests", ()):
            self._upload_manifest(layout, repository, entry["digest"], entry)
        for entry in (document.get("config"), *document.get("layers", ())):
            if entry:
                self._upload_blob(
                    repository, entry["digest"], (layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
                )
        self._request("PUT", f"/v2/{repository}/manifests/{label}", data, {"Content-Type": descriptor["mediaType"]})
        return digest

    def _upload_blob(self, repository: str, digest: str, data: bytes) -> None:
        location = self._request("POST", f"/v2/{repository}/blobs/uploads/")
        self._request("PUT", f"{location}&digest={digest}", data)

    def _request(self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> str:
        """Send a request and return the answer's Location header."""
        connection = http.client.HTTPConnection(self.url, timeout=RUN_SECONDS)
        try:
            connection.request(method, url.removeprefix(f"http://{self.url}"), body, dict(headers or {}))
            response = connection.getresponse()
            said = response.read()
            if response.status >= 300:
                raise RuntimeError(f"{method} {url}: {response.status}: {said.decode()}")
            return response.headers.get("Location", "")
        finally:
            connection.close()

    def blob_path(self, digest: str) -> Path:
        """The file in which the registry keeps a blob: to damage or to count it."""
        algorithm, _, value = digest.partition(":")
        return self.directory / "data/docker/registry/v2/blobs" / algorithm / value[:2] / value / "data"

    def __enter__(self) -> Registry:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configuration(self) -> dict[str, object]:
        listen: dict[str, object] = {"addr": f"127.0.0.1:{self.port}", "secret": "only for tests"}
        if self._tls:
            authority = self._tls.client_authority
            clients = {"clientcas": [str(authority)]} if authority else {}
            listen["tls"] = {"certificate": str(self._tls.certificate), "key": str(self._tls.key), **clients}
        configuration: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.directory / "data")}, "delete": {"enabled": True}},
            "http": listen,
        }
        if self._users:
            passwords = self.directory / "htpasswd"
            passwords.write_text(
                "".join(run("htpasswd", "-nbB", name, word).strip() + "\n" for name, word in self._users.items())
            )
            configuration["auth"] = {"htpasswd": {"realm": "tests", "path": str(passwords)}}
        if self._token:
            configuration["auth"] = {
                "token": {
                    "realm": self._token.realm,
                    "service": self._token.service,
                    "issuer": self._token.issuer,
                    "rootcertbundle": str(self._token.certificate),
                }
            }
        return configuration

    def _read(self, process: subprocess.Popen[str], listening: threading.Event) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.log.append(line)
            found = re.search(r'msg="listening on [^" ]*:(\d+)', line)
            if found and not listening.is_set():
                self.port = int(found[1])
                listening.set()
        listening.set()


def run(*command: str) -> str:
    """A command's output. Raises RuntimeError with what it said if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")
    return result.stdout


@contextmanager
def serving(directory: Path, images: Mapping[str, Path], users: Sequence[str] = ()) -> Iterator[Registry]:
    """A running registry that holds `images`: names ("demo/web:1") to OCI layouts. Each of `users` is "name:password"."""
    with Registry(directory, users=dict(user.split(":", 1) for user in users)) as registry:
        for name, layout in images.items():
            registry.push(layout, name, credentials=users[0] if users else None)
        yield registry
