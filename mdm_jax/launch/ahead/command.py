"""``mdm compile``: what a run needs of a machine that need not be there, by its compiler."""

import bisect
import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from mdm_jax import files
from mdm_jax.launch.ahead import collectives, targets
from mdm_jax.launch.ahead import plan as plans
from mdm_jax.launch.ahead.plan import Plan
from mdm_jax.launch.ahead.targets import Chip
from mdm_jax.models import layers

_TOPOLOGY = flags.DEFINE_string("topology", None, f"compile: {targets.EXAMPLES}.")
_WHAT = flags.DEFINE_list("what", ["train"], "compile: train, evaluate, sample.")
_SEARCH = flags.DEFINE_bool("search", False, "compile: over meshes and rematerialisations.")
SEARCH_SECONDS = 1800.0
"""How long a search goes on by default."""
_SECONDS = flags.DEFINE_float(
    "search_seconds", SEARCH_SECONDS, "compile: how long it goes on.", 0.0
)
_FIT = flags.DEFINE_bool("fit_rows", True, "compile: also twice the rows, to say how many fit.")

REMATS = ("none", "dots", "dots_without_batch", "attention", "full")
"""Rematerialisation tried by the search, from fast to small."""
OFFLOADING = ("offload_dots", "offload_inputs")
"""Tried where none of :data:`REMATS` fits, if devices reach the host's memory."""

_FITTING = 0.92
"""Share of a chip's memory that a plan may use; the rest is the runtime's."""


def run(config: ConfigDict, to: str | None, show: Callable[[str], None] = print) -> int:
    """Compile a run's programs as the flags say, and print their plans; the exit status.

    ``to`` is a new file for all figures, or None. ValueError for a missing or unknown topology, an
    unknown program, what cannot be built, and a file that exists.
    """
    if not _TOPOLOGY.value:
        raise ValueError(f"--topology is required: chips and their number, {targets.EXAMPLES}")
    return plan(
        config,
        _TOPOLOGY.value,
        names=_WHAT.value,
        search=_SEARCH.value,
        search_seconds=_SECONDS.value,
        fit_rows=_FIT.value,
        out=to and files.as_path(to),
        show=show,
    )


def plan(
    config: ConfigDict,
    topology: str,
    *,
    names: Sequence[str] = ("train",),
    search: bool = False,
    search_seconds: float = SEARCH_SECONDS,
    fit_rows: bool = True,
    out: files.Path | None = None,
    show: Callable[[str], None] = print,
) -> int:
    """Compile the programs ``names``, print their plans and suggestions, and write them to ``out``.

    ``search`` looks for the fastest training step that fits, over meshes that divide the model and
    rematerialisations, until ``search_seconds`` are spent. Raises as :func:`run`.
    """
    if unknown := sorted(set(names) - set(plans.PROGRAMS)):
        raise ValueError(
            f"--what: unknown {', '.join(unknown)}; known are {', '.join(plans.PROGRAMS)}"
        )
    if out is not None and out.exists():
        raise ValueError(f"--to={out} exists; name a new file, or move it away")
    chip = targets.chip_of(topology)
    if search and chip.platform == "cpu":
        raise ValueError(f"--search compares by published figures, and {topology} has none")
    devices = targets.devices(topology)
    config = _with_mesh(config, len(devices))
    show(_header(topology, chip, len(devices)))
    record: dict[str, Any] = {"topology": topology, "chip": dataclasses.asdict(chip), "plans": []}
    for name in names:
        made = plans.compile_plan(config, devices, name)
        show(describe(made, chip))
        record["plans"].append(_record(made, chip))
        if name == "train" and fit_rows and chip.platform != "cpu":
            show(_fitting_rows(config, devices, made, chip))
    if search:
        record["search"] = _search(config, devices, chip, search_seconds, show)
    if out is not None:
        files.write_json(out, record)
        show(f"written to {out}")
    return 0


def describe(made: Plan, chip: Chip) -> str:
    """A plan in words and tables."""
    mesh = ", ".join(f"{name} {size}" for name, size in made.mesh.items())
    lines = [
        f"\n{made.program}: {made.parameters / 1e9:.3f}B parameters, mesh {mesh}, "
        f"{made.rows} rows, remat {made.remat}; compiled in {made.compile_seconds:.0f} s",
        "  memory of a device: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in made.state.items())
        + f", temporaries {made.temporaries / 1e9:.2f}; in all {made.memory / 1e9:.2f} GB"
        + _of_memory(made, chip)
        + (f"; {made.host / 1e9:.2f} GB in the host's" if made.host else ""),
        f"  matrix products: {made.flops / 1e12:.3f} TFLOP a device; memory traffic "
        f"{made.traffic / 1e9:.1f} GB (estimated from the compiled program)",
    ]
    totals = collectives.describe(made.collectives)
    for kind, one in totals.items():
        size = one.bytes_sent / 1e9
        lines.append(f"  {kind}: {one.count} a step, {size:.3f} GB sent by a device")
    if sent := sum(one.bytes_sent for one in totals.values()):
        shares = (
            sum(getattr(one, name) for one in totals.values()) / sent
            for name in ("asynchronous", "overlapped")
        )
        lines.append(
            "  of these bytes {:.0%} are sent asynchronously, {:.0%} beside matrix products".format(
                *shares
            )
        )
    else:
        lines.append("  no collectives")
    if chip.platform != "cpu":
        seconds = made.seconds(chip)
        limit = max(seconds, key=seconds.get)
        lines.append(
            "  least time a step by published figures: "
            + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
            + f"; {limit} is the limit"
        )
    if made.unknown_loops:
        lines.append(f"  {made.unknown_loops} loops of unknown length count as one pass")
    lines.append("  largest arrays:")
    for buffer in made.largest[:5]:
        lines.append(f"    {buffer.bytes / 1e9:7.3f} GB  {buffer.type}  {buffer.origin[-70:]}")
    return "\n".join(lines)


