"""Rewards of answers: checkers, Python functions, answers without one; their coefficients."""

import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax import distributed
from mdm_jax.alignment.advantages import ADVANTAGES, has_signal
from mdm_jax.alignment.policy import weighted_likelihood

Reward = Callable[[str, str], float]
"""``reward(prompt, answer)``: a finite number, 1 for a right answer of a checker."""


class Rewards(NamedTuple):
    """Rewards [P, G] of G answers to P prompts; weight 0 and reward 0 where there is none."""

    values: np.ndarray
    weight: np.ndarray


class RewardError(ValueError):
    """A reward function failed on an answer; the message has both."""


def score(
    reward: Reward, answers: Sequence[tuple[str, str]], group: int, *, skip: bool = False
) -> Rewards:
    """The rewards of (prompt, answer) texts, ``group`` answers a prompt.

    An exception of the function, or a reward that is no finite number, is a RewardError with prompt
    and answer; with ``skip`` it leaves that answer out of its group, to be counted.
    """
    values, weight = np.zeros(len(answers)), np.ones(len(answers))
    for number, (prompt, answer) in enumerate(answers):
        try:
            value = float(reward(prompt, answer))
            if not math.isfinite(value):
                raise ValueError(f"the reward is {value}")
        except Exception as error:  # a user's function may raise anything
            if not skip:
                raise RewardError(
                    f"the reward of the answer {answer!r} to the prompt {prompt!r} failed: "
                    f"{type(error).__name__}: {error}; mend the function, or leave such answers "
                    "out by --config.alignment.on_error=skip"
                ) from error
            value, weight[number] = 0.0, 0.0
        values[number] = value
    return Rewards(values.reshape(-1, group), weight.reshape(-1, group))


def score_together(
    reward: Reward, answers: Sequence[tuple[str, str]], group: int, *, skip: bool = False
) -> Rewards:
    """:func:`score` in process 0, for all of several: a function need not give the same in each.

    Its RewardError is raised in all of them, so that none waits for the others.
    """
    found, failure = None, None
    if distributed.is_first():
        try:
            found = [each.tolist() for each in score(reward, answers, group, skip=skip)]
        except RewardError as error:
            failure = error
    found, message = distributed.from_first([found, failure and str(failure)])
    if message is not None:
        raise failure or RewardError(message)
    return Rewards(*map(np.asarray, found))


def load_reward(place: str) -> Reward:
    """The function ``FILE.py:NAME``; ValueError if there is no such file, function or name."""
    path, _, name = place.rpartition(":")
    if not path or not pathlib.Path(path).is_file():
        raise ValueError(
            f"alignment.reward={place!r} is no function of a file, FILE.py:NAME, such as "
            "rewards.py:length; leave it empty for the checker of a task (data.source=task)"
        )
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"alignment.reward={place!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
        raise ValueError(
            f"alignment.reward={place!r}: {path} has no function {name!r}, but {known}"
        )
    return function


def coefficients(method: str, advantages: str, rewards: Rewards) -> Rewards:
    """The factor of each answer's score, and which answers count, [P, G].

    "rejection" keeps those with the best reward of a group that has a signal (right ones of a
    checker), "wd1" has softmax weights; others have advantages of this name (``ADVANTAGES``).
    """
    values, weight = jnp.asarray(rewards.values), jnp.asarray(rewards.weight)
    if method == "wd1":
        return Rewards(np.asarray(weighted_likelihood(-jnp.ones_like(values), values, weight)),
                       rewards.weight)  # fmt: skip
    if method == "rejection":
        best = np.max(np.where(rewards.weight > 0, rewards.values, -np.inf), axis=1, keepdims=True)
        live = np.asarray(has_signal(values, weight))[:, None]
        kept = (rewards.weight > 0) & (rewards.values == best) & live
        return Rewards(kept.astype(np.float64), kept.astype(np.float64))
    return Rewards(np.asarray(ADVANTAGES[advantages](values, weight)), rewards.weight)
