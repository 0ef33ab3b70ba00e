"""LM1B: sentences of news, perplexity per token of bert-base-uncased (data/bert has its files).

python -m experiments.prepare lm1b --source=FOLDER --to=data/lm1b
mdm train --config=experiments/configs/benchmarks/lm1b.py --workdir=runs/lm1b

Rows of 128 tokens. A sentence has a row of its own, cut if longer, its padding neither attended to
nor counted (MDLM's Table 1); in the variant "wrapped" sentences follow one another (Table 3 of
BD3-LM). "tfds" is "wrapped" on the dataset that TFDS has prepared.
"""

from experiments.published import settings


def get_config(variant: str = ""):
    """``variant`` is "", "wrapped", "tfds" or "smoke"."""
    config = settings.text(steps=1_000_000, length=128)
    config.data.update(cache="data/cache", tokenizer="data/bert")
    if variant == "tfds":
        config.data.update(source="tfds", name="lm1b", packing="wrapped")
        config.data.splits = ("train", "test[:2%]", "test[2%:]")
        return config
    config.data.update(source="documents", path="data/lm1b/train.jsonl")
    config.data.update(valid_path="data/lm1b/valid.jsonl", test_path="data/lm1b/test.jsonl")
    if variant == "wrapped":
        config.data.packing = "wrapped"
        return config
    config.data.long_documents = "cut"
    if variant == "smoke":
        config.data.update(length=32, cache="")
    return settings.chosen(config, "benchmarks/lm1b", variant, "wrapped", "tfds")
