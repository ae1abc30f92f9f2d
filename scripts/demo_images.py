"""The demo's two images, made from Debian packages: busybox, and nginx on top of it (so that they share a layer).

nginx and the libraries that it names come by `apt-get download` and are kept in build/debs, so that a second run needs no network.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.support.images import Directory, File, Node, Symlink, busybox_tree, make_image

DEBS = Path(__file__).parents[1] / "build/debs"
PACKAGES = ("nginx", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g")
BUSYBOX, NGINX = "demo/busybox:1", "demo/nginx:1"
PAGE = "Hello from nginx, in a container that Tare runs.\n"
ENVIRONMENT = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
CONFIGURATION = """\
daemon off;
worker_processes 1;
error_log /dev/stderr warn;
pid /run/nginx.pid;
events { worker_connections 64; }
http {
    log_format brief '$remote_addr asked for $request_uri: $status';
    access_log /dev/stdout brief;
    default_type text/plain;
    server { listen 80; root /srv; }
}
"""


def download(packages: tuple[str, ...]) -> list[Path]:
    """The packages' files, from the cache or from Debian. Raises CalledProcessError where apt-get cannot get them."""
    DEBS.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not cached(package)]
    command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *missing]
    if missing and subprocess.run(command, cwd=DEBS, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=True)
        subprocess.run(command, cwd=DEBS, capture_output=True, check=True)
    return [file for package in packages for file in cached(package)]


def cached(package: str) -> list[Path]:
    """The package's newest file in the cache, if there is one."""
    return sorted(DEBS.glob(f"{package}_*.deb"), key=lambda file: file.stat().st_mtime)[-1:]


def nginx_tree(debs: list[Path]) -> dict[str, Node]:
    """nginx with the shared libraries of its packages, its configuration, and one page."""
    tree: dict[str, Node] = {name: Directory() for name in ("run", "srv", "var/lib/nginx", "var/log/nginx")}
    with tempfile.TemporaryDirectory() as name:
        unpacked = Path(name)
        for deb in debs:
            subprocess.run(["dpkg", "-x", deb, unpacked], check=True)
        wanted = [unpacked / "usr/sbin/nginx"]
        for libraries in ("lib", "usr/lib", "lib64"):
            wanted += sorted(unpacked.glob(f"{libraries}/*-linux-gnu*/lib*.so.*"))
            wanted += sorted(unpacked.glob(f"{libraries}/**/ld-linux*"))
        for path in wanted:
            tree[str(path.relative_to(unpacked))] = node_of(path)
    tree["etc/nginx/nginx.conf"] = CONFIGURATION
    tree["srv/index.html"] = PAGE
    return tree


def node_of(path: Path) -> Node:
    """A file or a link as the image has it."""
    if path.is_symlink():
        return Symlink(target=str(path.readlink()))
    return File(mode=path.stat().st_mode & 0o7777, data=path.read_bytes())


def make(directory: Path) -> dict[str, Path]:
    """OCI layouts below `directory`, by the name that each is pushed under."""
    debs = download(PACKAGES)
    base = busybox_tree()
    nginx = {"Env": ENVIRONMENT, "Cmd": ["nginx"], "ExposedPorts": {"80/tcp": {}}}
    return {
        BUSYBOX: make_image(directory / "busybox", [base], config={"Env": ENVIRONMENT, "Cmd": ["sh"]}),
        NGINX: make_image(directory / "nginx", [base, nginx_tree(debs)], config=nginx),
    }
