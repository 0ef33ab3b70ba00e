"""The range of ``clipped_adaptive``, searched before each validation."""

import json
from collections.abc import Callable

import jax

from mdm_jax import distributed, files, training
from mdm_jax.launch.build import Experiment
from mdm_jax.meter.clip_search import ClipChoice
from mdm_jax.training.step import TrainState
from mdm_jax.types import PyTree
from mdm_jax.variance.warps import set_clip_range


def adapt_hook(
    experiment: Experiment, workdir: files.Path, writer: training.MetricWriter
) -> Callable[..., TrainState]:
    """Choose the range of ``clipped_adaptive``; scores are logged to ``clip_search.jsonl``."""
    source, rows = experiment.dataset.valid, experiment.config.evaluate.batch_size
    count = min(experiment.config.clip_search.batches, len(source) // rows)

    def adapt(step: int, state: TrainState, check: Callable) -> TrainState:
        choice = experiment.clip_search(
            experiment.variables(training.averaged(state)),
            list(experiment.batches(source, count * rows)),
            experiment.key(step, "clip_search"),
            step=step,
            progress=lambda _: check(),
        )
        if distributed.is_first():
            _append_choice(workdir / "clip_search.jsonl", choice)
        writer.record(step, "adapt", {"clip_low": choice.low, "clip_high": choice.high})
        moved = set_clip_range(state.variance, choice.low, choice.high)
        # Placed as before, so that the step is not compiled for another placement.
        return state.replace(variance=_placed_as(moved, state.variance))

    return adapt


def _placed_as(new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jax.device_put(n, o.sharding), new, old)


def _append_choice(path: files.Path, choice: ClipChoice) -> None:
    """Add a line; those of this and later steps, from before a resume, are replaced."""
    kept = []
    for origin, record in files.read_records(path) if path.exists() else ():
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{origin}: not the record of a clip search")
        if record["step"] < choice.step:
            kept.append(record)
    files.write(path, "".join(json.dumps(line) + "\n" for line in [*kept, choice.to_dict()]))
