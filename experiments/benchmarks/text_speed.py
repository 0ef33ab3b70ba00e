"""Tokens per second of trained text models at equal quality, each at several numbers of steps.

    python -m experiments.benchmarks.text_speed --text_runs=runs/quickstart,runs/text_partition
        --judged_by=runs/text_ar [--step_counts=8,16,32,64,128] [--texts=64] [--out=FILE.json]

Each run writes the same number of rows by ``ancestral`` at temperature 1, a block model so many
steps for all its blocks together. Quality is nats per token under another run, ``--judged_by``;
their entropy stands beside it, since repetition has few nats too. Seconds are medians of
interleaved calls, compilation left out. The last table has each run's speed at the nats that the
first one reaches with its most steps, between its own step counts by interpolation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import machine
from experiments.benchmarks.command import interleaved, markdown, summary, write
from mdm_jax import evaluation, files
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment
from mdm_jax.launch.modes.evaluate import judge_score
from mdm_jax.launch.modes.sample import free_canvases
from mdm_jax.launch.workdir import saved_config

_RUNS = flags.DEFINE_list("text_runs", [], "Directories of trained runs.")
_JUDGE = flags.DEFINE_string("judged_by", None, "Directory of the run that judges.")
_STEPS = flags.DEFINE_list("step_counts", ["8", "16", "32", "64", "128"], "Steps of a row.")
_TEXTS = flags.DEFINE_integer("texts", 64, "Rows that each run writes.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("timed_rounds", 3, "Rounds of calls.", lower_bound=1)


def opened(workdir: str) -> Experiment:
    """A run, sampled by ``ancestral`` at temperature 1."""
    config = saved_config(workdir)
    config.sample.update(sampler="ancestral", temperature=1.0, top_k=0, top_p=1.0, judge="")
    return make_experiment(config, files.as_path(workdir))


def generators(
    experiment: Experiment, steps: Sequence[int]
) -> dict[int, tuple[int, Callable[..., Any]]]:
    """``(passes, generate)`` by steps of a row; a block model has an equal share for each block."""
    c = experiment.config
    blocks = c.data.length // c.block.size if c.process == "block" else 1
    shares = {count: count // blocks for count in steps if count >= blocks}
    return {n: (share * blocks, experiment.family.generator(share)) for n, share in shares.items()}


def measure(
    workdirs: Sequence[str], judge: str, steps: Sequence[int], texts: int, rounds: int
) -> list[dict[str, Any]]:
    """A record for each run and number of steps."""
    records, calls = [], {}
    score, alike = None, None
    for workdir in workdirs:
        experiment = opened(workdir)
        step, params = load_parameters(experiment, files.as_path(workdir))
        dataset = experiment.dataset
        rows = dataset.length, dataset.tokenizer and dataset.tokenizer.fingerprint
        if score is None:
            score, alike = judge_score(experiment, judge), rows
        elif rows != alike:
            raise ValueError(f"{workdir}: its rows or tokens are not those of {workdirs[0]}")
        canvas, documents = free_canvases(experiment.dataset, texts)
        key = experiment.key(step, "text speed")
        for count, (passes, generate) in generators(experiment, steps).items():

            def call(generate=generate, params=params, key=key, given=(canvas, documents)):
                return np.asarray(generate(params, key, *given))

            tokens = call()
            quality = evaluation.measure_text_quality(tokens, documents > 0, score=score).to_dict()
            nats = quality["generative_nats_per_token"]
            error = quality["generative_perplexity_standard_error"]
            record = {"run": workdir, "process": experiment.config.process, "steps": count}
            records.append(
                record
                | {"passes": passes, "tokens": quality["tokens"], "nats": nats}
                | {"error": error / np.exp(nats), "entropy": quality["token_entropy"]}
            )
            calls[len(records) - 1] = call
            print(f"{workdir}, {count} steps: {nats:.3f} nats per token", flush=True)
    times = interleaved(calls, rounds=rounds, seconds=0.0)
    for number, record in enumerate(records):
        record["seconds"] = summary(times[number])
        record["tokens_per_second"] = record["tokens"] / record["seconds"]["median"]
    return records


def at_equal_quality(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each run's speed at the nats per token that the first has at its most steps.

    Linear between neighbouring step counts, in nats and in the logarithm of the speed; None where
    a run does not come so low. A run that is below with its fewest steps has that speed, "at
    least".
    """
    first = [r for r in records if r["run"] == records[0]["run"]]
    target = max(first, key=lambda r: r["steps"])["nats"]
    found = []
    for run in dict.fromkeys(r["run"] for r in records):
        own = sorted((r for r in records if r["run"] == run), key=lambda r: r["steps"])
        at_least, speed = False, None
        for before, after in zip([None, *own], own):
            if after["nats"] > target:
                continue
            if before is None:
                at_least, speed = True, after["tokens_per_second"]
            else:
                share = (before["nats"] - target) / (before["nats"] - after["nats"])
                ends = np.log([before["tokens_per_second"], after["tokens_per_second"]])
                speed = float(np.exp(ends[0] + share * (ends[1] - ends[0])))
            break
        found.append({"run": run, "nats": target, "speed": speed, "at_least": at_least})
    return found


def main(_: list[str]) -> None:
    """Measure the runs of the command line, and print both tables."""
    logging.set_verbosity(logging.WARNING)
    if not _RUNS.value or not _JUDGE.value:
        raise app.UsageError("name trained runs, --text_runs=A,B, and the judge, --judged_by=C")
    steps = sorted({int(count) for count in _STEPS.value})
    records = measure(_RUNS.value, _JUDGE.value, steps, _TEXTS.value, _ROUNDS.value)
    equal = at_equal_quality(records)
    print(machine.describe(machine.facts()))
    head = ("run", "process", "steps", "nats per token", "entropy", "tokens/s", "seconds")
    rows = [
        (
            *(r["run"], r["process"], str(r["steps"]), f"{r['nats']:.3f} ± {r['error']:.3f}"),
            *(f"{r['entropy']:.2f}", f"{r['tokens_per_second']:,.0f}"),
            f"{r['seconds']['median']:.2f}",
        )
        for r in records
    ]
    print("\n".join(markdown(head, rows)))
    rows = [
        (e["run"], "-" if e["speed"] is None else f"{'≥ ' * e['at_least']}{e['speed']:,.0f}")
        for e in equal
    ]
    print("\n".join(markdown(("run", f"tokens/s at {equal[0]['nats']:.3f} nats"), rows)))
    write({"jax": jax.__version__, "records": records, "equal_quality": equal})


if __name__ == "__main__":
    app.run(main)
