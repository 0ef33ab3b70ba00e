"""The variance chain of a run, from the config or as ``variance.order=auto`` chose it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mdm_jax import data, files, schedules, training, variance
from mdm_jax.launch import names
from mdm_jax.launch.families import Family
from mdm_jax.launch.names import lookup, settings
from mdm_jax.launch.start import scaled
from mdm_jax.launch.workdir import WorkdirError
from mdm_jax.meter.clip_search import make_clip_search
from mdm_jax.objectives.objective import Objective
from mdm_jax.variance.transform import VarianceTransform

RECORDS = "auto.jsonl"
"""File of a run's choices: one line for each measurement, or for the lack of it."""

_ONE_LEVEL = (("stratified",), ("stratified", "ppots"), ("stratified", "mirror"))
CANDIDATES = {
    "masked": (
        ("stratified",),
        ("stratified", "ppots_slopes"),
        ("stratified", "mirror"),
        ("stratified", "ppots_slopes", "mirror"),
        ("stratified_levels",),
    ),
    "block": (
        ("stratified",),
        ("stratified_blocks",),
        ("stratified", "ppots_slopes"),
        ("stratified", "mirror"),
    ),
    "partition": (("stratified",), ("stratified", "ppots_slopes"), ("stratified", "mirror")),
    "uniform": _ONE_LEVEL,
    "gaussian": _ONE_LEVEL,
}
"""Exact candidates by process, the simplest first. Independent draws, which stratified ones cannot
be worse than, are measured as the reference alone."""
RANGES = ((0.3, 0.8), (0.45, 0.95))
"""Ranges of masking rates that ``auto_truncated`` tries (Arriola et al. 2025)."""
DEFAULTS = {
    "masked": ("stratified", "ppots_slopes"),
    "block": ("stratified", "ppots_slopes"),
    "partition": ("stratified", "ppots_slopes"),
    "uniform": ("stratified",),
    "gaussian": ("stratified",),
}
"""Chains of runs that are too short for a measurement."""


class Chain(NamedTuple):
    """Names of transforms in reading order, and settings that differ from the config's, by name."""

    order: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]] = {}

    @property
    def name(self) -> str:
        """For display, such as "stratified, clipped 0.3 to 0.8"."""
        named = (
            " ".join([name, *[" to ".join(map(str, self.settings.get(name, {}).values()))]]).strip()
            for name in self.order
        )
        return ", ".join(named) or "independent"

    def to_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "settings": {k: {**v} for k, v in self.settings.items()}}


def chain_of(record: Any, origin: str) -> Chain:
    """Inverse of :meth:`Chain.to_dict`; WorkdirError, naming ``origin``, if it is not one."""
    try:
        order = tuple(record["order"])
        if {*order} <= set(names.VARIANCE) and {*record["settings"]} <= {*order}:
            return Chain(order, record["settings"])
    except (KeyError, TypeError, AttributeError):
        pass
    raise WorkdirError(f"{origin} is damaged: {record!r} is not a variance chain that was chosen")


def is_automatic(config: ConfigDict) -> bool:
    """Whether the chain is measured and chosen; ValueError if other names stand beside "auto"."""
    order = tuple(config.variance.order)
    asked = [name for name in order if name in names.AUTO]
    if asked and len(order) > 1:
        raise ValueError(
            f"variance.order={order}: {asked[0]!r} chooses the whole chain and stands alone, as in "
            f'--config.variance.order="({asked[0]!r},)"'
        )
    if asked and config.process not in CANDIDATES:
        none = "noise to couple or warp" if config.process == "autoregressive" else "candidates"
        raise ValueError(
            f"process={config.process!r} has no {none}: "
            f'--config.variance.order="()" instead of {order}'
        )
    every, evaluate_every = config.variance.auto.every, scaled.evaluate_every(config)
    if every and not asked:
        raise ValueError(f"variance.auto.every={every} is only read with variance.order=auto")
    if every and (not evaluate_every or every % evaluate_every):
        raise ValueError(
            f"variance.auto.every={every} must be a multiple of train.evaluate_every="
            f"{evaluate_every}: a chain is only changed right before an evaluation"
        )
    return bool(asked)


def current(config: ConfigDict, workdir: files.Path | None) -> Chain:
    """The configured chain, the one last chosen in ``workdir``, or the default of ``auto``."""
    if not is_automatic(config):
        return Chain(tuple(config.variance.order))
    chosen = None if workdir is None else last_choice(workdir)
    return chosen or Chain(DEFAULTS[config.process])


def last_choice(workdir: files.Path) -> Chain | None:
    """The chain of the last line of the records, None without any; WorkdirError if damaged."""
    path = workdir / RECORDS
    lines = [*files.read_records(path)] if path.exists() else []
    if not lines:
        return None
    origin, record = lines[-1]
    return chain_of(record.get("chain") if isinstance(record, dict) else record, origin)


def rows_of(config: ConfigDict, transform: VarianceTransform) -> int:
    """Rows of a step: ``train.batch_size``, which under ``auto`` counts forward passes."""
    size, views = config.train.batch_size, transform.views
    if not is_automatic(config):
        return size
    if size % views:
        raise ValueError(f"{views} views do not divide the {size} forward passes of a step")
    return size // views


def transform(
    config: ConfigDict, law: schedules.Law | None, chain: Chain | None = None
) -> VarianceTransform:
    """The transform of a chain, else the configured; members that read levels get the run's law."""
    chain = Chain(tuple(config.variance.order)) if chain is None else chain
    members = []
    for name in chain.order:
        factory = lookup(names.VARIANCE, name, "variance.order")
        arguments = settings(config.variance, name) | dict(chain.settings.get(name, {}))
        known = inspect.signature(factory).parameters
        if "coordinate" in known:
            arguments["coordinate"] = lambda u: -law.icdf(u) / 8  # EDM2's log(sigma) / 4
        if "log_factor" in known and config.process == "gaussian":
            arguments["log_factor"] = lambda u: -law.icdf(u)  # to the error of the clean data
        members.append(factory(**arguments))
    return variance.chain(*members)


def monitors(
    order: Sequence[str],
    section: Mapping[str, Any],
    objective: Objective,
    chain: VarianceTransform,
) -> tuple[training.Monitor, ...]:
    """Monitors by name, in order."""
    made = []
    for name in order:
        factory = lookup(names.MONITORS, name, "train.monitors")
        arguments = settings(section, name)
        own = {"objective": objective, "chain": chain}
        known = inspect.signature(factory).parameters
        made.append(factory(**arguments, **{k: v for k, v in own.items() if k in known}))
    return tuple(made)


def clip_search(
    dataset: data.Dataset, family: Family, rows: int, *, criterion: str, batches: int
) -> Callable[..., Any]:
    """The search for the range of ``clipped_adaptive``; ValueError for too few batches."""
    score = lookup(names.CLIP_CRITERIA, criterion, "clip_search.criterion")
    if min(batches, len(dataset.valid) // rows) < 2:
        raise ValueError(
            f"clipped_adaptive is searched on at least 2 validation batches of {rows} rows "
            f"(evaluate.batch_size, clip_search.batches = {batches}), and there are "
            f"{len(dataset.valid)} rows; take smaller batches, or variance.clipped with a fixed "
            "range"
        )
    return make_clip_search(
        family.apply_fn, family.objective, (rows, dataset.length), criterion=score
    )
