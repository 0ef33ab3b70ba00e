"""Preferences with a known optimum, for the study of :mod:`experiments.alignment`.

Words of seven letters of a Markov chain, and pairs of them labelled by Bradley and Terry's law of a
reward. A model of such words can be enumerated, so that its law, its mean reward and its divergence
from the optimum, ``p(word) ~ p_start(word) exp(reward / beta)``, are exact.
"""

import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import alignment, corruption, data, files, objectives, testing, variance
from mdm_jax.alignment import rollout
from mdm_jax.alignment.bounds import networks
from mdm_jax.draws import DrawSpec
from mdm_jax.launch.alignment.experiment import AlignedExperiment
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.testing.enumeration import mask_bits
from mdm_jax.types import Batch, PyTree

PAIRS = {"train": 2000, "valid": 100, "test": 500}
LETTERS, MOTIF, LENGTH = "abc", "ab", 7
CHUNK = 4096
"""Rows of a forward pass."""
PROMPT = ">"


def true_reward(word: str) -> float:
    """Number of the motif."""
    return float(word.count(MOTIF))


def words(count: int, seed: int) -> list[str]:
    """Words of a Markov chain: a letter is repeated, or the next one, or any."""
    generator, made = np.random.default_rng(seed), []
    kinds = len(LETTERS)
    for _ in range(count):
        letters = [int(generator.integers(kinds))]
        while len(letters) < LENGTH:
            moves = [letters[-1], (letters[-1] + 1) % kinds, int(generator.integers(kinds))]
            letters.append(moves[generator.choice(3, p=[0.4, 0.3, 0.3])])
        made.append("".join(LETTERS[letter] for letter in letters))
    return made


def write(directory: pathlib.Path) -> None:
    """Words to train on and pairs of words, a file of each split, unless they are there."""
    if (directory / "pairs-test.jsonl").exists():
        return
    for number, (split, count) in enumerate(PAIRS.items()):
        lines = [{"prompt": PROMPT, "answer": word} for word in words(2 * count, 10 * number)]
        write_lines(directory / f"words-{split}.jsonl", lines)
        generator, pairs = np.random.default_rng(10 * number + 1), []
        both = (words(count, 10 * number + i) for i in (2, 3))
        for first, second in zip(*both):
            margin = true_reward(first) - true_reward(second)
            if first != second:
                better = generator.random() < 1 / (1 + np.exp(-margin))
                chosen, rejected = (first, second) if better else (second, first)
                pairs.append({"prompt": PROMPT, "chosen": chosen, "rejected": rejected})
        write_lines(directory / f"pairs-{split}.jsonl", pairs)


def write_lines(path: pathlib.Path, records: list[dict[str, str]]) -> None:
    files.write(files.as_path(path), "".join(json.dumps(each) + "\n" for each in records))


def paths(directory: pathlib.Path, kind: str) -> dict[str, str]:
    """Settings of the section ``data`` that read "words" or "pairs"."""
    train, valid, test = (str(directory / f"{kind}-{split}.jsonl") for split in PAIRS)
    return {"path": train, "valid_path": valid, "test_path": test}


def log_law(experiment: AlignedExperiment, params: PyTree) -> np.ndarray:
    """log p of every word and its end under ``samplers.first_hitting``, nats, [3^7] float64.

    All partly written rows are scored once; the probability of reaching one is that of all orders,
    by its last position. What is missing from 1 in total is the law of other texts.
    """
    codec, size = experiment.dataset.tokenizer, LENGTH + 1
    row = data.gather(experiment.dataset.test, np.zeros(1, int))
    canvas = rollout.prompts_to_answer(row, 1, experiment.dataset.mask_id)
    places = np.flatnonzero(canvas.eligible[0])
    if len(places) != size:
        raise ValueError(f"words of {LENGTH} letters and an end, got {len(places)} positions")
    letters, mask = codec.encode(LETTERS), experiment.dataset.mask_id
    kinds = [*[[*letters, mask]] * LENGTH, [codec.eos_id, mask]]
    states = np.array([*itertools.product(*kinds)], np.int32)
    strides = np.array([2 * 4 ** (LENGTH - 1 - i) for i in range(LENGTH)] + [1])
    log_probs = _log_probs(experiment, params, canvas, places, states)
    digits = np.array([*itertools.product(range(len(LETTERS)), repeat=LENGTH)])
    own = np.concatenate([digits, np.zeros((len(digits), 1), int)], axis=1)  # [W, 8]
    masked = np.array([len(LETTERS)] * LENGTH + [1])
    reached = {0: np.zeros(len(own))}
    for written in range(1, 2**size):
        bits = np.array([written >> i & 1 for i in range(size)], bool)
        ways = []
        for place in np.flatnonzero(bits):
            before = bits & (np.arange(size) != place)
            state = np.where(before, own, masked) @ strides
            ids = letters[own[:, place]] if place < LENGTH else np.full(len(own), codec.eos_id)
            step = log_probs[state, place, ids]
            ways.append(reached[written & ~(1 << int(place))] + step)
        choices = size - bits.sum() + 1
        reached[written] = np.logaddexp.reduce(ways) - np.log(choices)
    return reached[2**size - 1]


