"""What a program does, read from its jaxpr and from the compiler's text: products, memory traffic,
collectives and buffers."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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
    if name == "ragged_dot_general":  # each row of the left operand meets one of a group's
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        left, right = (variable.aval.shape for variable in equation.invars[:2])
        kept = {*contracted, *batch, *numbers.rhs_group_dimensions}
        free = [size for axis, size in enumerate(right) if axis not in kept]
        return 2 * math.prod(left) * math.prod(free)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        return (
            2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // kernel[outputs])
        )
    counts = [count_flops(inner) for inner in _inner(params)]
    if name == "scan":
        return params["length"] * sum(counts)
    if name == "cond":  # of a platform's own ways, the one without padding
        return (min if params.get("branches_platforms") else max)(counts, default=0)
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
        """Size of the result in a device's memory, all parts of a tuple together.

        A TPU's vector memory is not counted: arrays of memory space 1 with a tiled layout.
        """
        return sum(size for size, _ in arrays(_ON_CHIP.sub("", self.type)))

    def named(self, attribute: str) -> str | None:
        """A computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match and match[1]


class Buffer(NamedTuple):
    """A result that one instruction or several alike hold at a time."""

    bytes: int
    type: str
    origin: str


_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^{}]*:T\([^{}]*S\(1\)\}")

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
        self._products: dict[str, bool] = {}  # by computation, where it has been asked
        self._visit(self.entry, 1, False)

    def _visit(self, name: str, times: int, fused: bool) -> None:
        """Count how often a computation and those that it calls run in a step."""
        self._runs[name] += times
        if fused:
            self._fused.add(name)
        for one in self.computations.get(name, {}).values():
            inside = fused or one.opcode == "fusion"
            if one.opcode == "while":
                trips = self._trips(one, self.computations[name])
                self.unknown_loops += trips is None
                loops = times * (1 if trips is None else trips)
                self._visit(one.named("body"), loops, inside)
                self._visit(one.named("condition"), loops, inside)
            elif one.opcode == "conditional":
                for branch in self._branches(one):
                    self._visit(branch, times, inside)
            elif called := one.named("calls") or (one.opcode == "call" and one.named("to_apply")):
                self._visit(called, times, inside)

    def _trips(self, one: Instruction, here: Mapping[str, Instruction]) -> int | None:
        """How often a loop runs, where the compiler says so or counts to a constant."""
        if known := re.search(r"known_trip_count\D*?(\d+)", one.rest):
            return int(known[1])
        condition, body = (
            self.computations.get(one.named(part) or "", {}) for part in ("condition", "body")
        )
        test, after = (list(part.values())[-1:] for part in (condition, body))
        before = here.get(one.operands[0]) if one.operands else None
        if not (test and after and before and "direction=LT" in test[0].rest):
            return None
        counter = condition.get(test[0].operands[0])
        index = re.search(r"index=(\d+)", counter.rest) if counter else None
        if index is None or {after[0].opcode, before.opcode} != {"tuple"}:
            return None
        limit = _constant(test[0].operands[1], condition)
        start = _constant(before.operands[int(index[1])], here)
        added = body.get(after[0].operands[int(index[1])])
        steps = [_constant(name, body) for name in added.operands] if added else []
        step = next((step for step in steps if step is not None), None)
        if added is None or added.opcode != "add" or None in (limit, start, step):
            return None
        return max(0, -(-(limit - start) // step))

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

    def scheduled(self) -> Iterator[tuple[str, int]]:
        """Computations whose instructions run one after another, and how often."""
        for name, times in self._runs.items():
            if name not in self._fused:
                yield name, times

    def has_product(self, one: Instruction) -> bool:
        """Whether an instruction takes a matrix product, by itself or in what it calls."""
        if one.opcode in ("dot", "convolution"):
            return True
        if one.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            return target is not None and any(name in target[1] for name in _KERNELS)
        called = re.findall(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)", one.rest)
        return any(map(self._has_product, called))

    def _has_product(self, name: str) -> bool:
        if name not in self._products:
            self._products[name] = any(
                map(self.has_product, self.computations.get(name, {}).values())
            )
        return self._products[name]

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
        if one.opcode.endswith("-start") and one.type.startswith("("):  # operands are in it
            operands = sum(here[name].bytes for name in one.operands if name in here)
            return max(0, one.bytes - operands)
        where = body or here
        root = list(body.values())[-1] if body else one
        results = [where[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return sum(_part_written(result, where) for result in results)

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


_KERNELS = ("tpu_custom_call", "cublas", "cudnn", "flash", "fmha", "gemm", "triton")
"""Parts of the names of kernels that take products."""

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "opt-barrier", "partition-id", "replica-id", "add-dependency"),
}


def _part_written(one: Instruction, here: Mapping[str, Instruction]) -> int:
    """Bytes of a result that are new: of a stack the slice, of what is passed on nothing."""
    while one.opcode == "bitcast" and one.operands[0] in here:
        one = here[one.operands[0]]
    if one.opcode == "parameter":
        return 0
    if one.opcode == "dynamic-update-slice" and one.operands[1] in here:
        return here[one.operands[1]].bytes
    return one.bytes


def _slices(parameter: Instruction):
    """Whether a user reads only a slice of a parameter, or writes one into it."""

    def test(user: Instruction) -> bool:
        sliced = user.opcode in ("dynamic-slice", "slice", "gather", "dynamic-update-slice")
        return sliced and user.operands[0] == parameter.name

    return test


def _constant(name: str, here: Mapping[str, Instruction]) -> int | None:
    """The value of a scalar integer that is a constant, or a copy of one."""
    one = here.get(name)
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = here.get(one.operands[0])
    value = re.match(r"\((-?\d+)\)", one.rest) if one and one.opcode == "constant" else None
    return int(value[1]) if value else None


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