def _header(topology: str, chip: Chip, count: int) -> str:
    if chip.platform == "cpu":
        return f"{topology}: {count} devices of this process; no published figures"
    return (
        f"{topology}: {count} chips, each {chip.flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{chip.memory / 1e9:.0f} GB at {chip.bandwidth / 1e9:.0f} GB/s, "
        f"{chip.links / 1e9:.0f} GB/s to other chips over all links ({chip.source}); "
        "nothing is run, and times are lower bounds"
    )


def _of_memory(made: Plan, chip: Chip) -> str:
    if chip.platform == "cpu":
        return ""
    return f" of {chip.memory / 1e9:.0f}" + ("" if made.fits(chip) else ": DOES NOT FIT")


def _with_mesh(config: ConfigDict, devices: int) -> ConfigDict:
    """The config with all axes of its mesh as numbers, for so many devices."""
    config = copy.deepcopy(config)
    c = config.mesh
    if c.data == -1 and devices % (c.fsdp * c.tensor) == 0:
        c.data = devices // (c.fsdp * c.tensor)
    return config


def _changed(config: ConfigDict, mesh: dict[str, int], remat: str) -> ConfigDict:
    config = copy.deepcopy(config)
    config.mesh.update(mesh)
    config.model.remat = remat
    return config


def _fitting_rows(config: ConfigDict, devices: Sequence[jax.Device], made: Plan, chip: Chip) -> str:
    """How many rows fit, by a second plan of twice as many."""
    doubled = copy.deepcopy(config)
    doubled.train.batch_size = 2 * made.rows
    try:
        rows = plans.rows_that_fit(
            made, plans.compile_plan(doubled, devices), _FITTING * chip.memory
        )
    except (MemoryError, ValueError) as error:
        return f"  rows that fit: not known ({error})"
    if rows == 0:
        return (
            f"  not even {made.rows} rows fit in {_FITTING:.0%} of the memory; try "
            "--config.train.num_microbatches, --config.model.remat=full, a larger "
            "--config.mesh.fsdp or --search"
        )
    return f"  rows that fit in {_FITTING:.0%} of the memory, by a plan of twice as many: {rows}"


def _search(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    chip: Chip,
    budget: float,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Plans by mesh with the first rematerialisation that fits, found by bisection: four plans of
    a mesh at most. The fastest is named.

    Transfers to the host's memory are no part of its time, so a plan that offloads is named only
    where no other fits.
    """
    rows, heads = (
        config.train.batch_size // (config.train.num_microbatches or 1),
        config.model.num_heads,
    )
    tried: list[Plan] = []
    fitting: list[Plan] = []
    attempts, started = itertools.count(), time.monotonic()
    show("\nsearch over meshes and rematerialisation (least time by published figures):")

    def fits(mesh: dict[str, int], remat: str) -> bool:
        if next(attempts) and time.monotonic() - started > budget:
            raise TimeoutError
        try:
            made = plans.compile_plan(_changed(config, mesh, remat), devices)
        except (MemoryError, ValueError) as error:
            show(f"  {_mesh(mesh)} remat {remat}: {str(error)[:100]}")
            return False
        tried.append(made)
        enough = made.memory <= _FITTING * chip.memory
        fitting.extend([made] * enough)
        show(
            f"  {_mesh(mesh)} remat {remat}: {made.memory / 1e9:.2f} GB, "
            f"{_least(made, chip) * 1e3:.1f} ms"
            + (f" and {made.host / 1e9:.2f} GB to the host and back" if made.host else "")
            + ("" if enough else f", more than {_FITTING:.0%} of the memory")
        )
        return enough

    offloading = [name for name in OFFLOADING if _allowed(devices[0], name)]
    try:
        for mesh in plans.meshes(len(devices), heads, rows):
            first = bisect.bisect_left(REMATS, True, key=functools.partial(fits, mesh))
            if first == len(REMATS):
                any(fits(mesh, remat) for remat in offloading)
    except TimeoutError:
        show(f"  stopped after {budget:.0f} s (--search_seconds)")
    if not fitting:
        show("  nothing fits; use more chips, fewer rows or --config.train.num_microbatches")
    else:
        best = min(fitting, key=lambda made: (made.host > 0, _least(made, chip)))
        mesh = ",".join(f"{name}={size}" for name, size in best.mesh.items())
        show(f"  suggested: --config.mesh={mesh} --config.model.remat={best.remat}")
    return [_record(made, chip) for made in tried]


def _allowed(device: jax.Device, remat: str) -> bool:
    try:
        layers.check_policy(device, remat)
    except ValueError:
        return False
    return True


def _least(made: Plan, chip: Chip) -> float:
    return max(made.seconds(chip).values())


def _mesh(mesh: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in mesh.items())


def _record(made: Plan, chip: Chip) -> dict[str, Any]:
    values = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "text"}
    values["collectives"] = [one._asdict() for one in made.collectives]
    values["largest"] = [one._asdict() for one in made.largest]
    seconds = {} if chip.platform == "cpu" else made.seconds(chip)
    return values | {"least_seconds": seconds, "fits": made.fits(chip)}
