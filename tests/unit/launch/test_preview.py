"""The summary of the rows and the row that are shown before training."""

import json
import types

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.launch.modes.preview import preview


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    chats = (
        [{"role": "user", "content": "q" * i}, {"role": "assistant", "content": "a\x1b" * i}]
        for i in (2, 1, 3)
    )
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def test_the_summary_counts_tokens_and_shares(chats):
    rows = data.chat(chats, 40, fractions=(1, 0, 0), answer_padding="pad_hidden").train
    found = data.summarise_rows(rows)
    sizes = [6 + i + 2 + 11 + 2 * i + 1 for i in (1, 1, 2, 3, 3)]  # 1, 2, 3 at the quantiles
    assert found.lengths == tuple(sizes) and found.answers == (3, 3, 5, 7, 7)
    assert (found.rows, found.looked_at) == (3, 3)
    batch = data.gather(rows, np.arange(3))
    assert found.eligible == pytest.approx(batch.eligible.mean())
    assert found.padding == pytest.approx((batch.documents == 0).mean())
    assert found.eligible + found.prompt + found.padding == pytest.approx(1)
    packed = data.chat(chats, 80, fractions=(1, 0, 0), answer_padding="pad_hidden",
                       packing="first_fit").train  # fmt: skip
    assert len(packed) < 3 and data.summarise_rows(packed).lengths == found.lengths


def test_a_row_is_shown_with_a_legend_or_in_colours_and_without_power(chats):
    dataset = data.chat(chats, 40, fractions=(1, 0, 0), answer_padding="pad_hidden")
    plain = preview(dataset, colour=False)
    assert "User: qq\n\nAssistant: ⟦a\\u001ba\\u001b␃⟧[14 of padding]" in plain
    assert "tokens of a text: 23 23 26 29 29" in plain and "\x1b" not in plain
    assert f"mask {dataset.tokenizer.mask_id}" in plain
    coloured = preview(dataset, colour=True)
    assert "\x1b[1;32ma\\u001ba\\u001b␃\x1b[0m" in coloured
    packed = data.chat(chats, 80, fractions=(1, 0, 0), answer_padding="pad_hidden",
                       packing="first_fit")  # fmt: skip
    assert "␃⟧\n--\nUser: q\n" in preview(packed, colour=False)
    scored = preview(data.chat(chats, 40, fractions=(1, 0, 0)), colour=False)
    assert "␃×15⟧" in scored and "0.0% padding" in scored and " 23 23 26 29 29;" in scored
    assert preview(types.SimpleNamespace(tokenizer=None, train=None)) == ""  # pictures
