"""The annotations that bound a pod's traffic, as bits a second (pure). The kernel holds a pod to them by a token bucket at either end of its veth.

The values are Kubernetes quantities: 10M, 1.5G, 512Ki, 1e6. Source: kubernetes.io, "Support traffic shaping"; apimachinery, resource.Quantity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from tare.errors import InvalidArgument

INGRESS, EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"
QUANTITY = re.compile(r"(\+?[0-9]+(?:\.[0-9]*)?|\+?\.[0-9]+)(?:([EPTGMK]i|[EPTGMknum])|[eE]([+-]?[0-9]{1,3}))?")
DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
SMALLEST, LARGEST = 1_000, 10**15  # what a kubelet allows


def rate(annotations: Mapping[str, str], name: str) -> int:
    """The rate that an annotation says, in bits a second; 0 without it. Raises InvalidArgument."""
    text = annotations.get(name)
    if text is None:
        return 0
    doing = f"limit the pod's traffic to {name}={text!r}"
    matched = QUANTITY.fullmatch(text)
    if matched is None:
        raise InvalidArgument(doing, cause="it is no quantity", hint="bits a second, for example 10M")
    number, suffix, exponent = matched.groups()
    value = Decimal(number).scaleb(int(exponent or DECIMAL.get(suffix, 0))) * (1 << BINARY.get(suffix, 0))
    if not SMALLEST <= value <= LARGEST:
        raise InvalidArgument(doing, cause="it is not between 1k and 1P bits a second")
    return int(value)
