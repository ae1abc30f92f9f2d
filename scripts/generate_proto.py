#!/usr/bin/env python3
"""Writes the code of CRI's and of Tare's own gRPC services from their .proto files: beside them, or under the directory given.

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
PROTOS = (Path("tare/cri/v1/api.proto"), Path("tare/api/v1/tare.proto"))


def generate(target: Path) -> list[Path]:
    """Three files for each, written below `target` where imports find them if that is `src`."""
    return [path for proto in PROTOS for path in generate_one(proto, target)]


def generate_one(proto: Path, target: Path) -> list[Path]:
    """NAME_pb2.py, NAME_pb2.pyi and NAME_pb2_grpc.py for NAME.proto."""
    (target / proto).parent.mkdir(parents=True, exist_ok=True)
    outputs = [f"--{kind}={target}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    well_known = resources.files("grpc_tools") / "_proto"
    code = protoc.main(["protoc", f"-I{SOURCES}", f"-I{well_known}", *outputs, str(SOURCES / proto)])
    if code != 0:
        raise SystemExit(f"protoc failed with code {code}")
    return [(target / proto).with_name(f"{proto.stem}{end}") for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES):
        print(path)
