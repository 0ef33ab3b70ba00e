"""``variance.order=auto``: measure chains on the run's model and data, and take the best one.

Chains are compared by the variance of the gradient per forward pass, with rows drawn anew. Under
``auto`` a step has ``train.batch_size`` forward passes: a chain of two views gets half the rows.
``auto_truncated`` also tries clipped ranges and compares all by noise to signal, as they estimate
another gradient.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mdm_jax import distributed, files, meter, rng, variance
from mdm_jax.launch.auto.chain import (
    CANDIDATES,
    DEFAULTS,
    RANGES,
    RECORDS,
    Chain,
    chain_of,
)
from mdm_jax.launch.build import Experiment
from mdm_jax.meter.efficiency import MIN_REDRAWS, Efficiency
from mdm_jax.meter.subject import Subject
from mdm_jax.progress import progress_bar
from mdm_jax.training.step import TrainState
from mdm_jax.types import Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform

REFERENCE = "independent"
MOST_REDRAWS = 24
"""Of a group: more would not change the choice."""
POOL = 512
"""Training rows that batches are drawn from."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a measurement costs; passes are forward-backward passes of one row.

    Attributes:
        transforms, members: of the reference and of each candidate, by name; its single transforms.
        chains: of the candidates, the simplest first.
        left_out: candidates that cannot be had here, with the reason.
        warm_up: passes (here forward alone) in which adaptive transforms learn first.
        redraws: of each group; 0 where the budget does not suffice.
        allowed, least: passes that the budget allows, and those of the shortest measurement.
    """

    transforms: dict[str, VarianceTransform]
    members: dict[str, tuple[VarianceTransform, ...]]
    chains: dict[str, Chain]
    left_out: dict[str, str]
    warm_up: int
    redraws: int
    allowed: int
    least: int


def candidates(experiment: Experiment) -> list[Chain]:
    """The chains that are compared, the simplest first (``chain.CANDIDATES``)."""
    c = experiment.config
    chains = [Chain(order) for order in CANDIDATES[c.process]]
    if tuple(c.variance.order) == ("auto_truncated",):
        if c.process not in ("masked", "block"):
            raise ValueError(
                f"variance.order=auto_truncated tries ranges of masking rates, which process="
                f"{c.process} does not have; take variance.order=auto"
            )
        chains += [
            Chain(("stratified", "clipped"), {"clipped": {"low": low, "high": high}})
            for low, high in RANGES
        ]
    return chains


def measurements(experiment: Experiment) -> int:
    """Number of measurements of a whole run, which share the budget."""
    c = experiment.config
    every = c.variance.auto.every
    return 1 + ((c.train.steps - 1) // every if every else 0)


def plan(experiment: Experiment, learned: dict[str, PyTree], same_rows: bool) -> Plan:
    """Plan a measurement; ``same_rows``: of chains with as many views as the run has now.

    ``learned`` holds states by transform that need no warm-up.
    """
    c, s = experiment.config, experiment.config.variance.auto
    reference = experiment.with_chain(Chain(()))
    transforms, members = {REFERENCE: reference.transform}, {REFERENCE: reference.members}
    chains, left_out = {}, {}
    for chain in candidates(experiment):
        try:
            under = experiment.with_chain(chain)
            transform = under.transform
            if s.passes % transform.views:
                raise ValueError(f"{transform.views} views do not divide variance.auto.passes")
            if same_rows and transform.views != experiment.transform.views:
                raise ValueError("it would change the rows of a step in mid-run")
        except ValueError as error:
            left_out[chain.name] = str(error)
            continue
        transforms[chain.name], members[chain.name] = transform, under.members
        chains[chain.name] = chain
    spec = experiment.objective.spec(s.passes, max(experiment.lengths))
    stateful = {
        warp
        for transform in transforms.values()
        for warp, state in transform.init(spec).items()
        if jax.tree.leaves(state) and warp not in learned
    }
    warm_up = len(stateful) * s.warm_up * s.passes
    passes = c.train.steps * c.train.batch_size
    allowed = math.floor(s.budget * passes / measurements(experiment))
    one = len(transforms) * s.groups * s.passes  # one redraw of each group under each chain
    fewest = math.ceil(MIN_REDRAWS / s.groups) + 1  # of which a group loses one to its mean
    redraws = min((allowed - warm_up) // one, MOST_REDRAWS)
    return Plan(
        transforms=transforms,
        members=members,
        chains=chains,
        left_out=left_out,
        warm_up=warm_up,
        redraws=redraws if redraws >= fewest else 0,
        allowed=allowed,
        least=warm_up + fewest * one,
    )


def choose(
    experiment: Experiment, state: TrainState, check: Callable[..., Any] = lambda *_: None
) -> tuple[dict[str, Any], Chain, PyTree | None]:
    """Measure the candidates at ``state.params``: record, chain, and its state in mid-run.

    At step 0 chains begin anew, so that a run killed before its first checkpoint does not differ.
    Later ones are limited to the views that the run has, and keep what was learned here.
    ``check`` is called with the passes done; may raise. Of several processes all measure, rows
    spread over all devices, and take what process 0 finds.
    """
    step = int(jax.device_get(state.step))
    learned = dict(state.variance) if step else {}
    planned = plan(experiment, learned, same_rows=step > 0)
    record: dict[str, Any] = {
        "step": step,
        "passes": 0,
        "allowed": planned.allowed,
        "left_out": planned.left_out,
        "redraws": planned.redraws,
        "chains": {},
    }
    chosen = experiment.chain if step else Chain(DEFAULTS[experiment.config.process])
    if not planned.redraws:
        c = experiment.config
        total = c.train.steps * c.train.batch_size
        needed = planned.least * measurements(experiment) / total
        reason = (
            f"variance.auto.budget={c.variance.auto.budget:g} of the run's {total:,} "
            f"forward-backward passes allows {planned.allowed:,} for a measurement, and the "
            f"shortest takes {planned.least:,} (budget {needed:.2g}); not measured"
        )
    else:
        params = experiment.variables(state.params)
        figures = _measure(experiment, params, planned, learned, step, check)
        truncated = any(each.bias != "exact" for each in planned.transforms.values())
        ranked = meter.rank(figures, REFERENCE, by_noise_to_signal=truncated)
        record["chains"] = {
            name: {
                "views": planned.transforms[name].views,
                "bias": planned.transforms[name].bias,
                **each.to_dict(),
                "group_variances": figures[name].group_variances.tolist(),
                "group_signals": figures[name].group_signals.tolist(),
            }
            for name, each in ranked.items()
        }
        s = experiment.config.variance.auto
        record["passes"] = planned.warm_up + planned.redraws * s.groups * s.passes * len(ranked)
        record["by"] = "noise to signal" if truncated else "variance"
        name, reason = meter.first_tied(ranked), "no chain has a settled figure"
        tied = [other for other, each in ranked.items() if each.tied]
        if step and experiment.chain.name in tied:
            reason = "as before, the least or not told apart from it"
        elif name is not None:
            chosen = planned.chains[name]
            reason = "less than all others, by the intervals of the paired differences"
            if len(tied) > 1:
                reason = f"the simplest of those not told apart: {'; '.join(tied)}"
    record |= {"chain": chosen.to_dict(), "name": chosen.name, "reason": reason}
    record = distributed.from_first(record)
    chosen = chain_of(record["chain"], "the choice of process 0")
    record["bias"] = experiment.with_chain(chosen).bias()
    new = None
    if step and chosen != experiment.chain:
        new = experiment.with_chain(chosen).transform.init(experiment.spec)
        new |= _known(learned, new)
    return record, chosen, new


def write(workdir: files.Path, record: dict[str, Any]) -> None:
    """Add a line to ``auto.jsonl``; those of this and later steps are replaced."""
    if not distributed.is_first():
        return
    path = workdir / RECORDS
    kept = [line for _, line in files.read_records(path)] if path.exists() else []
    kept = [line for line in kept if line["step"] < record["step"]]
    files.write(path, "".join(json.dumps(line) + "\n" for line in [*kept, record]))


def describe(record: dict[str, Any]) -> str:
    """Table of a measurement and the choice, for the terminal."""
    lines = [f"variance.order=auto at step {record['step']}:"]
    if record["chains"]:
        rows = [("chain", "bias", "views", f"{record['by']} per pass", "95 % interval")]
        for name, each in record["chains"].items():
            ratio, ends = each["ratio"], each["interval"]
            shown = ("not settled", each["unsettled"]) if each["unsettled"] else ("", "")
            if ratio is not None:
                reference = name == REFERENCE
                shown = (f"{ratio:.2f}x", "" if reference else f"[{ends[0]:.2f}, {ends[1]:.2f}]")
            rows.append((name, each["bias"], str(each["views"]), *shown))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines += [
            "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip()
            for row in rows
        ]
        share = record["passes"] / max(record["allowed"], 1)
        lines.append(
            f"  measured in {record['passes']:,} forward-backward passes, {share:.0%} of those "
            "allowed; x: relative to independent draws"
        )
    lines += [f"  left out: {name}, since {why}" for name, why in record["left_out"].items()]
    lines.append(f"  chosen: {record['name']} [{record['bias']}] ({record['reason']})")
    return "\n".join(lines)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """What goes to the metrics: the chosen chain's figure relative to independent draws."""
    ratio = record["chains"].get(record["name"], {}).get("ratio")
    return {"passes": record["passes"]} | ({} if ratio is None else {"against_independent": ratio})


