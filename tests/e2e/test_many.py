"""Five thousand containers that have ended, as a real daemon lists them."""

from __future__ import annotations

import time

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.crowd import crowded
from tests.support.node import busy_node

pytestmark = pytest.mark.root
COUNT = 5000
LIST_SECONDS = 0.1


def test_five_thousand_are_listed_at_once_and_streamed_in_pieces() -> None:
    with busy_node("many") as node:
        pod = node.run_pod("many")
        first = node.start(node.create(pod, "main", "true"))
        node.wait(first)
        client = node.daemon.client
        with crowded(node.daemon, first, COUNT) as copies:
            expected = [*copies[::-1], first]
            times, pods = [], []
            for _ in range(5):
                began = time.perf_counter()
                listed = client.call(client.runtime.ListContainers, pb.ListContainersRequest()).containers
                times.append(time.perf_counter() - began)
                began = time.perf_counter()
                client.pods()
                pods.append(time.perf_counter() - began)
            assert [item.id for item in listed] == expected
            assert min(times) < LIST_SECONDS and min(pods) < LIST_SECONDS, (times, pods)
            parts = [part.containers for part in client.runtime.StreamContainers(pb.StreamContainersRequest())]
            assert [item.id for part in parts for item in part] == expected
            assert len(parts) > 10 and max(map(len, parts)) <= 250
            half = pb.ContainerFilter(label_selector={"half": "1"}, pod_sandbox_id=pod)
            half.state.state = pb.CONTAINER_EXITED
            found = client.call(client.runtime.ListContainers, pb.ListContainersRequest(filter=half)).containers
            assert [item.id for item in found] == copies[1::2][::-1]
            half.id = copies[0]
            assert not client.call(client.runtime.ListContainers, pb.ListContainersRequest(filter=half)).containers
