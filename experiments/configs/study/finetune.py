"""Fine-tuning the repository's small model on 2000 questions and answers, half a minute on a CPU.

mdm train --config=experiments/configs/study/finetune.py:stories --workdir=runs/stories

``:mawps`` reads word problems of others from ``data/mawps.jsonl``, which
``python -m experiments.prepare mawps`` writes.

The files of experiments/data are made by ``python -m experiments.conversations``. With
``--config.model.source=DIR`` another model learns the same.
"""

import pathlib

from experiments.configs.study import settings
from mdm_jax.launch import presets

EXPERIMENTS = pathlib.Path(__file__).parents[2]
MODEL = EXPERIMENTS / "models" / "small"
LENGTHS = {"stories": (24, 24), "sorting": (24, 24), "mawps": (96, 32)}
"""Tokens of prompt and answer; tokenizers with more ids need fewer."""


def get_config(variant: str = "stories"):
    """Word problems; ``variant`` is "stories", "sorting", "mawps" or "smoke"."""
    config = presets.finetune_pairs()
    task = variant if variant in LENGTHS else "stories"
    prompt, answer = LENGTHS[task]
    config.model.source = str(MODEL)
    config.data.path = str(EXPERIMENTS / "data" / f"{task}.jsonl.xz")
    if task == "mawps":
        config.data.path = "data/mawps.jsonl"
    config.data.update(prompt_length=prompt, answer_length=answer, answer_marker="####")
    config.data.fractions = (0.8, 0.08, 0.12)
    config.train.update(steps=240, batch_size=8)
    config.optimizer.update(peak=4e-3, warmup_steps=20, ema_decay=0.95)
    config.evaluate.update(batch_size=64, max_rows=128)
    config.sample.update(sampler="low_confidence_remasking", temperature=0.0, gap=0)
    config.sample.low_confidence_remasking.update(block_size=answer, steps_per_block=8)
    if variant in LENGTHS:
        return config
    own = config.model.to_dict()
    settings.chosen(config, "study/finetune", variant, *LENGTHS)
    config.model.update(own)  # the source's
    return config
