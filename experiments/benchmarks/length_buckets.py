r"""Training on chats of skewed lengths: batches of one length each beside rows of the longest.

python -m experiments.benchmarks.length_buckets [--seconds=60] [--lengths=128,256]

Makes 2,000 chats whose lengths are log-normal, times the steps of both in turns, and weights those
of a length by its share of the batches.
"""

import contextlib
import json
import pathlib
import tempfile

import jax
import numpy as np
from absl import flags

from experiments.benchmarks import command
from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch.build import Experiment, make_experiment

_LENGTHS = flags.DEFINE_list("lengths", ["128", "256"], "data.buckets")
_LONGEST = flags.DEFINE_integer("longest", 512, "data.length", lower_bound=1)
_CHATS, _MEDIAN, _SPREAD = 2000, 90, 0.7


def chats(path: pathlib.Path) -> None:
    """Write chats whose tokens (bytes) number ``_MEDIAN * exp(_SPREAD * normal)`` or so."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for size in np.exp(rng.normal(np.log(_MEDIAN), _SPREAD, _CHATS)):
            words = rng.integers(97, 123, (int(size) + 1, 5)).astype(np.uint8)
            text = " ".join(word.tobytes().decode() for word in words[: max(int(size) // 6, 2)])
            half = len(text) // 2
            turns = (("user", text[:half]), ("assistant", text[half:]))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def experiment(path: pathlib.Path, buckets: tuple[int, ...]) -> Experiment:
    """The finetune preset's run on these chats, of a new network of 3.3 million parameters."""
    config = presets.get_config("finetune")
    config.data.update(path=str(path), length=_LONGEST.value, too_long="drop", tokenizer="byte")
    config.data.update(answer_padding="eos_once", buckets=buckets)
    config.model.update(width=256, depth=4, num_heads=4)
    config.train.batch_size = 8
    return make_experiment(config)


def measure(_shape: object, options: command.Options) -> dict:
    """Seconds of a step by length, both ways, and tokens that are no padding a second."""
    record: dict = {"ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        chats(path := pathlib.Path(folder) / "chats.jsonl")
        lengths = tuple(int(length) for length in _LENGTHS.value)
        ways = {
            "longest": experiment(path, ()),
            "buckets": experiment(path, lengths),
        }
        calls, steps = {}, {name: {} for name in ways}
        for name, made in ways.items():
            found = {}
            with contextlib.closing(made.train_batches()) as stream:
                while len(found) < len(made.lengths):
                    batch = next(stream)
                    found[batch.tokens.shape[1]] = batch
            weights = [sum(each) for each in made.buckets.shares] if made.buckets else [1.0]
            for length, share in zip(made.lengths, weights):
                step = training.compile_step(
                    made.step,
                    made.abstract_state(),
                    made.abstract_batch(length),
                    made.placed_seed(),
                )
                steps[name][length] = {"share": share, "memory": step.memory_bytes}
                calls[name, length] = _call(step.call, made.initial_state(), found[length])
        for key, seconds in command.interleaved(
            calls, rounds=options.rounds, seconds=options.seconds
        ).items():
            steps[key[0]][key[1]]["seconds"] = command.summary(seconds)
    padding = dict(zip(("buckets", "longest"), ways["buckets"].buckets.padding))
    visible = ways["longest"].spec.batch_size * _LONGEST.value * (1 - padding["longest"])
    for name, own in steps.items():
        seconds = sum(each["seconds"]["median"] * each["share"] for each in own.values())
        record["ways"][name] = {
            "steps": own,
            "padding": padding[name],
            "seconds": seconds,
            "tokens_per_second": visible / seconds,
        }
    return record


def _call(step, state, batch):
    kept = [state]

    def call():
        kept[0], metrics = step(kept[0], batch)
        jax.block_until_ready(metrics)

    call()
    return call


def table(record: dict) -> list[str]:
    lines = [
        "| batches | padding | step, s (share of the batches) | mean step, s | tokens/s |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for name, way in record["ways"].items():
        steps = ", ".join(
            f"{length}: {each['seconds']['median']:.3f} ({each['share']:.0%})"
            for length, each in way["steps"].items()
        )
        lines.append(
            f"| {name} | {way['padding']:.0%} | {steps} | {way['seconds']:.3f} | "
            f"{way['tokens_per_second']:,.0f} |"
        )
    return lines


PART = command.Part("length_buckets", measure, table)

if __name__ == "__main__":
    command.main(PART)
