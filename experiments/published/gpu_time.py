"""Operations of a config's training, and the time of one GPU that they make, as an estimate.

python -m experiments.published.gpu_time

Counted are multiplications and additions of matrix products: 6 for each weight and token, forward
and backward, and 12 per token, block, position and unit of width for attention. Embeddings are
looked up, the projection to logits counts for masked tokens alone, half of them. A GPU gives a
share of its peak, 40 % for networks of width 768 and more and 10 % below; both are assumptions, of
an H100 (989 TFLOP/s, dense bfloat16).
"""

import importlib
from typing import NamedTuple

from ml_collections import ConfigDict

PEAK = 989e12
VOCABULARIES = {"text8": 31, "lm1b": 30_522, "openwebtext": 50_258}
"""Token ids; tasks have those of their characters."""


class Estimate(NamedTuple):
    """Weights of the blocks; tokens of all steps, prompts included; operations; seconds."""

    weights: int
    tokens: float
    operations: float
    seconds: float


def estimate(config: ConfigDict, length: int, vocab_size: int) -> Estimate:
    """The training of a config with rows of ``length`` tokens, one forward pass each."""
    model, train = config.model, config.train
    weights = model.depth * (4 + 2 * model.mlp_ratio) * model.width**2
    tokens = float(train.steps) * train.batch_size * length
    rows = 2 if config.process == "block" else 1  # clean tokens beside the masked ones
    attention = 12 * model.depth * length * model.width
    each = 6 * weights + attention + 6 * model.width * vocab_size / 2 / rows
    share = 0.4 if model.width >= 768 else 0.1
    operations = rows * tokens * each
    return Estimate(int(weights), tokens, operations, operations / (share * PEAK))


def rows_of(name: str, config: ConfigDict) -> tuple[int, int]:
    """Length of a row and number of token ids, without reading data."""
    if name in VOCABULARIES:
        return config.data.length, VOCABULARIES[name]
    from mdm_jax.launch import build

    config.data.source = "task"  # files have the same rows
    rows = build.dataset(config)
    return rows.length, rows.vocab_size


def main() -> None:
    names = ("text8", "lm1b", "openwebtext", "openwebtext:block", "sudoku9", "countdown4", "zebra")
    print(
        f"{'config':18} {'weights':>8} {'steps':>9} {'rows':>5} {'tokens':>8} {'FLOP':>8}  one H100"
    )
    for name in names:
        stem, _, variant = name.partition(":")
        module = importlib.import_module(f"experiments.configs.benchmarks.{stem}")
        config = module.get_config(variant)
        found = estimate(config, *rows_of(stem, config))
        hours = found.seconds / 3600
        time = f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} hours"
        train, billions = config.train, found.tokens / 1e9
        print(
            f"{name:18} {found.weights / 1e6:7.1f}M {train.steps:9,} {train.batch_size:5} "
            f"{billions:7.1f}B {found.operations:8.1e}  {time}"
        )


if __name__ == "__main__":
    main()
