"""OpenWebText: perplexity per token of GPT-2 (data/gpt2 has its files) on the last 100,000 texts.

python -m experiments.prepare openwebtext --source=FOLDER --to=data/openwebtext
mdm train --config=experiments/configs/benchmarks/openwebtext.py --workdir=runs/openwebtext

Rows of 1,024 tokens, documents wrapped, a million steps of 512 rows. The variant "block" is block
diffusion in blocks of 16; "tfds" reads the dataset that TFDS has prepared.
"""

from experiments.published import settings


def get_config(variant: str = ""):
    """``variant`` is "", "block", "tfds" or "smoke"."""
    config = settings.text(steps=1_000_000, length=1024)
    config.data.update(packing="wrapped", cache="data/cache", tokenizer="data/gpt2")
    config.evaluate.final_split = "valid"
    if variant == "tfds":
        config.data.update(source="tfds", name="openwebtext")
        config.data.splits = ("train[:-100000]", "train[-100000:]", "train[-100000:]")
        return config
    config.data.update(source="documents", path="data/openwebtext/train.jsonl")
    config.data.valid_path = config.data.test_path = "data/openwebtext/valid.jsonl"
    if variant == "block":
        config.process = "block"
        config.block.size = 16
        return config
    if variant == "smoke":
        config.data.update(length=32, cache="")
    return settings.chosen(config, "benchmarks/openwebtext", variant, "block", "tfds")
