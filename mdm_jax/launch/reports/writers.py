"""The writer of a run's metrics, with the boards that its config asks for."""

from collections.abc import Collection, Mapping
from typing import Any

from mdm_jax import distributed, files, training


def check_boards(config: Mapping[str, Any]) -> None:
    """Raise ImportError where a board's package is missing."""
    if config["wandb"]["project"]:
        training.import_wandb()


def open_writer(
    config: Any, workdir: files.Path, step: int, again: Collection[str] = ()
) -> training.MetricWriter:
    """The writer of process 0, which goes on at ``step``; others get one that writes nothing."""
    if not distributed.is_first():
        return training.SilentWriter()
    boards, c = [], config.wandb
    if c.project:
        settings = config.to_dict()
        boards.append(training.WeightsAndBiases(workdir, c.project, c.entity, settings))
    return training.MetricWriter(workdir, step, again, boards)


def reopen_writer(config: Any, workdir: files.Path) -> training.MetricWriter:
    """The writer of a run, for results after its last record."""
    records = training.read_metrics(workdir / "metrics.jsonl") if distributed.is_first() else ()
    return open_writer(config, workdir, max((r["step"] for r in records), default=0))
