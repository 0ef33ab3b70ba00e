"""Models for tests of evaluation on tasks: an enumerable law, one that counts, a small network."""

import types

import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import tiny

from mdm_jax import hub, models, sharding
from mdm_jax.data.tokenizers import CharTokenizer
from mdm_jax.evaluation.model import EvaluatedModel
from mdm_jax.hub.family import Family, Traits

CODEC = CharTokenizer("abc")  # unknown 3, padding 4, EOS 5, mask 6
CONFIG = types.SimpleNamespace(dtype=np.dtype("float32"))


def _model(params, logits, **traits):
    family = Family("toy", (), None, None, None, logits)
    return hub.HubModel(None, {}, CONFIG, "module", Traits(**traits), family, params)


def joint():
    """The joint law of ``joint_law`` over texts of four characters; the mask is its 3."""
    subject = EvaluatedModel(
        _model({"law": jnp.asarray(joint_law.LAW)}, None, vocab_size=4, mask_id=3, length=4), CODEC
    )
    subject.__dict__["apply_fn"] = lambda params, inputs, _level, _documents: joint_law.apply_joint(
        params["law"], inputs
    )
    return subject


def conditional(prompt: str, answer: str) -> float:
    """log p(answer | prompt) under the joint law, four characters in all."""
    row = CODEC.encode(prompt + answer)[None]
    return -joint_law.conditional_nats(row, np.arange(4)[None] >= len(prompt))[0]


def counter(eos_at: int = 100, length: int = 64, broken: bool = False):
    """Position i holds character i modulo 3, from ``eos_at`` on EOS, whatever came before.

    ``broken``: logits of the third position are NaN.
    """

    def logits(_module, params, _traits, tokens, _visible):
        where = jnp.arange(tokens.shape[1])
        likely = jnp.where(where < eos_at, where % 3, CODEC.eos_id)
        ones = params["scale"] * jax.nn.one_hot(likely, CODEC.vocab_size)
        ones = jnp.where(broken & (where == 2)[:, None], jnp.nan, ones)
        return jnp.broadcast_to(ones, (*tokens.shape, CODEC.vocab_size))

    params = {"scale": jnp.float32(10.0)}
    traits = {"vocab_size": CODEC.vocab_size, "mask_id": CODEC.mask_id, "length": length}
    subject = EvaluatedModel(_model(params, logits, **traits), CODEC)
    subject.__dict__["apply_fn"] = None  # it scores nothing
    return subject


def network(devices: int = 1, process: str = "masked", scale: float = 1.0):
    """A transformer of one layer with random parameters, copied to the first devices."""
    attention = {"autoregressive": "causal", "block": "block"}.get(process, "bidirectional")
    traits = Traits(
        vocab_size=CODEC.vocab_size,
        mask_id=CODEC.mask_id,
        eos_id=CODEC.eos_id,
        pad_id=CODEC.pad_id,
        bos_id=CODEC.mask_id,
        attention=attention,
        block_size=4 if process == "block" else None,
        length=32,
    )
    config = models.TransformerConfig(vocab_size=CODEC.vocab_size, width=16, depth=1, num_heads=2)
    model = hub.of_transformer(config, traits, check=False)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1, 1), sharding.AXES
    )
    params = jax.tree.map(lambda leaf: scale * leaf, tiny.parameters(model.model, 8))
    made = hub.HubModel(**{**vars(model), "params": sharding.replicate(params, mesh)})
    return EvaluatedModel(made, CODEC, process=process, trained_here=True)
