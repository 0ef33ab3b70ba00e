"""Families' decoding rules: counts as the originals', greedy runs equal to them token for token."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import CLOSE, DATA, loaded, logits, reference, stated
from variants import slow_except

from mdm_jax import hub, samplers
from mdm_jax.hub import decoding, likelihood, rules
from mdm_jax.hub.family import Family, Traits
from mdm_jax.models.decoders import recomputing_block_decoder
from mdm_jax.samplers.blocks import empirical_entropy
from mdm_jax.samplers.by_score import in_blocks

SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "negative_entropy"}


# ---- tokens per step --------------------------------------------------------------------------


def test_counts_are_those_of_the_originals():
    table = json.loads((DATA / "transfer_tables.json").read_text("utf-8"))["rows"]
    assert len(table) > 100
    for row in table:
        ours = rules.dllm_counts(row["n"], row["steps"])
        assert ours[ours > 0].tolist() == row["dllm"] and not ours[len(row["dllm"]) :].any()
        assert rules.llada_counts(row["n"], row["steps"]).tolist() == row["llada"]


def test_counts_of_many_numbers_at_once():
    several = rules.dllm_counts([[3, 7], [0, 5]], 4)
    assert several.tolist() == [
        [rules.dllm_counts(n, 4).tolist() for n in row] for row in ((3, 7), (0, 5))
    ]
    assert rules.llada_counts([5, 2], 3).tolist() == [[2, 2, 1], [1, 1, 0]]


def test_dream_takes_shares_of_what_is_left_and_all_in_the_last_step():
    """Times 1, .667, .334, .001: shares 1 - s/t are .333 and .499, so 16 masks go 5, 5, 6."""
    shares = rules.dream_shares(3)
    np.testing.assert_allclose(shares, [0.333, 0.4992504, 1], rtol=1e-6)
    left, taken = 16, []
    for share in shares:
        taken.append(int(np.float32(left) * share))
        left -= taken[-1]
    assert taken == [5, 5, 6]


# ---- greedy runs of the reference checkpoints ---------------------------------------------------


def as_rule(settings):
    """The name of a rule and its settings, from what reference.json says of a run."""
    function = settings["function"]
    if "MDLMSampler" in function:
        guidance = settings.get("cfg_scale", 0.0)
        return "dllm", {"block_size": settings["block_size"], "guidance": guidance}
    if "LLaDA" in function:
        return "llada", {"block_size": settings["block_length"]}
    if "BD3LMSampler" in function:
        options = {"block_size": settings["block_size"], "steps": settings["steps_per_block"]}
        return "dllm_blocks", options
    if "Dream" in function:
        name = "dllm_dream" if "dllm" in function else "dream"
        return name, {"score": SCORES[settings["alg"]]}
    options = {"block_size": settings["block_length"], "steps": settings["denoising_steps"]}
    options["score"] = "first" if settings["remasking_strategy"] == "sequential" else "confidence"
    options["threshold"] = settings.get("confidence_threshold")
    return "sdar", options | {"temperature": 0.0}


def check_run(name, run):
    arrays, facts = reference(name), stated(name)
    settings, prompts = facts["decode"][run], arrays[f"{run}_prompt"]
    kept = arrays.get(f"{run}_attention_mask", prompts >= 0).astype(bool)
    rule, options = as_rule(settings)
    if "steps" in settings:
        options["steps"] = settings["steps"]
    new = settings.get("max_new_tokens", settings.get("gen_length"))
    new = settings["max_length"] - prompts.shape[1] if new is None else new
    written = hub.generate(
        loaded(name),
        [row[keep] for row, keep in zip(prompts, kept, strict=True)],
        new,
        rule=rule,
        stop=False,
        trace=f"{run}_steps" in arrays,
        **{f"{token}_id": facts[f"{token}_token_id"] for token in ("mask", "eos", "pad")},
        **options,
    )
    np.testing.assert_array_equal(written.tokens, arrays[f"{run}_out"])
    if f"{run}_steps" in arrays:
        np.testing.assert_array_equal(written.canvases, arrays[f"{run}_steps"][1:])
    assert written.written.sum() >= new * len(prompts)


RUNS = [
    (path.parent.name, run)
    for path in sorted(DATA.glob("*/reference.json"))
    for run in json.loads(path.read_text("utf-8")).get("decode", {})
    if run.startswith(("gen", "bdgen"))
]
QUICK = {
    ("dream-2", "gen_dllm_margin"),
    ("a2d_qwen2-2", "bdgen"),
}


def test_all_families_have_runs():
    assert len(RUNS) == 63 and set(RUNS) > QUICK


@pytest.mark.parametrize(
    "name, run",
    [pytest.param(*run, marks=() if run in QUICK else pytest.mark.slow) for run in RUNS],
)
def test_greedy_runs_are_those_of_the_original(name, run):
    check_run(name, run)


# ---- options of the loops: further runs of the originals, tests/data/hub/options.json ----------

OPTIONS = json.loads((DATA / "options.json").read_text("utf-8"))
OURS = {"cfg_scale": "guidance", "cfg_keep_tokens": "guidance_keep"}
READ = {"block_size", "steps", "suppress_tokens", "begin_suppress_tokens", "entropy_bound", *OURS}
OPTION_RULES = {
    "llada-1": ("dllm", {}),
    "dream-1": ("dllm_dream", {}),
    "sdar-1": ("sdar", {"score": "negative_entropy", "threshold": None, "temperature": 0.0}),
    "bd3lm-1": ("bd3lm_greedy", {}),
}
QUICK_OPTIONS = {
    "llada-1/infill_blocks",
    "llada-1/infill_keep",
    "sdar-1/bounded_3",
    "bd3lm-1/window",
}


@pytest.mark.parametrize("run", slow_except(QUICK_OPTIONS, OPTIONS))
def test_options_give_the_tokens_of_the_original(run):
    name, settings = run.split("/")[0], OPTIONS[run]
    rule, options = OPTION_RULES[name]
    options = options | {OURS.get(k, k): v for k, v in settings.items() if k in READ}
    if "alg" in settings:
        options["score"] = SCORES[settings["alg"]]
    with np.load(DATA / "options.npz") as arrays:
        prompts, tokens = (arrays[f"{run}/{part}"] for part in ("prompt", "out"))
        steps = arrays.get(f"{run}/steps")
    rows, model, shown = [row[row >= 0] for row in prompts], loaded(name), []
    if name != "bd3lm-1":
        options |= {f"{token}_id": stated(name)[f"{token}_token_id"] for token in ("mask", "eos")}
    if "infill" in settings["function"]:
        written = hub.infill(model, rows, rule=rule, trace=True, **options)
    else:
        new, options["stop"] = settings["max_new_tokens"], False
        options["trace"] = steps is not None
        show = shown.append if "forwards" in settings else None
        written = hub.generate(model, rows, new, rule=rule, show=show, **options)
    np.testing.assert_array_equal(written.tokens, tokens)
    if steps is not None:
        np.testing.assert_array_equal(changes(written.canvases), changes(steps))
    if "forwards" in settings:
        jax.effects_barrier()
        assert len(changes(shown)) == settings["forwards"]


def changes(canvases):
    """Those that differ from the one before: steps that fill nothing are no steps of dllm."""
    canvases = np.asarray(canvases)
    return canvases[np.append(True, (canvases[1:] != canvases[:-1]).any(axis=(1, 2)))]


@pytest.mark.parametrize("name", slow_except({"mdlm-3"}, ["mdlm-1", "mdlm-2", "mdlm-3"]))
def test_mdlm_steps_by_given_uniforms(name):
    """Eight steps, then the most likely tokens; levels matter to mdlm-3 alone."""
    arrays = reference(name)
    model = loaded(name)
    mask_id, times = model.traits.mask_id, np.linspace(1, 1e-5, 9, dtype=np.float32)

    @tiny.jit
    def log_probs(tokens, time):
        sigma = jnp.full(len(tokens), -jnp.log1p(-(1 - 1e-3) * time))
        logits = model.logits(tokens, timesteps=sigma)
        return jax.nn.log_softmax(logits.at[..., mask_id].set(-1e30))

    tokens = jnp.asarray(arrays["ancestral_steps"][0])
    for i, uniforms in enumerate(arrays["ancestral_uniforms"]):
        now, then = log_probs(tokens, times[i]), times[i] - (1 - 1e-5) / 8
        tokens = rules.ancestral_step(now, tokens, mask_id, times[i], then, uniforms)
        np.testing.assert_array_equal(tokens, arrays["ancestral_steps"][i + 1])
    best = jnp.argmax(log_probs(tokens, times[-1]), axis=-1)
    tokens = jnp.where(tokens == mask_id, best, tokens)
    np.testing.assert_array_equal(tokens, arrays["ancestral_out"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdlm-1", "mdlm-2", "mdlm-3"])
def test_mdlm_greedy_run(name):
    model, arrays = loaded(name), reference(name)
    written = hub.generate(model, arrays["greedy_prompt"], 16, rule="mdlm_greedy", steps=8)
    np.testing.assert_array_equal(written.tokens, arrays["greedy_out"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bd3lm-1", "bd3lm-2", "bd3lm-3"])
def test_bd3lm_greedy_run(name):
    arrays = reference(name)
    model, length = loaded(name), arrays["greedy_out"].shape[1]
    written = hub.generate(model, [[1]], length - 1, rule="bd3lm_greedy")
    np.testing.assert_array_equal(written.tokens, arrays["greedy_out"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdlm-3", "bd3lm-1", "dream-1", "sdar-1"])
def test_draws_fill_ragged_batches_and_follow_the_key(name):
    model = loaded(name)
    options = {"rule": "dream_origin", "temperature": 1.0} if name == "dream-1" else {}

    def draw(seed):
        key = jax.random.key(seed)
        return hub.generate(model, [[1, 2, 3, 5, 7], [3]], 10, key=key, **options)

    first, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    if name in ("mdlm-3", "bd3lm-1"):
        assert (first.tokens != model.traits.mask_id).all()
    assert (first.written.sum(axis=1) >= 10).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdlm-3", "dream-1", "llada-4"])
def test_infilling_by_the_rule_of_the_family_keeps_what_is_given(name):
    model, rows = loaded(name), [[4, None, 7, None, None, 2], [None, 3, None]]
    mask = model.traits.mask_id
    rows = [[mask if token is None else token for token in row] for row in rows]
    written = hub.infill(model, rows, excludes_mask=True, temperature=1.0)
    assert (written.tokens != mask).all() and written.written.sum() == 5
    alone = hub.infill(model, rows[:1], excludes_mask=True, temperature=1.0)
    np.testing.assert_array_equal(written.tokens[0], alone.tokens[0])
    for row, tokens in zip(rows, written.tokens, strict=True):
        tokens = tokens[-len(row) :] if name == "dream-1" else tokens[: len(row)]
        assert [a for a, b in zip(tokens.tolist(), row) if b != mask] == [
            b for b in row if b != mask
        ]


def test_logits_of_a_left_padded_batch_of_dream():
    arrays = reference("dream-1")
    model = loaded("dream-1")
    given = {"positions": arrays["leftpad_position_ids"]}
    found = logits(model, arrays["leftpad_ids"], arrays["leftpad_attention_mask"], **given)
    kept = arrays["leftpad_attention_mask"] == 1
    assert not kept.all()
    expected = arrays["leftpad_logits"][kept]
    np.testing.assert_allclose(found[kept], expected, **CLOSE)


# ---- a toy: likely tokens by position ---------------------------------------------------------

MASK, EOS, VOCAB = 15, 14, 16


def toy(choose, *, confidence=lambda at: 4.0, inputs=(), **traits):
    """A model that gives token ``choose(position, width)`` the logit ``confidence(position)``."""

    def logits(module, params, traits, ids, visible, positions=None):
        at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        at = at if positions is None else positions
        seen = jnp.ones(ids.shape, int) if visible is None else visible
        best = choose(at, jnp.broadcast_to(jnp.sum(seen, -1, keepdims=True), ids.shape))
        return jax.nn.one_hot(best, VOCAB) * jnp.broadcast_to(confidence(at), best.shape)[..., None]

    family = Family("toy", (), None, None, None, logits)
    facts = Traits(vocab_size=VOCAB, **{"mask_id": MASK, "eos_id": EOS} | traits)
    params = {"params": {"none": jnp.zeros(())}}
    return hub.HubModel(pathlib.Path(), {}, None, None, facts, family, params)


def test_a_predicted_mask_stays_and_its_count_is_spent():
    """Two of four a step: position 1, the surest, predicts the mask token and is chosen twice."""
    sure = jnp.asarray([4.0, 9.0, 3.0, 2.0])
    model = toy(lambda at, _: jnp.where(at == 1, MASK, at), confidence=lambda at: sure[at])
    given = {"rule": "llada", "steps": 2, "trace": True}
    written = hub.generate(model, [[]], 4, **given)
    assert written.canvases.tolist() == [[[0, MASK, MASK, MASK]], [[0, MASK, 2, MASK]]]
    excluded = hub.generate(model, [[]], 4, excludes_mask=True, **given)
    assert excluded.tokens.tolist() == [[0, 0, 2, 3]]
    # Chosen in the next block, too, at the cost of that block's counts.
    blocks = hub.generate(model, [[]], 4, rule="llada", steps=4, block_size=2)
    assert blocks.tokens.tolist() == [[MASK] * 4]


def test_positions_count_from_the_prompt_and_padding_is_not_seen():
    """Left-padded rows, filled up to 16 too, predict as if they were alone."""
    model = toy(lambda at, width: (at + width) % 7)
    alone = [hub.generate(model, [prompt], 3, rule="dream") for prompt in ([1, 1, 1, 1], [1])]
    both = hub.generate(model, [[1, 1, 1, 1], [1]], 3, rule="dream", pad_multiple=16)
    assert both.tokens.shape == (2, 7) and both.written.sum(axis=1).tolist() == [3, 3]
    for row, one in zip(both.tokens, alone, strict=True):
        assert row[-3:].tolist() == one.tokens[0, -3:].tolist()
    right = hub.generate(model, [[1, 1, 1, 1], [1]], 3, rule="dllm", pad_multiple=16)
    assert right.tokens.tolist() == [[1, 1, 1, 1, 4, 5, 6], [1, 5, 6, 0, EOS, EOS, EOS]]


def test_shifted_logits_and_what_is_shown():
    """Predictions stand at i - 1; canvases are shown after every step, in order."""
    shown = []
    model = toy(lambda at, _: at + 1, confidence=lambda at: 6.0 - at, shift=True)
    written = hub.generate(model, [[5]], 3, rule="dllm_dream", steps=3, show=shown.append)
    jax.effects_barrier()
    assert written.tokens.tolist() == [[5, 1, 2, 3]]
    assert [row.tolist() for row in shown] == [
        [[5, 1, MASK, MASK]],
        [[5, 1, 2, MASK]],
        [[5, 1, 2, 3]],
    ]


def first_step(model, *, rows=1, **options):
    """Positions [B, n] that the first step of dllm's rule fills."""
    written = hub.generate(model, [[]] * rows, 4, rule="dllm", trace=True, **options)
    return np.nonzero(np.asarray(written.canvases[0]) != MASK)[1].reshape(rows, -1)


