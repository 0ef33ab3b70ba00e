"""Models of others in their own layout: read, run, trained and written back.

model = hub.load("LLaDA-8B-Instruct", dtype="bfloat16")
logits = model.logits(input_ids)
written = hub.generate(model, [prompt_ids], 64, steps=32, block_size=32)
"""

from mdm_jax.hub.decoding import Generated, generate, generate_stream, infill
from mdm_jax.hub.family import Family, Traits, Unsupported
from mdm_jax.hub.likelihood import log_likelihood
from mdm_jax.hub.model import (
    HubModel,
    bidirectional,
    describe,
    load,
    of_transformer,
    outline,
    resolve,
    save,
    with_mask_row,
)
from mdm_jax.hub.peft import (
    load_adapters,
    projection_names,
    read_spec,
    save_adapters,
    with_adapters,
)
from mdm_jax.hub.rules import RULES, Rule
from mdm_jax.hub.tokenizer import MASK_TOKEN, ChatRenderer, HubTokenizer
