"""Samples as a table with ratios, and as JSON (pure)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.measure import STEPS, Samples

MS, MB = 1e3, 1 / (1 << 20)
WORKLOAD = ("workload", "gone")


def summary(samples: Samples) -> dict[str, Any]:
    """All numbers of one runtime: milliseconds and bytes."""
    lifecycles = max(1, len(samples.start))
    return {
        "samples": len(samples.start),
        "start_ms": spread(samples.start),
        "stop_ms": spread(samples.stop),
        "steps_ms": {step: spread(samples.steps[step]) for step in STEPS},
        "exec_ms": spread(samples.execs),
        "cpu_per_lifecycle_ms": samples.cpu_lifecycle / lifecycles * MS,
        "cpu_per_exec_ms": samples.cpu_exec / max(1, len(samples.execs)) * MS,
        "idle_pods": samples.pods,
        "memory_without_pods": samples.memory_empty,
        "memory_with_pods": samples.memory_full,
        "memory_per_pod": per_pod(samples),
        "memory_per_pod_total": sum(size for role, size in per_pod(samples).items() if role not in WORKLOAD),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and 90th percentile in milliseconds."""
    if not values:
        return {"p50": 0.0, "min": 0.0, "p90": 0.0}
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))]
    return {"p50": statistics.median(ordered) * MS, "min": ordered[0] * MS, "p90": p90 * MS}


def per_pod(samples: Samples) -> dict[str, int]:
    """How much PSS each role grew by for each idle pod."""
    roles = set(samples.memory_full) | set(samples.memory_empty)
    grown = {role: samples.memory_full.get(role, 0) - samples.memory_empty.get(role, 0) for role in sorted(roles)}
    return {role: size // max(1, samples.pods) for role, size in grown.items()}


def rows(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row for each number, a column for each runtime, and how many times more the others take than the first."""
    others = list(summaries)[1:]

    def row(name: str, unit: str, *path: str, scale: float = 1.0) -> list[str]:
        values = [dig(summaries[runtime], path) * scale for runtime in summaries]
        ratios = [f"{value / values[0]:.1f}×" if values[0] > 0 else "-" for value in values[1:]]
        return [name, *(f"{value:.2f} {unit}" for value in values), *ratios]

    table = [
        row("pod with a running container, p50", "ms", "start_ms", "p50"),
        row("pod with a running container, min", "ms", "start_ms", "min"),
        *(row(f"  {step}, p50", "ms", "steps_ms", step, "p50") for step in STEPS[:3]),
        row("exec of true, p50", "ms", "exec_ms", "p50"),
        row("exec of true, min", "ms", "exec_ms", "min"),
        row("stop and remove, p50", "ms", "stop_ms", "p50"),
        row("stop and remove, min", "ms", "stop_ms", "min"),
        row("CPU for one start and stop", "ms", "cpu_per_lifecycle_ms"),
        row("CPU for one exec", "ms", "cpu_per_exec_ms"),
        row("memory for one more idle pod", "MB", "memory_per_pod_total", scale=MB),
    ]
    roles = sorted({role for runtime in summaries for role in summaries[runtime]["memory_with_pods"]})
    for role in roles:
        cells = [role_cell(summaries[runtime], role) for runtime in summaries]
        table.append([f"  {role}: without pods, and for each", *cells, *("" for _ in others)])
    return table


def dig(value: Any, path: Sequence[str]) -> float:
    """The number at the end of a path of keys."""
    for key in path:
        value = value[key]
    return float(value)


def role_cell(found: dict[str, Any], role: str) -> str:
    """A role's memory, or nothing where the runtime has no such process."""
    if role not in found["memory_with_pods"]:
        return "-"
    return f"{found['memory_without_pods'].get(role, 0) * MB:.1f} + {found['memory_per_pod'].get(role, 0) * MB:.3f} MB"
