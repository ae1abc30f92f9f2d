#!/usr/bin/env python3
"""Writes api_pb2.py, api_pb2_grpc.py and api_pb2.pyi from src/tare/cri/v1/api.proto: beside it, or under the directory given.

    scripts/generate_proto.py [DIRECTORY]

What comes out depends on the version of grpcio-tools, so that is pinned in pyproject.toml; raise the least versions of
grpcio and protobuf there together with it, since generated code refuses to run with older ones.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).resolve().parent.parent / "src"
PROTO = Path("tare/cri/v1/api.proto")


def generate(target: Path) -> list[Path]:
    """The three files, written to `target`/tare/cri/v1 (where imports of `tare.cri.v1` find them if `target` is `src`)."""
    (target / PROTO).parent.mkdir(parents=True, exist_ok=True)
    outputs = [f"--{kind}={target}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    well_known = resources.files("grpc_tools") / "_proto"
    code = protoc.main(["protoc", f"-I{SOURCES}", f"-I{well_known}", *outputs, str(SOURCES / PROTO)])
    if code != 0:
        raise SystemExit(f"protoc failed with code {code}")
    return [(target / PROTO).with_name(name) for name in ("api_pb2.py", "api_pb2.pyi", "api_pb2_grpc.py")]


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES):
        print(path)
