"""Fine-tuning a masked model of others, such as an A2D conversion of Qwen3-0.6B, on GSM8K: a GPU.

python -m experiments.study --suite=a2d --workdir=runs/a2d --config.model.source=MODEL \
    --config.data.path=gsm8k_train.jsonl.xz
"""

from experiments.configs.study import settings
from mdm_jax.launch import presets

PEAKS = {"lora": 2e-4, "full": 1e-5}
"""Peak learning rates of what is trained; common ones, not tuned."""


def get_config(variant: str = "lora"):
    """Three passes over 7,000 problems; ``variant`` is "lora", "full" or "smoke"."""
    task = variant if variant in PEAKS else "full"
    config = presets.finetune_pairs()
    config.data.update(prompt_field="question", answer_field="answer", answer_marker="####")
    config.data.update(prompt_length=256, answer_length=256, answer_padding="eos_scored")
    config.data.fractions = (0.9, 0.03, 0.07)
    config.adapter.name = "lora" if task == "lora" else ""
    config.model.dtype = "bfloat16"
    config.train.update(steps=630, batch_size=32, log_every=10)
    config.optimizer.update(peak=PEAKS[task], warmup_steps=30, ema_decay=0.99)
    config.evaluate.update(batch_size=32, max_rows=256)
    config.sample.update(sampler="low_confidence_remasking", temperature=0.0, gap=0)
    config.sample.low_confidence_remasking.update(block_size=32, steps_per_block=32)
    if variant in PEAKS:
        return config
    own = config.model.to_dict()
    settings.chosen(config, "study/gsm8k", variant, *PEAKS)
    config.model.update(own)  # the source's
    return config
