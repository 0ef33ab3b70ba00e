"""Settings that fit a file and a machine, each with its reason."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mdm_jax.data.statistics import length_quantiles
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.start.accelerators import multiplies_bfloat16
from mdm_jax.launch.start.look import Look
from mdm_jax.launch.start.scaled import parameters

SIZES = (
    *((48, 2), (64, 2), (96, 2), (96, 3), (128, 3), (160, 4), (192, 4), (256, 4), (256, 6)),
    *((384, 6), (512, 8), (768, 12), (1024, 16), (1024, 24)),
)
"""Width and depth of networks, from small to large."""
TOKENS_PER_PARAMETER = 4
"""Of the blocks; an aim, not tuned: about what the quickstart has. Hoffmann et al. 2022 found 20
for large autoregressive models."""
FEWEST_STEPS = 200
"""A budget of fewer steps gets the smallest network."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the run is planned for; ``memory`` in bytes, of a device or of the CPU.

    ``bfloat16``: whether it multiplies that faster than float32.
    """

    platform: str
    kind: str
    devices: int
    cores: int
    memory: int
    bfloat16: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    def describe(self) -> str:
        what = f"{self.cores} cores" if self.is_cpu else f"{self.devices} x {self.kind}"
        each = "" if self.is_cpu else " each"
        return f"{self.platform}: {what}, {self.memory / 2**30:.1f} GiB of memory{each}"


def this_machine() -> Machine:
    """Devices, cores that this process may use, memory. Starts JAX's devices."""
    device = jax.devices()[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.platform != "cpu":
        memory = (device.memory_stats() or {}).get("bytes_limit", memory)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    own = (device.platform, device.device_kind, jax.device_count(), cores or 1, memory)
    return Machine(*own, multiplies_bfloat16())


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings of a section of the config, and why."""

    section: str
    settings: Mapping[str, Any]
    why: str


def apply(choices: Sequence[Choice]) -> ConfigDict:
    """The default config with all choices."""
    config = launch_config.get_config()
    for choice in choices:
        config[choice.section].update(choice.settings)
    return config


def tokens(look: Look, has_bpe: bool, machine: Machine) -> Choice:
    """The tokenizer, by the amount of text and its alphabet."""
    size, letters = look.characters, look.alphabet
    if not has_bpe:
        name = "char" if letters <= 1000 else "byte"
        why = "the package tokenizers, which bpe needs, is not installed (extra data)"
    elif size < 100_000:
        name = "char" if letters <= 1000 else "byte"
        why = f"{size:,} characters are too few to learn words of"
    else:
        bounds = ((300_000, 1024), (10**7, 2048), (10**8, 8192))
        vocab = next((ids for most, ids in bounds if size < most), 32768)
        vocab = min(vocab, 2048) if machine.is_cpu else vocab  # logits are most of a small network
        return Choice(
            "data",
            {"tokenizer": "bpe", "bpe_vocab_size": vocab},
            f"subwords learned from the text: rows reach further, and samples have more words of "
            f"the language than by character; {vocab:,} of them for {size:,} characters",
        )
    return Choice("data", {"tokenizer": name}, f"{why}; {letters:,} different characters")


_LEARNED = "since a tokenizer is learned from the training part alone"


def lengths(look: Look, sizes: Mapping[str, np.ndarray], machine: Machine) -> list[Choice]:
    """Lengths of rows, by quantiles of the ``sizes`` in tokens of each part."""
    longest = 128 if machine.is_cpu else 1024
    if look.kind == "text":
        return [
            Choice(
                "data",
                {"length": longest},
                f"windows of the text; half of its lines have at most "
                f"{length_quantiles(sizes['line'])[0]} tokens",
            )
        ]
    if look.kind == "documents":
        return [_documents(look, sizes["document"], longest)]
    if look.kind == "chat":
        length, (why, _) = _fitting(sizes["conversation"], "conversations")
        settings = {"length": length, "loss_on": "last", "too_long": "drop"}
        return [Choice("data", settings, f"{why}; held-out ones may have more, {_LEARNED}")]
    chosen, reasons, settings = {}, [], {}
    for name in ("prompt", "answer"):
        chosen[f"{name}_length"], (reason, more) = _fitting(sizes[name], f"{name}s")
        reasons.append(reason)
        settings |= more
    if not settings:
        reasons.append(f"0: those of the longest, which may be longer, {_LEARNED}")
        return [Choice("data", dict.fromkeys(chosen, 0), "; ".join(reasons))]
    misfits = (sizes["prompt"] > chosen["prompt_length"]) | (
        sizes["answer"] > chosen["answer_length"]
    )
    if misfits.any():
        reasons.append(f"{int(misfits.sum()):,} of {len(misfits):,} pairs are dropped, and counted")
    return [Choice("data", chosen | settings, "; ".join(reasons))]


def _documents(look: Look, sizes: np.ndarray, longest: int) -> Choice:
    most = length_quantiles(sizes)[1]
    length = min(longest, max(32, 8 * math.ceil(most / 8)))
    split = int((sizes > length).sum())
    why = f"90 % of the documents have at most {most:,} tokens"
    settings: dict[str, Any] = {"length": length}
    if split:
        why += f"; {split:,} of {len(sizes):,} are longer than a row of {length} and are split"
    if np.median(sizes) < length / 2 and look.count > 100:
        settings["packing"] = "first_fit"
        why += "; most are shorter than half a row, so several share one"
    return Choice("data", settings, why)


def _fitting(sizes: np.ndarray, what: str) -> tuple[int, tuple[str, dict[str, Any]]]:
    """A length for all, or for 99 % where the rest is much longer; why, and ``too_long``."""
    _, _, most, longest = length_quantiles(sizes)
    if longest <= 1.25 * most:
        return max(1, longest), (f"the longest of the {what} has {longest:,} tokens", {})
    left = int((sizes > most).sum())
    return most, (
        f"99 % of the {what} have at most {most:,} tokens; {left:,} are longer, up to {longest:,}",
        {"too_long": "drop"},
    )


def splits(look: Look) -> list[Choice]:
    """Fractions for validation and test where the usual 5 % of the items would be none."""
    if look.kind == "text":
        return []
    if look.distinct < 3:
        raise ValueError(
            f"{look.path}: {look.distinct} different {look.items} cannot be split into train, "
            "valid and test; give more, or one long text to mdm new text"
        )
    if look.distinct >= 30:
        return []
    share = round(1 / look.distinct, 4)
    fractions = (round(1 - 2 * share, 4), share, share)
    why = f"one of {look.distinct} {look.items} each for validation and test"
    return [Choice("data", {"fractions": fractions}, why)]


def batch(machine: Machine) -> Choice:
    """Rows of a batch."""
    if machine.is_cpu:
        return Choice("train", {"batch_size": 16}, "on a CPU more steps are worth more than rows")
    rows = 64 * machine.devices
    return Choice("train", {"batch_size": rows}, f"64 rows a device, of {machine.devices}")


def network(size: tuple[int, int], machine: Machine, why: str) -> Choice:
    """Width, depth, heads, and what products are computed in."""
    width, depth = size
    settings: dict[str, Any] = {"width": width, "depth": depth}
    settings["num_heads"] = width // 64 if width >= 512 else max(1, width // 32)
    if machine.bfloat16:
        settings["dtype"] = "bfloat16"
        why += "; products in bfloat16, for which this machine has units"
    return Choice("model", settings, why)


def operations(size: tuple[int, int], length: int, vocab: int) -> float:
    """Relative cost of a token in training: blocks, attention, logits of half of the tokens."""
    width, depth = size
    return parameters(*size) + 2 * depth * length * width + width * vocab / 2


def fitting_size(
    seconds: float, seconds_per_step: float, measured: tuple[int, int], row: tuple[int, int, int]
) -> tuple[tuple[int, int], int]:
    """The size for a budget, and how many steps it is expected to make.

    ``measured``: the size whose step took ``seconds_per_step``; ``row``: batch, length,
    vocabulary. The size whose tokens in the budget are nearest to :data:`TOKENS_PER_PARAMETER`
    times its parameters.
    """
    rows, length, vocab = row
    expected = {}
    for each in SIZES:
        ratio = operations(each, length, vocab) / operations(measured, length, vocab)
        expected[each] = int(seconds / (seconds_per_step * ratio))
    enough = {each: steps for each, steps in expected.items() if steps >= FEWEST_STEPS}
    if not enough:
        return SIZES[0], expected[SIZES[0]]

    def distance(each: tuple[int, int]) -> float:
        per_parameter = enough[each] * rows * length / parameters(*each)
        return abs(math.log(per_parameter / TOKENS_PER_PARAMETER))

    best = min(enough, key=distance)
    return best, enough[best]


def schedule(steps: int, batch_size: int, max_rows: int) -> list[Choice]:
    """Validation, checkpoints and the log, by the number of steps."""
    every = max(1, steps // 4)
    return [
        Choice(
            "train",
            {"checkpoint_every": every, "log_every": max(1, min(steps // 50, 100))},
            "four checkpoints in the run (two are kept), at least fifty lines of metrics",
        ),
        Choice(
            "evaluate",
            {"max_rows": max_rows},
            f"held-out rows of a validation, so that ten of them take about a tenth of the time of "
            f"{steps:,} steps of {batch_size} rows; 0 for all",
        ),
    ]


def sampling(look: Look, length: int) -> Choice:
    """How the model is sampled from."""
    if look.kind in ("text", "documents"):
        gap = min(24, length // 4)
        return Choice(
            "sample",
            {"temperature": 0.8, "gap": gap},
            f"a temperature below 1 writes more words of the language; gap: {gap} tokens of a "
            "held-out passage are filled in",
        )
    settings = {"sampler": "by_confidence", "temperature": 0.0, "gap": 0, "num_answers": 64}
    return Choice("sample", settings, "answers of the likeliest tokens, the surest place first")