SINGLE = {"temperature": 1.0, "top_k": 1}


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"order_temperature": 1e-6}, 3),
        ({"score": "first"}, 0),
        ({"begin_suppress_tokens": [3]}, 2),
        # Of the distribution that is drawn from, a single token here, all are equal.
        ({"filtered": True, **SINGLE}, 0),
        pytest.param({"filtered": False, **SINGLE}, 3, marks=pytest.mark.slow),
        pytest.param({"score": "margin"}, 3, marks=pytest.mark.slow),
    ],
)
def test_orders_by_score_and_temperature(options, place):
    """Sharp order temperatures take the best, of ties any."""
    model = toy(lambda at, _: at, confidence=lambda at: 1.0 + at)
    assert first_step(model, **options).tolist() == [[place]]


@pytest.mark.slow
def test_orders_by_chance():
    order = first_step(toy(lambda at, _: at), rows=64, score="random")
    assert set(order[:, 0]) == {0, 1, 2, 3}


def sdar_steps(canvas, confidence, **settings):
    """Tokens after each step of a block under SDAR's rule, confidences [L] given."""
    rule = dataclasses.replace(hub.RULES["sdar"], block_size=4, temperature=0.0, **settings)
    sampler, _ = rules.make_sampler(rule, 1)
    probs = np.float32(confidence)[None, :, None]
    rest = (1 - probs) / (VOCAB - 1)
    table = jnp.log(np.where(np.arange(VOCAB) == 3, probs, rest))

    def model_fn(tokens, logsnr, documents):
        return jnp.broadcast_to(table, (*tokens.shape, VOCAB))

    @jax.jit
    def run(key, canvas):
        options = {"mask_id": MASK, "trace": lambda state: state.tokens}
        return samplers.sample_with_trace(key, model_fn, sampler, None, canvas, **options)[1]

    return run(jax.random.key(0), np.int32(canvas)).tolist()


