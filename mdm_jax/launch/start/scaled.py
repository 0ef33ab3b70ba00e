"""Settings that follow from others, or from the data, where they are not given.

Those of the optimiser are None by default, lengths of pairs 0; every run gets numbers, which are
what its ``config.json`` holds.
"""

from __future__ import annotations  # benchmarks read rules where ml_collections is not installed

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from mdm_jax.data.datasets import PairLayout

PEAKS = {"adamw": 2e-3, "muon": 2e-2}
"""Peak of the learning rate by ``optimizer.name``."""

LENGTHS = ("prompt_length", "answer_length")
"""Settings of the section ``data`` that may be 0."""

SCALED = ("peak", "warmup_steps", "ema_decay")
"""Settings of the section ``optimizer`` that may be None."""

LATER = ("evaluate_every", "num_microbatches")
"""Settings of the section ``train`` that may stay None: their rules are followed when they are
read."""

WARMUPS, LONGEST_WARMUP, AVERAGES, VALIDATIONS = 10, 1000, 5, 10
"""Warm-ups and validations in a run; an average is over a fifth of it."""

CACHED_TOKENS, FEW_PARAMETERS = 1024, 2**22
"""Tokens whose activations fit a CPU's cache at widths of small networks; parameters of whose
gradients a pass is cheap. experiments/benchmarks/RESULTS.md, "Microbatches on a CPU"."""

RULES = {
    "peak": ", ".join(f"{name} {peak:g}" for name, peak in PEAKS.items()),
    "warmup_steps": f"train.steps / {WARMUPS}, up to {LONGEST_WARMUP}",
    "ema_decay": f"1 - {AVERAGES} / train.steps",
    "evaluate_every": f"steps / {VALIDATIONS}",
    "num_microbatches": f"1, on CPUs of about {CACHED_TOKENS} tokens",
}
"""What None stands for, in the words of the settings' listing."""


def warmup_steps(steps: int) -> int:
    """A tenth of the run, at most 1000 steps."""
    return min(steps // WARMUPS, LONGEST_WARMUP)


def ema_decay(steps: int) -> float:
    """An average over about a fifth of the run: 1 - 5 / steps, in [0.9, 0.9999]."""
    return round(min(max(1 - AVERAGES / steps, 0.9), 0.9999), 6)


def evaluate_every(config: ConfigDict) -> int:
    """Steps between validations of a run, 0 for none; by default ten in a run."""
    every, steps = config.train.evaluate_every, config.train.steps
    return max(1, steps // VALIDATIONS) if every is None else every


def parameters(width: int, depth: int, vocab_size: int = 0) -> int:
    """Of blocks of attention and an MLP of four widths, of an embedding and a head."""
    return 12 * width**2 * depth + 2 * width * vocab_size


def num_microbatches(rows: int, length: int, parameters: int, platform: str) -> int:
    """The fastest number of microbatches of a device's ``rows``, each of ``length`` tokens in all
    its views, by platform.

    On CPUs activations of ``CACHED_TOKENS`` stay in a cache and use the same memory again, which is
    worth a pass over the gradients for each microbatch below ``FEW_PARAMETERS``. Gradients are the
    same up to the order of sums.
    """
    most = rows * length // CACHED_TOKENS
    if platform != "cpu" or parameters >= FEW_PARAMETERS:
        return 1
    return max(number for number in range(1, max(most, 1) + 1) if rows % number == 0)


def followed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of :data:`SCALED` by the optimiser's name and the number of steps of a config."""
    steps = config["train"]["steps"]
    return {
        "peak": PEAKS.get(config["optimizer"]["name"]),  # None: the name is refused later
        "warmup_steps": warmup_steps(steps),
        "ema_decay": ema_decay(steps),
    }


def filled(config: ConfigDict, stored: Mapping[str, Any] | None = None) -> ConfigDict:
    """A copy of the config in which none of :data:`SCALED` is None.

    ``stored``: the config of the run that goes on. What it holds is kept, :data:`LATER` too, unless
    it follows the rules there too: then the new number of steps and optimiser count.
    """
    unset = [name for name in SCALED if config.optimizer[name] is None]
    lengths = {n: stored["data"].get(n, 0) for n in LENGTHS if not config.data[n]} if stored else {}
    later = {n: stored["train"].get(n) for n in LATER if config.train[n] is None} if stored else {}
    if not unset and not any(lengths.values()) and set(later.values()) <= {None}:
        return config
    config, values = copy.deepcopy(config), followed(config)
    config.data.update(lengths)
    config.train.update(later)
    if stored is not None:
        rules, own = followed(stored), stored["optimizer"]
        values |= {n: own[n] for n in SCALED if own.get(n) not in (None, rules[n])}
    config.optimizer.update({name: values[name] for name in unset})
    return config


def same(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the values of ``known`` where these follow the rules in both, or are unset."""
    optimizer, old_rules, rules = dict(new["optimizer"]), followed(known), followed(new)
    for name in SCALED:
        old, value = known["optimizer"][name], optimizer[name]
        if value is None or (old in (None, old_rules[name]) and value == rules[name]):
            optimizer[name] = old
    unset = {n: known["data"][n] for n in LENGTHS if not new["data"][n]}
    train = new["train"] | {n: known["train"][n] for n in LATER if new["train"][n] is None}
    variance, curve = new["variance"], "ppots_parametric"
    if not variance[curve]["parameters"]:  # earlier releases had a default
        old = known["variance"][curve]["parameters"]
        variance = variance | {curve: variance[curve] | {"parameters": old}}
    data = new["data"] | unset
    return new | {"optimizer": optimizer, "data": data, "train": train, "variance": variance}


def with_lengths(config: ConfigDict, layout: PairLayout | None) -> ConfigDict:
    """A copy with the lengths of a layout that was fitted to the pairs of a file."""
    if layout is None or config.data.source not in ("jsonl", "preferences"):
        return config
    config = copy.deepcopy(config)
    config.data.update({name: getattr(layout, name) for name in LENGTHS})
    return config


def describe(config: ConfigDict) -> str:
    """One line with the optimiser's settings of a filled config."""
    c = config.optimizer
    return (
        f"optimiser: {c.name}, learning rate {c.peak:g} after {c.warmup_steps} of "
        f"{config.train.steps} steps (optimizer.peak, warmup_steps), then a cosine to "
        f"{c.peak * c.final_fraction:g}; average of the parameters {c.ema_decay:g} a step "
        "(ema_decay)"
    )
