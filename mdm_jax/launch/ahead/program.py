"""What a program does, read from its jaxpr and from the compiler's text: products, memory traffic,
collectives and buffers."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


_PRODUCTS = {"dot_general": "dimension_numbers", "product": "dimensions"}
"""Primitives of matrix products (models/products.py has the second), and their parameter."""


def count_flops(jaxpr: Any) -> int:
    """Floating point operations of all matrix products of a jaxpr, over all devices.

    Bodies of loops count as often as they run, where that is known (``scan``), else once; of the
    branches of a conditional the dearest. Kernels count each block of their grid as if none were
    skipped.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(equation) for equation in inner.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        (contracted, _), _ = params[_PRODUCTS[name]]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        return (
            2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // kernel[outputs])
        )
    counts = [count_flops(inner) for inner in _inner(params)]
    if name == "scan":
        return params["length"] * sum(counts)
    if name == "cond":
        return max(counts, default=0)
    if name == "shard_map":
        return sum(counts) * math.prod(params["mesh"].shape.values())
    if name == "pallas_call":
        return sum(counts) * math.prod(params["grid_mapping"].grid)
    return sum(counts)


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """Jaxprs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the compiler's text. ``type`` is its result's as written, ``rest`` all that
    follows the operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        """Size of the result, all parts of a tuple together."""
        return sum(size for size, _ in arrays(self.type))

    def named(self, attribute: str) -> str | None:
        """A computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match and match[1]


class Collective(NamedTuple):
    """Collectives of one kind and type: how many a step, and bytes a device sends for them."""

    kind: str
    type: str
    group: int
    count: int
    bytes_sent: float


class Buffer(NamedTuple):
    """A result that one instruction or several alike hold at a time."""

    bytes: int
    type: str
    origin: str


_SIZES = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2, "c64": 8, "c128": 16}


def arrays(type_: str) -> list[tuple[int, str]]:
    """(bytes, "f32[8,4]") of each array in a type as written."""
    found = []
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_):
        bits = re.search(r"\d+", dtype)
        size = _SIZES.get(dtype, int(bits[0]) / 8 if bits else 0)
        if dtype.startswith("f8"):
            size = 1
        count = math.prod(int(d) for d in dims.split(",") if d)
        found.append((math.ceil(size * count), f"{dtype}[{dims}]"))
    return found


