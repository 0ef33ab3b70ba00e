"""Prompts and answers from a JSONL file, such as GSM8K.

mdm train --config=experiments/configs/study/pairs.py --workdir=runs/gsm8k \
    --config.data.path=gsm8k_train.jsonl --config.data.answer_marker="####"
"""

from experiments.configs.study import settings
from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """Fields ``question`` and ``answer``, as in GSM8K, in characters; longer pairs are dropped.

    With ``data.answer_marker`` reports have the accuracy of the results after it.
    ``variant`` is "" or "smoke", which needs a file too.
    """
    config = launch_config.get_config()
    config.data.update(source="jsonl", prompt_field="question", answer_field="answer")
    config.data.update(prompt_length=384, answer_length=384, too_long="drop")
    config.model.update(width=256, depth=6, num_heads=8)
    config.train.update(steps=10_000, batch_size=16)
    return settings.chosen(config, "study/pairs", variant)