def test_sdar_fills_all_above_the_threshold_if_there_are_enough():
    m, sure = MASK, [0.9, 0.2, 0.8, 0.3]
    steps = sdar_steps([[m] * 4], sure, steps=4, threshold=0.5)
    assert steps[:3] == [[[3, m, 3, m]], [[3, m, 3, 3]], [[3, 3, 3, 3]]]
    assert sdar_steps([[m] * 4], sure, steps=2, threshold=0.85)[0] == [[3, m, 3, m]]


def test_sdar_never_overwrites_given_tokens():
    """A quota of two where one mask is left; the original then writes over the prompt.

    The quota is of the block's size, so two of two masks go at once.
    """
    canvas = [[5, 6, 7, MASK], [5, MASK, MASK, MASK], [5, 6, MASK, MASK]]
    steps = sdar_steps(canvas, [0.9, 0.8, 0.7, 0.6], steps=2, threshold=None)
    first, third = [5, 6, 7, 3], [5, 6, 3, 3]
    assert steps == [[first, [5, 3, 3, MASK], third], [first, [5, 3, 3, 3], third]]


def test_blocks_stop_when_every_row_has_the_token():
    """Rows write the stop token in blocks 0 and 1; without it blocks 2 and 3 are written too."""
    wanted = jnp.asarray([[1, EOS, 3, 4, 5, 6, 7, 8], [1, 2, EOS, 4, 5, 6, 7, 8]])

    def apply_fn(params, inputs, logsnr, documents):
        return jax.nn.one_hot(wanted, VOCAB) * 9.0

    def preference(context, logits, drawn, positions):
        return jnp.zeros(drawn.shape)

    sampler = in_blocks("greedy", 2, 2, preference, samplers.temperature(0))
    decoder = recomputing_block_decoder(apply_fn, 2)
    canvas = samplers.blank_canvas(2, 8, MASK)
    rest = (jax.random.key(0), decoder, {}, sampler, None, canvas)
    run = jax.jit(lambda stop: samplers.sample_blocks(*rest, mask_id=MASK, stop_id=stop))
    assert run(EOS).tolist() == [[1, EOS, 3, 4] + [EOS] * 4, [1, 2, EOS, 4] + [EOS] * 4]
    assert run(13).tolist() == wanted.tolist()


