"""Conversations in a real train step: what is no answer has exactly no loss and no gradient."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mdm_jax import corruption, data, models, objectives, training, variance
from mdm_jax.data.rows import example_keys
from mdm_jax.types import KeyedBatch

ROWS, LENGTH = 4, 64


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(dataset, keyed batch) of short chats, several to a row."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [
        [m for j in range(1 + i % 2) for m in (("user", f"{i}{j}"), ("assistant", "xyz"[j:]))]
        for i in range(9)
    ]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n"
            for chat in turns
        )
    )
    dataset = data.chat(
        path, LENGTH, fractions=(1, 0, 0), answer_padding="pad_hidden", packing="first_fit"
    )
    rows = np.arange(ROWS)
    batch = data.gather(dataset.train, rows)
    assert batch.documents.max() > 1 and np.any(batch.documents == 0)
    keys = example_keys(dataset.train, rows, 0 * rows, 0, LENGTH)
    return dataset, KeyedBatch(*batch, keys)


def make_step(dataset, apply_fn):
    objective = objectives.masked_nelbo(corruption.fixed_count(dataset.mask_id))
    chain, optimizer = variance.chain(variance.stratified()), optax.sgd(1.0)
    spec = objective.spec(ROWS, LENGTH)
    made = training.make_train_step(apply_fn, objective, chain, optimizer, spec, seed=0)
    return tiny.jit(made), lambda params: training.new_state(params, optimizer, chain, spec)


def test_only_masked_answers_have_a_gradient(packed):
    """The parameters are the logits of every position, so an update shows who has one."""
    dataset, batch = packed

    def apply_fn(params, inputs, logsnr, documents):
        del logsnr, documents
        return params["logits"] + 0.0 * inputs[..., None]

    step, start = make_step(dataset, apply_fn)
    logits = jnp.zeros((ROWS, LENGTH, dataset.vocab_size))
    moved = np.zeros((ROWS, LENGTH), bool)
    state = start({"logits": logits})
    for number in range(6):  # other strata each time
        after, metrics = step(state.replace(step=jnp.int32(number)), batch)
        moved |= np.any(np.asarray(after.params["logits"]) != 0, axis=-1)
        assert metrics.loss > 0
    assert not moved[~batch.eligible].any() and moved[batch.eligible].mean() > 0.8
    codec = dataset.tokenizer
    said = {*codec.encode("xyz").tolist(), codec.eos_id}  # of the assistant alone
    assert set(batch.tokens[moved].tolist()) == said
    assert (
        not moved[~np.isin(batch.tokens, [*said])].any() and not moved[batch.documents == 0].any()
    )


@pytest.mark.slow  # the model's masks have quick tests
def test_a_document_gets_no_gradient_from_others_and_no_loss_without_answers(packed):
    dataset, batch = packed
    config = models.TransformerConfig(vocab_size=dataset.vocab_size, width=8, depth=1, num_heads=1)
    model = models.Transformer(config)
    step, start = make_step(dataset, model.apply)
    shapes = nn.meta.unbox(jax.eval_shape(training.linen_init(model, LENGTH), jax.random.key(0)))
    rng = np.random.default_rng(0)
    state = start(jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes))
    alone = batch._replace(eligible=batch.eligible & (batch.documents == 1))
    other = np.where(batch.documents == 1, batch.tokens, (batch.tokens + 1) % dataset.mask_id)
    first, second = (step(state, b) for b in (alone, alone._replace(tokens=other)))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    third, _ = step(state, batch)
    assert not np.array_equal(
        third.params["params"]["embedding"], first[0].params["params"]["embedding"]
    )
    nothing, metrics = step(state, batch._replace(eligible=np.zeros_like(batch.eligible)))
    assert float(metrics.loss) == 0 == float(metrics.gradient_norm)
    jax.tree.map(np.testing.assert_array_equal, nothing.params, state.params)
