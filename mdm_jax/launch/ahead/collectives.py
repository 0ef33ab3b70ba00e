"""Collectives of a compiled program: bytes sent, and whether products run meanwhile."""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mdm_jax.launch.ahead.program import Instruction, Module, arrays

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


class Collective(NamedTuple):
    """Collectives of one kind and type, by step.

    Attributes:
        type: of the result; ``group`` is the number of devices that take part.
        bytes_sent: by a device, in rings.
        asynchronous: those of bytes_sent that other instructions may run beside.
        overlapped: those of ``asynchronous`` that matrix products run beside: the schedule has some
            between start and end.
    """

    kind: str
    type: str
    group: int
    count: int
    bytes_sent: float
    asynchronous: float
    overlapped: float


class _Site(NamedTuple):
    """A collective, and where its result is waited for: an instruction's index, or None if here."""

    one: Instruction
    kind: str
    start: int
    end: int | None


def find(module: Module) -> list[Collective]:
    """All collectives of a program by kind, type and size of their groups, most bytes first."""
    totals: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for name, times in module.scheduled():
        schedule = list(module.computations[name].values())
        for site in _sites(module, schedule):
            group = group_size(site.one.rest, module.devices)
            parts = _result(site, group)
            sent = times * bytes_sent(site.kind, sum(size for size, _ in parts), group)
            between = schedule[site.start + 1 : site.end] if site.end else []
            overlapped = any(map(module.has_product, between))
            key = site.kind, " ".join(shape for _, shape in parts), group
            added = times, sent, sent * bool(site.end), sent * overlapped
            totals[key] = [a + b for a, b in zip(totals[key], added)]
    found = [Collective(*key, *values) for key, values in totals.items()]
    return sorted(found, key=lambda one: -one.bytes_sent)


def describe(found: Iterable[Collective]) -> Mapping[str, Collective]:
    """Sums by kind; the type is empty and the group the largest."""
    totals: dict[str, Collective] = {}
    for one in found:
        old = totals.get(one.kind, Collective(one.kind, "", 0, 0, 0.0, 0.0, 0.0))
        sums = (a + b for a, b in zip(old[3:], one[3:]))
        totals[one.kind] = Collective(one.kind, "", max(old.group, one.group), *sums)
    return totals


def _sites(module: Module, schedule: list[Instruction]) -> Iterator[_Site]:
    """Collectives among the instructions of a computation, in the order of the schedule."""
    ends = {}  # of asynchronous instructions, by the name of what they started as
    for index, one in enumerate(schedule):
        if one.opcode.endswith(("-done", "-update")) and one.operands:
            ends[one.name] = first = ends.get(one.operands[0], one.operands[0])
            ends[first] = index
    open_: dict[str, tuple[Instruction, int]] = {}  # pieces of one collective, by its channel
    for index, one in enumerate(schedule):
        if one.opcode.removesuffix("-start") in KINDS:
            end = ends.get(one.name) if one.opcode.endswith("-start") else None
            yield _Site(one, one.opcode.removesuffix("-start"), index, end)
            continue
        if "async_collective_fusion" in (one.named("calls") or ""):
            continue  # a piece of one that was started before, beside other work
        for part, kind in _inside(module, one):
            channel = re.search(r"channel_id=(\d+)", part.rest)
            channel = channel[1] if channel else ""
            if "async-collective-start" in one.name:
                open_[channel] = part, index
            elif "async-collective-done" in one.name and channel in open_:
                part, start = open_.pop(channel)
                yield _Site(part, kind, start, index)
            else:
                yield _Site(part, kind, index, ends.get(one.name))
    for part, start in open_.values():
        yield _Site(part, part.opcode, start, None)


def _inside(module: Module, one: Instruction) -> Iterator[tuple[Instruction, str]]:
    """Collectives that are fused into an instruction or started by it, and their kinds."""
    if one.opcode not in ("fusion", "async-start"):
        return
    body = module.computations.get(one.named("calls") or "", {})
    for part in body.values():
        if part.opcode in KINDS:
            users = [user.opcode for user in body.values() if part.name in user.operands]
            scattered = part.opcode == "all-reduce" and users == ["dynamic-slice"]
            yield part, "reduce-scatter" if scattered else part.opcode
        yield from _inside(module, part)


def _result(site: _Site, group: int) -> list[tuple[int, str]]:
    """(bytes, type) of the arrays of a collective's result."""
    one, parts = site.one, arrays(site.one.type)
    if one.opcode.endswith("-start") and site.kind != "all-reduce":
        # (operands, results, and at times contexts): results are the second part.
        parts = [part for part in parts if part[0] > 8]
        return parts[len(parts) // 2 :]
    if site.kind == "reduce-scatter" and one.opcode == "all-reduce":
        return [(size // group, f"{shape} / {group}") for size, shape in parts]
    return parts


def group_size(attributes: str, devices: int) -> int:
    """Devices of a collective's groups, from replica_groups; 2 for pairs of a permutation.

    Empty or no groups stand for all ``devices``.
    """
    if "source_target_pairs" in attributes:
        return 2
    iota = re.search(r"replica_groups=\[(\d+(?:,\d+)*)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
    # Axes of a mesh, whole or in part: mesh['a'=4,'b'=6] {'a','b':(1)2}
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes[1])}
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed and listed[1] else devices


def bytes_sent(kind: str, size: float, group: int) -> float:
    """Bytes that a device sends in a ring for a collective whose result has ``size`` bytes.

    Chan et al. 2007: an all-reduce is a reduce-scatter and an all-gather.
    """
    share = (group - 1) / group if group else 0.0
    return size * {
        "all-gather": share,
        "all-reduce": 2 * share,
        "reduce-scatter": group - 1,  # the result is one of ``group`` parts
        "all-to-all": share,
        "ragged-all-to-all": share,
    }.get(kind, 1.0)
