"""What sequential stopping saves, on multiple choice by the small pretrained model.

    python -m experiments.benchmarks.stopping [--stopping_questions=20] [--stopping_out=FILE.json]

Questions are held out, from seven lessons of ``experiments/conversations.py``; the three wrong
candidates are the answer with the results of other questions of the lesson. All replicates are
drawn once; fixed and sequential designs then read the same ones, so that they differ in what they
would have drawn alone. Then: the variance of a row's estimate by design, at equal passes.
"""

import json
import pathlib

import jax
import numpy as np
from absl import app, flags

from experiments import conversations
from mdm_jax import evaluation, hub, likelihood
from mdm_jax.likelihood import Stop
from mdm_jax.likelihood.stopping import each_row, replicate_until

LESSONS = ("sums", "one_step", "larger", "counting", "words", "whereabouts", "colours")
MODEL = pathlib.Path(__file__).parents[1] / "models" / "small"
MOST, PASSES = 96, 2
DESIGNS = {
    "independent levels and masks": ("independent", "independent"),
    "stratified levels": ("stratified", "independent"),
    "stratified levels, antithetic masks": ("stratified", "antithetic"),
    "stratified levels, complementary masks": ("stratified", "complementary"),
    "lattice, complementary masks": ("lattice", "complementary"),
    "lattice, rotated masks (default)": ("lattice", "rotated"),
    "Gauss levels, rotated masks": ("gauss", "rotated"),
    "Gauss levels, complementary masks": ("gauss", "complementary"),
}


def questions(model: hub.HubModel, count: int) -> tuple[list, np.ndarray]:
    """Rows [4 Q] of all candidates, the right one first, and the tokens scored of each."""
    codec, rows = model.tokenizer, []
    for name in LESSONS:
        asked = [conversations.exchange(name, "valid", i) for i in range(count + 20)]
        for number, one in enumerate(asked[:count]):
            later = asked[number + 1 :]
            results = dict.fromkeys(o.result for o in later if o.result != one.result)
            others = [one.answer.replace(one.result, other) for other in list(results)[:3]]
            prompt = codec.encode_chat([{"role": "user", "content": one.question}], True).ids
            for answer in (one.answer, *others):
                ids = codec.encode(f"{answer}<|im_end|>", special=True)
                tokens = np.concatenate([prompt, ids])
                rows.append((tokens, np.arange(len(tokens)) >= len(prompt)))
    return rows, np.array([eligible.sum() for _, eligible in rows])


def draws_of(model: hub.HubModel, rows: list, design: likelihood.SubsetDesign):
    estimator = likelihood.masked_estimator(model.model.apply, model.traits.mask_id, design)
    question = np.arange(len(rows)) // 4
    keys = jax.vmap(lambda q: jax.random.fold_in(jax.random.key(0), q))(question)
    return likelihood.RowDraws(
        estimator, model.params, rows, keys, batch_size=64, pad_id=model.traits.pad_id,
        lengths=(32, 48, 64, 96),
    )  # fmt: skip


def main(_argv: list[str]) -> None:
    model = hub.load(MODEL, dtype="float32")
    rows, tokens = questions(model, _QUESTIONS.value)
    every = np.arange(len(rows))
    number = every.reshape(-1, 4)
    draws = draws_of(model, rows, likelihood.counts(PASSES))
    values = draws(every, 0, MOST)
    record = {"questions": len(number), "rows": len(rows), "tokens": int(tokens.sum())}
    print(record)

    def draw(wanted: np.ndarray, first: int, count: int) -> np.ndarray:
        return values[first : first + count][:, wanted]

    correct = np.zeros(len(number), int)
    print("choice by nats: replicates of a candidate, share certain at 95 %, accuracy")
    for first in (6, 8):
        chosen = evaluation.choose_until(draw, number, correct, Stop(MOST, first))
        record[f"stopped, first {first}"] = report(chosen.replicates.mean(), chosen)
    for count in (4, 8, 12, 16, 24, 32, 48, 64, MOST):
        # The same comparisons at the same level, looked at once.
        chosen = evaluation.choose_until(draw, number, correct, Stop(count, count))
        record[f"fixed {count}"] = report(count, chosen)

    print("rows: replicates for intervals of a width, nats")
    spread = values.std(0, ddof=1)
    for width in np.quantile(spread, (0.5, 0.75, 0.9)):
        stopped = replicate_until(draw, len(rows), each_row(len(rows)), Stop(MOST, width=width))
        needed = narrow_share(draw, len(rows), width)
        reached = np.mean(stopped.high - stopped.low <= width + 1e-9)
        fixed = next((count for count, share in needed if share >= reached), None)
        record[f"width {width:.2f}"] = [stopped.replicates.mean(), reached, fixed]
        print(f"  {width:.2f}: {stopped.replicates.mean():.1f} (reached by {reached:.3f}), "
              f"fixed {fixed}")  # fmt: skip

    print("variance of a row's estimate by design, 4 passes, over that of independent ones")
    base = None
    for name, (levels, masks) in DESIGNS.items():
        other = draws_of(model, rows, likelihood.counts(4, levels, masks))(every, 0, 16)
        variances = other.var(0, ddof=1)
        pairs = (other[:, number[:, 0]] - other[:, number[:, 1]]).var(0, ddof=1)
        figures = np.array([variances.mean(), pairs.mean()])
        base = figures if base is None else base
        error = variances.std() / variances.mean() / len(rows) ** 0.5
        # Candidates of a question share their masks, so questions are what is independent.
        gap = (other.mean(0) - values.mean(0)).reshape(-1, 4).mean(1)
        off = [float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5)]
        record[name] = [*(figures / base).tolist(), float(error), *off]
        print(
            f"  {name}: {figures[0] / base[0]:.3f} (relative error {error:.3f}), of differences "
            f"{figures[1] / base[1]:.3f}; mean {off[0]:+.3f} +- {off[1]:.3f} of {values.mean():.2f}"
        )
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(record, indent=1), "utf-8")


def report(replicates: float, chosen: evaluation.Choices) -> list[float]:
    figures = [float(replicates), float(chosen.certain.mean()), chosen.accuracy]
    print("  {:.1f} replicates, {:.3f} certain, accuracy {:.3f}".format(*figures))
    return figures


def narrow_share(draw, rows: int, width: float) -> list[tuple[int, float]]:
    """Fixed numbers of replicates, and the share of rows whose interval is narrow by them."""
    found = []
    for count in range(4, MOST + 1, 4):
        result = replicate_until(draw, rows, each_row(rows), Stop(count))
        found.append((count, np.mean(result.high - result.low <= width)))
    return found


if __name__ == "__main__":
    _QUESTIONS = flags.DEFINE_integer("stopping_questions", 20, "Of each lesson.", 1)
    _OUT = flags.DEFINE_string("stopping_out", None, "JSON file of the figures.")
    app.run(main)