def test_a_row_ends_where_its_last_tokens_have_little_entropy():
    """In blocks of 128 row 0, all of one token, is noticed after 384 and loses the last 256; row 1
    keeps what it wrote before a block of padding, of which 256 tokens would have 1.7 nats."""
    pattern = jnp.stack([jnp.full(512, 3), jnp.arange(512) % 8])

    def apply_fn(params, inputs, logsnr, documents):
        return jax.nn.one_hot(pattern, VOCAB) * 9.0

    rule = dataclasses.replace(hub.RULES["bd3lm_greedy"], block_size=128, steps=1)
    sampler, _ = rules.make_sampler(rule, 1)
    decoder = recomputing_block_decoder(apply_fn, 128)
    canvas = samplers.blank_canvas(2, 512, MASK).at[0, 400].set(5).at[1, 384:].set(EOS)
    options = {"mask_id": MASK, "stop_id": EOS, "stop_entropy": 2.0}  # log 8 is 2.08

    @tiny.jit
    def run(key):
        return samplers.sample_blocks(key, decoder, {}, sampler, None, canvas, **options)

    first, second = run(jax.random.key(0)).tolist()
    assert first == [3] * 128 + [EOS] * 272 + [5] + [EOS] * 111
    assert second == pattern[1, :384].tolist() + [EOS] * 128
    entropy = empirical_entropy(np.int32([[1, 1, 2, 3]]))
    np.testing.assert_allclose(entropy, [1.5 * np.log(2)], rtol=1e-6)


