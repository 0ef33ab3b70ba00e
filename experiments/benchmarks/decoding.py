"""Quality against time of every masked sampler, approximate cache and rule, on trained models.

    mdm train --config=experiments/configs/study/sudoku6.py --workdir=RUN
    python -m experiments.benchmarks.decoding --task_run=RUN [--task_rows=32] [--questions=2]

The run of a task answers held-out prompts by each sampler; the repository's small model answers
held-out questions of its lessons by each rule and approximate cache. Per way: share of right
answers, tokens equal to the exact decode's (one token a step, the most likely first), processor
seconds a row (one warm call, compilation left out), and the speed over it.
"""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import conversations
from experiments.benchmarks import command, machine
from mdm_jax import data, evaluation, files, hub, models, samplers
from mdm_jax.launch import build
from mdm_jax.launch.workdir import saved_config
from mdm_jax.samplers import ApproximateCache
from mdm_jax.schedules import grids

_RUN = flags.DEFINE_string("task_run", "", "Workdir of a run of a task; none: leave it out.")
_ROWS = flags.DEFINE_integer("task_rows", 32, "Prompts of the task.", lower_bound=2)
_QUESTIONS = flags.DEFINE_integer("questions", 2, "Of each lesson; 0: leave it out.")
_CALLS = flags.DEFINE_integer("timed_calls", 1, "Of each way, the least of which counts.")
SMALL = pathlib.Path(__file__).parents[1] / "models" / "small"
REFERENCE = "exact"


