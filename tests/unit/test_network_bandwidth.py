"""Rates as Kubernetes writes them."""

from __future__ import annotations

import pytest

from tare.errors import InvalidArgument
from tare.network.bandwidth import EGRESS, INGRESS, rate


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("10M", 10_000_000),
        ("+1.5G", 1_500_000_000),
        ("512Ki", 524_288),
        ("1e6", 1_000_000),
        ("1E3", 1_000),
        ("1000", 1_000),
        (".5M", 500_000),
        ("2000000m", 2_000),
        ("1P", 10**15),
    ],
)
def test_quantities(text: str, bits: int) -> None:
    assert rate({INGRESS: text}, INGRESS) == bits
    assert rate({INGRESS: text}, EGRESS) == 0


@pytest.mark.parametrize("text", ["", "fast", "10 M", "-1M", "999", "1.1P", "10Mb", "1E", "1e6k", "1e400", "0", "٣M"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="egress-bandwidth"):
        rate({EGRESS: text}, EGRESS)
