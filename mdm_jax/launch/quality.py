"""Quality of free text samples against the number of steps, for the sampler of a run."""

import json
import pathlib

import numpy as np
import tqdm

from mdm_jax import data, distributed, evaluation, plots
from mdm_jax.launch import build_masked, command_line
from mdm_jax.launch.experiment import Experiment, load_parameters, make_experiment
from mdm_jax.launch.warm_start import check_source
from mdm_jax.launch.workdir import write_json
from mdm_jax.types import Array, PyTree


def check_quality(experiment: Experiment) -> None:
    """Raises ValueError or WorkdirError where ``sample.quality_steps`` cannot be measured."""
    c, dataset = experiment.config.sample, experiment.dataset
    if dataset.tokenizer is None:
        raise ValueError("sample.quality_steps is about text, and this run's data are pictures")
    if experiment.config.process == "autoregressive":
        raise ValueError("sample.quality_steps: an autoregressive model has one step per token")
    if c.sampler in build_masked.SAMPLERS and c.sampler not in build_masked.grid_samplers(c):
        raise ValueError(
            f"sample.quality_steps: {c.sampler!r} sets its own number of steps, so that quality "
            "would be the same at all of them; those that take any number are "
            f"{', '.join(build_masked.grid_samplers(c))} (--config.sample.sampler)"
        )
    if min(c.quality_steps) < 1 or c.quality_texts < 2:
        raise ValueError(
            "sample.quality_steps must be positive and sample.quality_texts at least 2, got "
            f"{c.quality_steps} and {c.quality_texts}"
        )
    if c.judge:
        check_source(experiment, pathlib.Path(c.judge), "sample.judge")


def measure_quality(
    experiment: Experiment, workdir: pathlib.Path, step: int, params: PyTree, key: Array
) -> list[str]:
    """Samples ``sample.quality_texts`` texts with each number of steps; returns the files.

    Every measurement is a JSON file below ``workdir/quality``, never over an older one; the plot is
    drawn over all that are there, so that samplers measured one after another are compared. With
    ``sample.judge``, the directory of another run over the same tokens (an autoregressive one, for
    an exact likelihood), the generative perplexity is measured under its parameters.
    """
    check_quality(experiment)
    c, dataset = experiment.config.sample, experiment.dataset
    directory = workdir / "quality"
    if distributed.is_first():
        directory.mkdir(parents=True, exist_ok=True)
    _, source = experiment.held_out(experiment.config.evaluate.final_split)
    rows = data.gather(source, np.arange(min(c.quality_texts, len(source))))
    compare = {
        "held_out": np.asarray(rows.tokens),
        "held_out_valid": np.asarray(rows.documents) > 0,
        "score": _score(experiment, c.judge) if c.judge else None,
    }
    canvas = np.full((c.quality_texts, dataset.length), dataset.mask_id, np.int32)
    files = []
    silent = not distributed.is_first()
    for count in tqdm.tqdm(c.quality_steps, desc="quality", unit="setting", disable=silent):
        config = experiment.config.copy_and_resolve_references()
        config.sample.num_steps = count
        generate = experiment.process.generator(
            config, dataset, experiment.model, experiment.apply_fn
        )
        tokens = distributed.to_host(generate(params, key, canvas, np.ones_like(canvas)))
        quality = evaluation.measure_text_quality(tokens, **compare)
        files.append(_free_path(directory, f"{c.sampler}-{count}"))
        record = {"sampler": c.sampler, "num_steps": count, "step": step, "judge": c.judge}
        if distributed.is_first():
            write_json(files[-1], record | {"quality": quality.to_dict()})
    reference = evaluation.measure_text_quality(
        compare["held_out"], compare["held_out_valid"], score=compare["score"]
    )
    plot = directory / "quality.png"
    if not distributed.is_first():
        return [str(path) for path in (*files, plot)]
    records = [json.loads(path.read_text("utf-8")) for path in sorted(directory.glob("*.json"))]
    plots.quality_by_steps(records, references=reference.to_dict()).savefig(plot)
    return [str(path) for path in (*files, plot)]


def _score(experiment: Experiment, judge: str) -> evaluation.Score:
    directory = pathlib.Path(judge)
    other = make_experiment(command_line.get_config(judge))
    if other.dataset.length != experiment.dataset.length:
        raise ValueError(
            f"sample.judge: {judge} was trained on rows of {other.dataset.length} tokens, this run "
            f"on rows of {experiment.dataset.length}"
        )
    _, params = load_parameters(other, directory)
    c = other.config.evaluate
    evaluate = other.likelihood(c.final_passes, c.final_replicates)
    return evaluation.likelihood_score(evaluate, params, other.key(0, "judge"))


def _free_path(directory: pathlib.Path, stem: str) -> pathlib.Path:
    number, path = 1, directory / f"{stem}.json"
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.json"
    return path