def test_random_counts_are_binomial():
    """4 masks in 2 steps, of which the first fills Binomial(4, 1/2): mean 2, variance 1, fourth
    central moment 5/2. Of 500 rows within 5 standard errors, sqrt(1 / 500) and sqrt(1.5 / 500).
    """
    model, options = toy(lambda at, _: at), {"rule": "dllm", "steps": 2, "random_counts": True}
    written = hub.generate(model, [[]] * 500, 4, trace=True, **options)
    first = np.sum(np.asarray(written.canvases[0]) != MASK, axis=1)
    assert abs(first.mean() - 2) < 5 * np.sqrt(1 / 500)
    assert abs(first.var() - 1) < 5 * np.sqrt(1.5 / 500)
    assert written.tokens.tolist() == [[0, 1, 2, 3]] * 500


def test_prompts_of_many_blocks_share_a_program():
    """The recorded run again, padded, and then with one block of the prompt less."""
    arrays, settings = reference("sdar-1"), stated("sdar-1")["decode"]["gen_static"]
    prompt, (rule, options) = arrays["gen_static_prompt"][0], as_rule(settings)
    options |= {"rule": rule, "stop": False, "pad_multiple": 64}
    before = decoding._decode._cache_size()
    whole, shorter = (
        hub.generate(loaded("sdar-1"), [tokens], settings["gen_length"], **options)
        for tokens in (prompt, prompt[4:])
    )
    np.testing.assert_array_equal(whole.tokens, arrays["gen_static_out"])
    assert shorter.tokens.shape[1] == whole.tokens.shape[1] - 4
    assert decoding._decode._cache_size() == before + 1