def _measure(
    experiment: Experiment,
    params: PyTree,
    planned: Plan,
    learned: dict[str, PyTree],
    step: int,
    check: Callable[..., Any],
) -> dict[str, Efficiency]:
    """Figures by chain; states of adaptive transforms are put into ``learned``."""
    s, key = experiment.config.variance.auto, experiment.key(step, "auto")
    objective, length = experiment.objective, max(experiment.lengths)
    # As annealed as training is here.
    apply_fn = experiment.apply_at(experiment.config.seed, step, experiment.frozen)
    estimator = meter.make_estimator(apply_fn, objective)
    rows = experiment.measured_rows(params, POOL, step)
    figures = {}
    total = planned.warm_up // s.passes + planned.redraws * s.groups * len(planned.transforms)
    silent = not distributed.is_first()
    with progress_bar(total, unit="batches", silent=silent, leave=False) as bar:

        def progress(count: int) -> None:
            bar.update(count)
            check()

        for name, transform in planned.transforms.items():
            bar.set_description(name)
            spec = objective.spec(s.passes, length)
            state = transform.init(spec)
            missing = [n for n, each in state.items() if jax.tree.leaves(each) and n not in learned]
            if missing:
                single = (t for t in planned.members[name] if t.views == 1)
                own = experiment.repeated(variance.chain(*single))
                warm = meter.warm_up(
                    apply_fn,
                    objective,
                    own,
                    spec,
                    params,
                    own.init(spec),
                    _batches(rows, experiment, step, progress),
                    rng.stream(key, "warm-up"),
                )
                learned |= {n: warm[n] for n in missing}
            figures[name] = meter.efficiency_at_equal_passes(
                Subject(estimator, params, transform, state | _known(learned, state), spec),
                rows,
                rng.stream(key, "redraws"),
                passes=s.passes,
                groups=s.groups,
                redraws=planned.redraws,
                num_microbatches=experiment.num_microbatches,
                progress=progress,
            )
    return figures


def _known(learned: dict[str, PyTree], state: dict[str, PyTree]) -> dict[str, PyTree]:
    return {name: value for name, value in learned.items() if name in state}


def _batches(
    rows: Batch, experiment: Experiment, step: int, progress: Callable[[int], None]
) -> Iterator[Batch]:
    s = experiment.config.variance.auto
    generator = np.random.default_rng([experiment.config.seed, step, 1])
    for _ in range(s.warm_up):
        index = generator.integers(0, len(rows.tokens), s.passes)
        yield jax.tree.map(lambda field, index=index: np.asarray(field)[index], rows)
        progress(1)