def ways(size: int) -> Mapping[str, tuple[Any, Any, ApproximateCache | None]]:
    """Samplers for answers of ``size`` tokens: (sampler, grid, cache)."""
    greedy, rate = samplers.temperature(0.0), grids.uniform_masking_rate
    block = max(size // 4, 1)
    exact = samplers.by_score(token_filter=greedy)
    in_blocks = samplers.low_confidence_remasking(block, block, greedy)
    parallel = samplers.confidence_parallel(size, 0.9, token_filter=greedy)
    parallel_blocks = samplers.confidence_parallel(block, 0.9, token_filter=greedy)
    factor = samplers.confidence_parallel(size, factor=0.5, token_filter=greedy)
    table = {REFERENCE: (exact, None, None)}
    for count in (2, 4, 8):
        several = samplers.by_score(tokens_per_step=count, token_filter=greedy)
        table[f"by_confidence, {count} a step"] = (several, None, None)
    for name in ("margin", "negative_entropy"):
        several = samplers.by_score(getattr(samplers, name), 4, greedy)
        table[f"by_{name}, 4 a step"] = (several, None, None)
    table["entropy_bounded, 0.5 nats"] = (samplers.entropy_bounded(0.5), None, None)
    table["first_hitting"] = (samplers.first_hitting(greedy), None, None)
    for steps in (8, 32):
        table[f"ancestral, {steps} steps"] = (samplers.ancestral(greedy), rate(steps), None)
    table["cached_ancestral, 32 steps"] = (samplers.cached_ancestral(8, greedy), rate(32), None)
    table["remdm_cap, 32 steps"] = (samplers.remdm_cap(0.02, greedy), rate(32), None)
    table["remdm_rescale, 32 steps"] = (samplers.remdm_rescale(0.1, greedy), rate(32), None)
    table["remdm_confidence, 32 steps"] = (samplers.remdm_confidence(greedy), rate(32), None)
    table["remdm_loop, 32 steps"] = (samplers.remdm_loop(token_filter=greedy), rate(32), None)
    table["predictor_corrector, 16 steps"] = (
        samplers.predictor_corrector(),
        rate(16),
        None,
    )
    random = samplers.random_remasking(block, max(block // 2, 1), greedy)
    table["random_remasking, 2 a step"] = (random, None, None)
    table[f"blocks of {block}"] = (in_blocks, None, None)
    table["parallel, above 0.9"] = (parallel, None, None)
    table["parallel, factor 0.5"] = (factor, None, None)
    for kind in ("prefix", "dual", "delayed"):
        table[f"blocks of {block}, {kind} cache"] = (in_blocks, None, ApproximateCache(kind))
    for refresh in (2, 4, 8):
        cache = ApproximateCache("delayed", refresh)
        table[f"exact's order, delayed cache, refresh {refresh}"] = (exact, None, cache)
    for kind in ("prefix", "dual", "delayed"):
        cached = (parallel_blocks, None, ApproximateCache(kind))
        table[f"parallel in blocks of {block}, {kind} cache"] = cached
    return table


def of_task(workdir: str) -> tuple[str, dict[str, tuple[float, float, np.ndarray]]]:
    """The run's title, and (share right, seconds a row, tokens) of each way."""
    config = saved_config(workdir)
    experiment = build.make_experiment(config)
    step, params = build.load_parameters(experiment, files.as_path(workdir))
    dataset, model = experiment.dataset, experiment.family.model
    rows = data.gather(experiment.held_out[1], np.arange(_ROWS.value))
    canvas, documents = samplers.canvas_like(rows, dataset.mask_id)
    free = canvas == dataset.mask_id
    apply_fn = models.without_tokens(experiment.family.apply_fn, dataset.absent_ids)
    decoder = models.partial_decoder(model)
    decoder = decoder._replace(readout=models.without_tokens(decoder.readout, dataset.absent_ids))
    found = {}
    for name, (sampler, grid, cache) in ways(int(free.sum(1).max())).items():
        options = {"mask_id": dataset.mask_id}
        if cache is None:
            generate = samplers.make_generator(apply_fn, sampler, grid, **options)
        else:
            generate = samplers.make_cached_generator(decoder, sampler, cache, grid, **options)

        def call(generate=generate) -> np.ndarray:
            return np.asarray(generate(params, jax.random.key(0), canvas, documents))

        tokens, seconds = timed(call)
        accuracy = evaluation.measure_task_accuracy(
            lambda *_, tokens=tokens, **__: tokens,
            params,
            jax.random.key(0),
            [rows],
            check=dataset.check,
            tokenizer=dataset.tokenizer,
        )
        found[name] = (accuracy.accuracy, seconds / len(canvas), tokens[free])
    title = (
        f"{workdir}, step {step}: {len(canvas)} answers of {free.sum() / len(canvas):.0f} tokens"
    )
    return title, found


def of_small() -> tuple[str, dict[str, tuple[float, float, np.ndarray]]]:
    """The same of the small model's lessons."""
    model = hub.load(SMALL, dtype="float32")
    codec, asked = model.tokenizer, []
    for lesson in conversations.LESSONS:
        asked += [conversations.exchange(lesson, "valid", i) for i in range(_QUESTIONS.value)]
    prompts = [
        codec.encode_chat([{"role": "user", "content": one.question}], True).ids for one in asked
    ]
    given = {"rule": "llada", "padding": "right", "pad_multiple": 32}
    settings: dict[str, dict[str, Any]] = {REFERENCE: {}}
    settings["2 tokens a step"] = {"steps": 16}
    settings["4 tokens a step"] = {"steps": 8}
    settings["blocks of 8"] = {"block_size": 8}
    settings["parallel, above 0.9"] = {"threshold": 0.9}
    settings["parallel, factor 0.5"] = {"factor": 0.5}
    for kind in ("prefix", "dual", "delayed"):
        settings[f"{kind} cache"] = {"approximation": kind}
        settings[f"blocks of 8, {kind} cache"] = {"block_size": 8, "approximation": kind}
    for refresh in (2, 8):
        settings[f"delayed cache, refresh {refresh}"] = {
            "approximation": "delayed",
            "refresh": refresh,
        }
    for kind in ("prefix", "dual", "delayed"):
        settings[f"parallel in blocks of 8, {kind} cache"] = {
            "block_size": 8,
            "threshold": 0.9,
            "approximation": kind,
        }

    def measured(call: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
        tokens, seconds = timed(call)
        texts = [codec.decode_literally(row, True) for row in tokens]
        right = np.mean([one.result in text for one, text in zip(asked, texts)])
        return float(right), seconds / len(prompts), tokens

    def whole(**changes: Any) -> np.ndarray:
        made = hub.generate(model, prompts, 32, **given, **changes)
        tokens, written = np.asarray(made.tokens), np.asarray(made.written)
        return np.stack([row[new][:32] for row, new in zip(tokens, written)])

    def streamed(**changes: Any) -> np.ndarray:
        made = hub.generate_stream(model, prompts, 32, batch_size=16, **given, **changes)
        return np.stack([row.tokens for row in sorted(made, key=lambda row: row.number)])

    found = {
        name: measured(lambda changes=changes: whole(**changes))
        for name, changes in settings.items()
    }
    stop = {"stop": True, "block_size": 8}
    for name, changes in {
        "stream, blocks of 8": stop,
        "stream, parallel in blocks of 8": stop | {"threshold": 0.9},
        "stream, the same, dual cache": stop | {"threshold": 0.9, "approximation": "dual"},
    }.items():
        found[name] = measured(lambda changes=changes: streamed(**changes))
    return f"small model: {len(prompts)} answers of 32 tokens", found


def timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """Its result, and the least processor seconds of some calls after the one that compiles."""
    result, seconds = call(), []
    for _ in range(_CALLS.value):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def table(found: dict[str, tuple[float, float, np.ndarray]]) -> list[str]:
    _, reference, tokens = found[REFERENCE]
    rows = [
        (
            name,
            f"{right:.3f}",
            f"{np.mean(own == tokens):.3f}",
            f"{1e3 * seconds:.1f}",
            f"{reference / seconds:.2f}",
        )
        for name, (right, seconds, own) in found.items()
    ]
    header = ("way", "right", "tokens as exact", "ms a row", "speed over exact")
    return command.markdown(header, rows)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    print(machine.describe(machine.facts()))
    for wanted, part in ((_RUN.value, lambda: of_task(_RUN.value)), (_QUESTIONS.value, of_small)):
        if wanted:
            title, found = part()
            print(f"\n{title}\n")
            print("\n".join(table(found)), flush=True)
            command.write({name: [*figures[:2]] for name, figures in found.items()})


if __name__ == "__main__":
    app.run(main)