def test_layout_in_blocks():
    """Left: prompts end with a block, the last block is cut. Right: whole blocks, more tokens."""
    rule = dataclasses.replace(hub.RULES["dllm_blocks"], block_size=4)
    prompts = [np.int32([1, 2, 3, 4, 5]), np.int32([6])]
    canvas, visible, prefix, result = decoding.lay_out(prompts, 3, rule, MASK, 0)
    assert canvas.shape == (2, 12) and prefix == 8 and result == slice(0, 11)
    assert canvas[:, 7:].tolist() == [[5, MASK, MASK, MASK, 0], [6, MASK, MASK, MASK, 0]]
    assert visible.sum(axis=1).tolist() == [8, 4]
    rule = dataclasses.replace(rule, padding="right")
    canvas, visible, prefix, result = decoding.lay_out(prompts, 2, rule, MASK, 0)
    assert canvas.shape == (2, 8) and prefix == 0 and result == slice(0, 8)
    assert canvas[1].tolist() == [6, MASK, MASK, MASK, 0, 0, 0, 0]
    assert visible.sum(axis=1).tolist() == [8, 4]


def test_ancestral_levels_reveal_as_dreams_origin_does():
    """Probabilities 1 - s/t, 1 in the last step."""
    rule = dataclasses.replace(hub.RULES["dream_origin"], steps=4, block_size=4)
    _, grid = rules.make_sampler(rule, 1)
    rates = 1 / (1 + np.exp(grid))
    times = np.append(np.linspace(1, 1e-3, 5)[:4], 0)
    np.testing.assert_allclose(1 - rates[1:] / rates[:-1], 1 - times[1:] / times[:-1], rtol=1e-6)


# ---- likelihood -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_except({"llada-1"}, ("llada-1", "llada-2", "llada-3")))
def test_likelihood_by_given_masks(name):
    """The estimate of LLaDA's repository from the masks that it drew."""
    arrays, facts, model = reference(name), stated(name), loaded(name)
    tokens = np.concatenate([arrays["lik_prompt"], arrays["lik_answer"]])
    given = (arrays["lik_noised"], arrays["lik_p_mask"], facts["mask_token_id"])
    score = likelihood.masked_score(model, tokens, *given)
    np.testing.assert_allclose(score, facts["log_likelihood"]["value"], rtol=1e-5)
    numbers = (arrays["lik_noised"] == facts["mask_token_id"]).sum(1).reshape(-1, 8)
    for batch in numbers:  # from their first one on
        assert likelihood.mask_numbers(batch[0], 8, len(arrays["lik_answer"])).tolist() == [*batch]