def _log_probs(
    experiment: AlignedExperiment,
    params: PyTree,
    canvas: Batch,
    places: np.ndarray,
    states: np.ndarray,
) -> np.ndarray:
    """log p of every token at every place of each row [N, 8], of the network that writes."""
    mask = experiment.dataset.mask_id
    apply_fn = jax.jit(lambda params, *inputs: as_logits(experiment.apply_fn(params, *inputs)))
    found, rows = [], np.repeat(np.asarray(canvas.tokens), CHUNK, axis=0)
    documents = np.repeat(np.asarray(canvas.documents), CHUNK, axis=0)
    unread = np.zeros((CHUNK, 1), np.float32)  # the level
    for first in range(0, len(states), CHUNK):
        number = np.minimum(np.arange(first, first + CHUNK), len(states) - 1)
        rows[:, places] = states[number]
        logits = np.array(apply_fn(params, rows, unread, documents), np.float64)[:, places]
        logits[..., [mask, *experiment.dataset.absent_ids]] = -np.inf
        top = logits.max(-1, keepdims=True)
        found.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return np.concatenate(found)[: len(states)]


REWARDS = np.array([true_reward("".join(w)) for w in itertools.product(LETTERS, repeat=LENGTH)])


def optimum(start: np.ndarray, beta: float) -> np.ndarray:
    """log of the law that preferences of this reward ask for, of the start's [3^7]."""
    tilted = start + REWARDS / beta
    return tilted - np.logaddexp.reduce(tilted)


def figures(law: np.ndarray, start: np.ndarray, beta: float) -> dict[str, float]:
    """Mean reward of words, share of texts that are words, and KL(optimum | model), nats."""
    best, share = optimum(start, beta), np.logaddexp.reduce(law)
    return {
        "true_reward": float(np.exp(law - share) @ REWARDS),
        "words": float(np.exp(share)),
        "divergence": float(np.exp(best) @ (best - law)),
    }


def sharing(
    experiment: AlignedExperiment, params: PyTree, pairs: int, draws: int
) -> dict[str, Any]:
    """What sharing masks of policy and reference does to a DPO score of one draw, nats squared.

    Predicted: from the variances of both networks' bounds and their covariance over all masks, by
    enumeration (section 4.2 of the specification). Measured: scores from ``draws`` draws, shared,
    or one for each network; the error is that of eight parts.
    """
    dataset, policy, mask = experiment.dataset, experiment.apply_fn, experiment.dataset.mask_id
    rows = [
        data.gather(source, np.arange(pairs)) for source in (dataset.test, dataset.rejected["test"])
    ]
    every = Batch(*(np.concatenate(fields) for fields in zip(*rows)))
    values = []  # of masks, [2, 2 N, 2^n]
    for each in (params, experiment.frozen):
        model_fn = lambda *inputs, each=each: as_logits(policy(each, *inputs))  # noqa: E731
        losses = [
            testing.mask_losses(model_fn, Batch(*(field[i] for field in every)), mask)
            for i in range(2 * pairs)
        ]
        values.append(losses)
    size = mask_bits(LENGTH + 1).sum(1)
    weight = np.where(size > 0, 1 / (LENGTH + 1) / np.bincount(size)[size], 0.0)
    scores = np.array(values) * np.where(size > 0, (LENGTH + 1) / np.maximum(size, 1), 0.0)

    def spread(each: np.ndarray) -> float:
        """Variance over masks of the score of a pair, its two answers being independent."""
        centred = each - (each @ weight)[..., None]
        return float(2 * np.mean(np.square(centred) @ weight))

    predicted = {"shared": spread(scores[0] - scores[1])}
    predicted["independent"] = spread(scores[0]) + spread(scores[1])
    chain, spec = variance.chain(), DrawSpec(2 * pairs, 1, every.tokens.shape[1:])
    bound = alignment.sequence_bound(objectives.masked_nelbo(corruption.fixed_count(mask)), chain)

    @jax.jit
    def draw(key: jax.Array) -> jax.Array:
        first, second = (bound.draw(k, chain.init(spec), spec) for k in jax.random.split(key))
        model_fn = networks(policy, params, experiment.frozen)
        one, other = (bound.values(model_fn, every, d)[:, 0] for d in (first, second))
        both = jnp.stack([one[0] - one[1], one[0] - other[1]])
        return both.reshape(2, 2, pairs)[:, 0] - both.reshape(2, 2, pairs)[:, 1]

    found = np.array([draw(key) for key in jax.random.split(jax.random.key(5), draws)], np.float64)
    parts = np.array(np.split(found, 8)).var(axis=1, ddof=1).mean(-1)  # [8, 2]
    record: dict[str, Any] = {"pairs": pairs, "draws": draws}
    for name, numbers in (("shared", parts[:, 0]), ("independent", parts[:, 1])):
        record[name] = [predicted[name], *_mean(numbers)]
    factor = predicted["independent"] / predicted["shared"]
    record["factor"] = [factor, *_mean(parts[:, 1] / parts[:, 0])]
    return record


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
