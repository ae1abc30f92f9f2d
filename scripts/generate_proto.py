#!/usr/bin/env python3
"""Writes the code of CRI's, NRI's, CRIU's and Tare's own messages from their .proto files: beside them, or under the directory given.

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
PROTOS = (
    Path("tare/cri/v1/api.proto"),
    Path("tare/api/v1/tare.proto"),
    Path("tare/nri/v1/nri.proto"),
    Path("tare/nri/v1/ttrpc.proto"),
    Path("tare/handlers/v1/criu.proto"),
)
MESSAGES_ONLY = ("nri", "ttrpc", "criu")  # their calls are not gRPC's


def generate(target: Path) -> list[Path]:
    """Two or three files for each, written below `target` where imports find them if that is `src`."""
    return [path for proto in PROTOS for path in generate_one(proto, target)]


def generate_one(proto: Path, target: Path) -> list[Path]:
    """NAME_pb2.py, NAME_pb2.pyi and, for gRPC's services, NAME_pb2_grpc.py for NAME.proto."""
    (target / proto).parent.mkdir(parents=True, exist_ok=True)
    kinds = {"python_out": "_pb2.py", "pyi_out": "_pb2.pyi"}
    if proto.stem not in MESSAGES_ONLY:
        kinds["grpc_python_out"] = "_pb2_grpc.py"
    outputs = [f"--{kind}={target}" for kind in kinds]
    well_known = resources.files("grpc_tools") / "_proto"
    code = protoc.main(["protoc", f"-I{SOURCES}", f"-I{well_known}", *outputs, str(SOURCES / proto)])
    if code != 0:
        raise SystemExit(f"protoc failed with code {code}")
    paths = [(target / proto).with_name(f"{proto.stem}{end}") for end in kinds.values()]
    for path in paths:
        if path.suffix == ".pyi":
            path.write_text("".join(filter(is_python, path.read_text().splitlines(keepends=True))))
    return paths


def is_python(line: str) -> bool:
    """False for the declaration of an enum's value that is called None (NRI has one), which protoc writes all the same."""
    return not line.strip().startswith("None: ")


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES):
        print(path)