def test_likelihood_of_a_model_that_knows_nothing():
    """``-L log K`` whatever is masked; numbers of masks are even over 1 .. L."""
    model = toy(lambda at, _: at, confidence=lambda at: 0.0)
    options = {"key": jax.random.key(0), "samples": 8, "batch_size": 4}
    value = hub.log_likelihood(model, [1, 2], [3, 4, 5], **options)
    np.testing.assert_allclose(value, -3 * np.log(VOCAB), rtol=1e-6)
    assert likelihood.mask_numbers(3, 5, 5).tolist() == [3, 4, 5, 1, 2]
    assert likelihood.mask_numbers(2, 4, 8).tolist() == [2, 4, 6, 8]
    with pytest.raises(ValueError, match="multiple of batch_size"):
        hub.log_likelihood(model, [1], [2], key=jax.random.key(0), samples=3, batch_size=2)


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "traits, prompts, options, message",
    [
        ({}, [[1]], {"rule": "lada"}, "llada"),
        ({}, [[1]], {"temperature": -1.0}, "temperature must be a number in"),
        ({}, [[1]], {"schedule": "cosine"}, "schedule"),
        ({}, [], {}, "at least one prompt"),
        ({}, [[1], [2, MASK]], {}, "prompt 1 holds the mask token 15"),
        ({"mask_id": None}, [[1]], {}, "give mask_id"),
        ({}, [[1]], {"mask_id": 16}, r"in \[0, 16\)"),
        ({"attention": "causal"}, [[1]], {}, "sample_next_tokens"),
        ({"attention": "block", "block_size": 4}, [[1]], {"rule": "dllm"}, "cached=True"),
        ({"shift": True}, [[]], {"rule": "dream"}, "BOS"),
        ({}, [[1]], {"rule": "dllm_blocks"}, "states no block_size"),
        ({}, [[1]], {"rule": "sdar", "block_size": 4, "guidance": 1.0}, "no guidance"),
        ({}, [[1]], {"rule": "dream", "block_size": 4}, "leave block_size out"),
        ({}, [[1]], {"suppress_tokens": [16]}, r"suppress_tokens must be in \[0, 16\)"),
        ({}, [[1]], {"guidance_keep": [1]}, "set guidance, or leave it"),
        ({}, [[1]], {"entropy_bound": 0.3}, "needs score='negative_entropy'"),
        ({}, [[1]], {"begin_suppress_tokens": [1], "score": "first"}, "scores of tokens alone"),
        ({}, [[1]], {"rule": "llada", "random_counts": True}, "read by the schedule 'dllm'"),
        ({}, [[1]], {"stop_entropy": 4.0}, "rule with cached=True"),
        ({}, [[1]], {"window": 4}, "cached=True, must be a multiple"),
        ({}, [[1]], {"rule": "sdar", "block_size": 4, "window": 6}, "must be a multiple of block_"),
    ],
)
def test_errors_say_what_is_allowed(traits, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        hub.generate(toy(lambda at, _: at, **traits), prompts, 8, **options)


@pytest.mark.parametrize(
    "traits, canvases, options, message",
    [
        ({}, [], {}, "at least one"),
        ({}, [[1, MASK]], {"rule": "sdar", "block_size": 4}, "the rule cached=True"),
        ({"attention": "block", "block_size": 4}, [[1, MASK]], {}, "toy has block attention"),
        ({"attention": "causal"}, [[1, MASK]], {}, "sample_next_tokens"),
        ({}, [[1, MASK]], {"rule": "llada", "block_size": 4}, "block_size counts columns"),
    ],
)
def test_errors_of_infilling_say_what_is_allowed(traits, canvases, options, message):
    with pytest.raises(ValueError, match=message):
        hub.infill(toy(lambda at, _: at, **traits), canvases, **options)


# ---- which rule is meant ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "attention", "rule", "expected"),
    [
        ("llada", "bidirectional", None, "llada"),
        ("dream", "bidirectional", None, "dream"),
        ("a2d-qwen3", "bidirectional", None, "dllm"),
        ("a2d-qwen3", "block", None, "dllm_blocks"),  # dllm's own loop knows no blocks
        ("llada", "block", None, "dllm_blocks"),
        ("sdar", "block", None, "sdar"),
        ("bd3lm", "block", None, "bd3lm"),
        ("bd3lm", "bidirectional", None, "mdlm"),
        ("a2d-qwen3", "block", "dllm", "dllm"),  # as asked
    ],
)
def test_the_rule_that_suits_a_model(family, attention, rule, expected):
    traits = hub.Traits(vocab_size=16, attention=attention)
    assert rules.find_rule(family, traits, rule) is hub.RULES[expected]
    assert rules.find_rule(family, traits, hub.RULES["sdar"]) is hub.RULES["sdar"]


def test_rules_of_models_trained_here():
    traits = hub.Traits(vocab_size=16, attention="block", block_size=4)
    assert rules.as_trained(traits, False, (3,)) == {}
    changes = rules.as_trained(traits, True, (3,), window=2)
    rule = dataclasses.replace(rules.find_rule("a2d-qwen3", traits), **changes)
    assert rule.excludes_mask and rule.suppress_tokens == (3,)
    assert (rule.block_size, rule.window) == (4, 8)