class Module:
    """A compiled program's text, by computation, for so many devices.

    ``unknown_loops`` counts loops of unknown length, whose bodies count once.
    """

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+)(?: \(.*\))? (?:-> .*)?\{\s*$", line)
            if header and " = " not in line.split("{")[0]:
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _instruction(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation")
        self.unknown_loops = 0
        self._runs = collections.Counter()
        self._fused: set[str] = set()
        self._visit(self.entry, 1, False)

    def _visit(self, name: str, times: int, fused: bool) -> None:
        """Count how often a computation and those that it calls run in a step."""
        self._runs[name] += times
        if fused:
            self._fused.add(name)
        for one in self.computations.get(name, {}).values():
            inside = fused or one.opcode == "fusion"
            if one.opcode == "while":
                trips = re.search(r"known_trip_count\D*?(\d+)", one.rest)
                self.unknown_loops += trips is None
                loops = times * (int(trips[1]) if trips else 1)
                self._visit(one.named("body"), loops, inside)
                self._visit(one.named("condition"), loops, inside)
            elif one.opcode == "conditional":
                for branch in self._branches(one):
                    self._visit(branch, times, inside)
            elif called := one.named("calls") or (one.opcode == "call" and one.named("to_apply")):
                self._visit(called, times, inside)

    def _branches(self, one: Instruction) -> list[str]:
        several = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
        if several:
            return re.findall(r"[\w.\-]+", several[1])
        return [one.named("true_computation"), one.named("false_computation")]

    def _instructions(self, fused: bool) -> Iterator[tuple[Instruction, int, str]]:
        """Instructions that run, how often, and in which computation; with those inside fusions or
        without."""
        for name, times in self._runs.items():
            if fused or name not in self._fused:
                for one in self.computations.get(name, {}).values():
                    yield one, times, name

    def collectives(self) -> list[Collective]:
        """Collectives by kind, type and size of their groups, most bytes first."""
        counts, sent = collections.Counter(), collections.Counter()
        for one, times, _ in self._instructions(fused=True):
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            parts = arrays(one.type)
            if one.opcode.endswith("-start") and kind != "all-reduce":
                # (operands, results, and at times contexts): results are the second part.
                parts = [part for part in parts if part[0] > 8]
                parts = parts[len(parts) // 2 :]
            group = group_size(one.rest, self.devices)
            key = kind, " ".join(shape for _, shape in parts), group
            counts[key] += times
            sent[key] += times * bytes_sent(kind, sum(size for size, _ in parts), group)
        return [
            Collective(*key, count=counts[key], bytes_sent=size) for key, size in sent.most_common()
        ]

    def traffic(self) -> float:
        """Bytes that a device reads from and writes to its memory in a step.

        Operands and results of everything that is not inside a fusion; of an operand that is only
        sliced, the slices. Optimistic where caches hold less than a fusion reads, pessimistic where
        one's result is still in them.
        """
        total = 0.0
        for one, times, name in self._instructions(fused=False):
            if one.opcode in _FREE or one.opcode.endswith("-done"):
                continue
            here = self.computations[name]
            total += times * (self._written(one, here) + self._read(one, here))
        return total

    def _written(self, one: Instruction, here: Mapping[str, Instruction]) -> int:
        body = self.computations.get(one.named("calls") or "", {}) if one.opcode == "fusion" else {}
        root = list(body.values())[-1] if body else one
        where = body or here
        if root.opcode == "dynamic-update-slice" and root.operands[1] in where:
            return where[root.operands[1]].bytes
        return one.bytes

    def _read(self, one: Instruction, here: Mapping[str, Instruction]) -> int:
        sizes = [here[name].bytes if name in here else 0 for name in one.operands]
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return one.bytes
        if one.opcode == "dynamic-update-slice":
            return sizes[1]
        if one.opcode == "fusion" and (body := self.computations.get(one.named("calls") or "")):
            for parameter in body.values():
                if parameter.opcode != "parameter":
                    continue
                users = [user for user in body.values() if parameter.name in user.operands]
                number = int(re.match(r"\d+", parameter.rest.lstrip("("))[0])
                if number < len(sizes) and users and all(map(_slices(parameter), users)):
                    slices = [u.bytes for u in users if u.opcode != "dynamic-update-slice"]
                    sizes[number] = min(sizes[number], sum(slices))
        return sum(sizes)

    def largest(self, count: int = 8) -> list[Buffer]:
        """The largest arrays that instructions make, of different types."""
        found: dict[str, Buffer] = {}
        for one, _, _ in self._instructions(fused=False):
            if one.opcode in _FREE or one.type.startswith(
                "("
            ):  # parts of tuples are made elsewhere
                continue
            for size, shape in arrays(one.type):
                origin = re.search(r'op_name="([^"]*)"', one.rest)
                found.setdefault(shape, Buffer(size, shape, origin[1] if origin else one.opcode))
        return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "opt-barrier", "partition-id", "replica-id", "add-dependency"),
}


def _slices(parameter: Instruction):
    """Whether a user reads only a slice of a parameter, or writes one into it."""

    def test(user: Instruction) -> bool:
        sliced = user.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
        return sliced and user.operands[0] == parameter.name

    return test


def _instruction(line: str) -> Instruction | None:
    """An instruction of a line like ``%name = type opcode(operands), rest``."""
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if match is None:
        return None
    name, right = match.groups()
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    type_, right = right[:end], right[end:].lstrip()
    head = re.match(r"([\w\-]+)\(", right)
    if head is None:
        return None
    close = _closing(right, head.end() - 1)
    inside, rest = right[head.end() : close], right[close + 1 :]
    if head[1] in ("parameter", "constant"):
        return Instruction(name, type_, head[1], (), f"({inside}){rest}")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if not operands and inside:  # printed without percent signs
        operands = tuple(part.split()[-1] for part in inside.split(",") if part.strip())
    return Instruction(name, type_, head[1], operands, rest)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text) - 1


def group_size(attributes: str, devices: int) -> int:
    """Devices of a collective's groups, from replica_groups; 2 for pairs of a permutation.

    Empty or no groups stand for all ``devices``.
    """
    if "source_target_pairs" in attributes:
        return 2
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    iota = re.search(r"replica_groups=\[(\d+(?:,\d+)*)\]<=", attributes)
    if iota:
        return int(iota[1].split(",")[-1])
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


def describe(collectives: Iterable[Collective]) -> Mapping[str, tuple[int, float]]:
    """(number, bytes sent) by kind of collective."""
    totals: dict[str, tuple[int, float]] = {}
    for one in collectives:
        count, size = totals.get(one.kind, (0, 0.0))
        totals[one.kind] = count + one.count, size + one.bytes_sent
    return totals
