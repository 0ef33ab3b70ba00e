"""Approximate caches and streams of the families' models, against their exact decoding."""

import numpy as np
import pytest
from checkpoints import loaded, stated
from variants import slow_except

from mdm_jax import hub

PROMPTS = [[1, 2, 3, 5, 7], [3, 9], [4, 4, 4, 1]]
NAMES = ("llada-2", "dream-1", "lladamoe-1", "a2d_qwen3-1", "a2d_llama-2", "mdlm-3")


def options(name, **more):
    rule = {"dream-1": "dllm_dream", "mdlm-3": "mdlm_greedy"}.get(name, "llada")
    size = {} if name == "dream-1" else {"block_size": 4}
    ids = {f"{token}_id": stated(name).get(f"{token}_token_id") for token in ("mask", "eos", "pad")}
    return {"rule": rule, "steps": 8, "excludes_mask": True} | size | ids | more


@pytest.mark.parametrize("name", slow_except({"dream-1"}, NAMES))
def test_a_cache_that_is_always_refreshed_is_exact(name):
    model = loaded(name)
    exact = hub.generate(model, PROMPTS, 12, **options(name))
    assert len(np.unique(exact.tokens[exact.written])) > 3
    kinds = ("dual",) if name == "dream-1" else ("prefix", "dual", "delayed")
    for kind in kinds:
        cached = hub.generate(model, PROMPTS, 12, **options(name, approximation=kind, refresh=1))
        np.testing.assert_array_equal(cached.tokens, exact.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_caches_fill_everything_and_keep_prompts(name):
    model, shares = loaded(name), []
    exact = hub.generate(model, PROMPTS, 12, **options(name, threshold=0.3, steps=None))
    for kind in ("prefix", "dual", "delayed"):
        more = {"approximation": kind, "threshold": 0.3, "steps": None}
        cached = hub.generate(model, PROMPTS, 12, **options(name, **more))
        given = ~exact.written
        np.testing.assert_array_equal(cached.tokens[given], exact.tokens[given])
        shares.append(np.mean(cached.tokens[~given] == exact.tokens[~given]))
    assert min(shares) > 0.1


def tokens_of(rows):
    return {row.number: row.tokens for row in rows}


def check_stream(name, **more):
    model = loaded(name)
    given = options(name, **more)
    found = tokens_of(
        hub.generate_stream(model, PROMPTS, 12, batch_size=2, pad_multiple=6, **given)
    )
    assert sorted(found) == [0, 1, 2]
    for number, prompt in enumerate(PROMPTS):
        alone = hub.generate(model, [prompt], 12, **given)
        expected = np.asarray(alone.tokens[0])[np.asarray(alone.written[0])]
        np.testing.assert_array_equal(found[number], expected)


def test_a_stream_of_prompts_gives_each_what_it_gets_alone():
    check_stream("a2d_qwen3-1", stop=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_streams_of_all_families(name):
    check_stream(name, stop=False)
    check_stream(name, stop=False, threshold=0.3, steps=None)
    if name == "dream-1":
        check_stream(name, stop=False, rule="dream")


@pytest.mark.slow
def test_a_stream_stops_at_the_end_of_a_text():
    model, given = loaded("llada-2"), options("llada-2")
    plain = tokens_of(hub.generate_stream(model, PROMPTS, 12, stop=False, **given))
    eos = int(plain[0][6])
    stopped = tokens_of(hub.generate_stream(model, PROMPTS, 12, **given | {"eos_id": eos}))
    end = plain[0].tolist().index(eos)
    assert stopped[0][:end].tolist() == plain[0][:end].tolist()
    assert set(stopped[0][end:].tolist()) == {eos}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rule": "dllm_blocks", "block_size": 4}, "cached=True"),
        ({"rule": "mdlm"}, "schedule=ancestral"),
        ({"rule": "llada", "refresh": 3}, "refresh is read with it alone"),
        ({"rule": "llada", "approximation": "dual", "guidance": 1.0}, "no guidance"),
        ({"rule": "dllm_blocks", "approximation": "dual"}, "exact cache"),
        ({"rule": "llada", "factor": 0.5, "score": "margin"}, "factor is read with"),
    ],
)
def test_rules_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hub.generate_stream(loaded("llada-2"), PROMPTS, 8, **changes)
