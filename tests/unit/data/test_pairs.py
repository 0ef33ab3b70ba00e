"""Prompt and answer pairs: layout, padding policies, splits, and errors that name the line."""

import json

import numpy as np
import pytest

from mdm_jax import data

LENGTHS = {"prompt_length": 6, "answer_length": 5}
PAIRS = [(f"p{i:02d}", f"a{i % 7}") for i in range(40)]


@pytest.fixture
def write(tmp_path):
    def write(pairs, name="pairs.jsonl", tail="\n"):
        path = tmp_path / name
        if not isinstance(pairs, bytes):
            lines = [json.dumps({"prompt": p, "answer": a}) for p, a in pairs]
            pairs = ("\n".join(lines) + tail).encode()
        path.write_bytes(pairs)
        return path

    return write


def only_train(path, **settings):
    return data.jsonl(path, **{**LENGTHS, "fractions": (1, 0, 0), **settings})


def test_layout_prompt_is_right_aligned_and_never_eligible(write):
    dataset = only_train(write([("ab=", "xy")]))
    row, codec = dataset.train[0], dataset.tokenizer
    pad, eos = codec.pad_id, codec.eos_id
    prompt, answer = codec.encode("ab=").tolist(), codec.encode("xy").tolist()
    assert row.tokens.tolist() == [pad] * 3 + prompt + answer + [eos] * 3
    assert row.eligible.tolist() == [False] * 6 + [True] * 5
    assert row.documents.tolist() == [0] * 3 + [1] * 8
    assert row.units == 2
    assert [a.dtype for a in row] == [np.int32, bool, np.int32, np.int32]
    assert dataset.length == 11


def test_layout_pad_hidden_scores_one_eos_and_hides_the_rest(write):
    dataset = only_train(write([("ab=", "xy")]), answer_padding="pad_hidden")
    row, codec = dataset.train[0], dataset.tokenizer
    answer = codec.encode("xy").tolist()
    assert row.tokens[6:].tolist() == [*answer, codec.eos_id, codec.pad_id, codec.pad_id]
    assert row.eligible.tolist() == [False] * 6 + [True] * 3 + [False] * 2
    assert row.documents.tolist() == [0] * 3 + [1] * 6 + [0] * 2


def test_default_layout_gives_nothing_away_about_the_length_of_the_answer(write):
    dataset = only_train(write([("q", ""), ("q", "abcd"), ("q", "ab")]))
    batch = data.gather(dataset.train, [0, 1, 2])
    for field in (batch.eligible, batch.documents):
        assert (field == field[0]).all()
    assert batch.units.tolist() == [0, 4, 2]


def test_full_rows_have_no_padding(write):
    row = only_train(write([("abcdef", "wxyz")])).train[0]
    assert row.documents.all() and row.eligible.sum() == 5


def test_markup_of_training_prompts_is_eligible_too(write):
    """Wherever its ids stand in prompts; held-out rows, other tokens and padding stay."""
    pairs = [(f"<|>{c}|", f"a|{c}") for c in "bcdefghijk"]
    settings = {"structural_prompt_tokens": ("<|>", "|"), "fractions": (0.5, 0.5, 0)}
    plain = only_train(write(pairs), fractions=(0.5, 0.5, 0))
    widened = only_train(write(pairs), **settings)
    index = range(len(plain.train))
    before, after = (data.gather(each.train, index) for each in (plain, widened))
    expected = before.eligible.copy()
    expected[:, [1, 2, 3, 5]] = True  # padding, "<|>", a letter, "|"
    np.testing.assert_array_equal(after.eligible, expected)
    np.testing.assert_array_equal(after.units, before.units + 4)
    held = [data.gather(each.valid, range(len(each.valid))) for each in (plain, widened)]
    np.testing.assert_array_equal(held[0].eligible, held[1].eligible)
    assert widened.report["train_structural_prompt_tokens"] == 4 * len(plain.train)
    assert widened.fingerprint != plain.fingerprint
    for bad, message in (
        ({"structural_prompt_tokens": ("zz",)}, "'zz' is no text of this tokenizer"),
        ({"structural_prompt_tokens": ("a",)}, "occur in no training prompt"),
        ({"random_cut": 0.5}, "and random_cut ends rows"),
    ):
        with pytest.raises(ValueError, match=message):
            only_train(write(pairs), **settings | bad)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_units_are_characters_of_the_answer(write, kind):
    pairs = [("é", "字"), ("ab", "éé")]
    settings = {"tokenizer": kind, "answer_length": 12, "bpe_vocab_size": 259}
    batch = data.gather(only_train(write(pairs), **settings).train, [0, 1])
    assert batch.units.tolist() == [1, 2]


def test_too_long_is_an_error_that_names_line_lengths_and_policies(write):
    path = write([("ab", "cd"), ("abcdefg", "cd")])
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: too long, the prompt has 7 tokens") as e:
        only_train(path)
    assert "'truncate'" in str(e.value) and "prompt_length 6" in str(e.value)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: .*its EOS 6 \(answer_length 5\)"):
        only_train(write([("ab", "abcde")]))


def test_one_message_has_quantiles_of_all_pairs_and_the_settings_to_use(write):
    """90 pairs of 2 and 3 tokens, 9 of 4 and 3, one of 9 and 6; the EOS counted."""
    pairs = [("ab", "cd")] * 90 + [("abcd", "cd")] * 9 + [("abcdefghi", "abcde")]
    with pytest.raises(ValueError, match=r"pairs.jsonl:91: .*first of 10 of 100 pairs") as error:
        only_train(write(pairs), prompt_length=3, answer_length=5)
    lines = str(error.value).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["tokens", "50", "%", "90", "%", "99", "%", "100", "%"],
        ["prompt", "2", "2", "4", "9"],
        ["answer", "with", "EOS", "3", "3", "3", "6"],
    ]
    assert "'drop' leaves out 10 pairs; 'truncate' cuts 10 prompts and 1 answers" in lines[4]
    assert "For all pairs set data.prompt_length=9 and data.answer_length=6" in lines[4]
    assert (
        "without the longest 1: data.prompt_length=4, data.answer_length=3, data.too_long=drop"
        in lines[4]
    )


def test_unset_lengths_are_those_of_the_longest_or_of_99_percent_where_pairs_are_dropped(write):
    path = write([("ab", "cd")] * 90 + [("abcd", "cd")] * 9 + [("abcdefghi", "abcde")])
    unset = {"prompt_length": 0, "answer_length": 0}
    whole = only_train(path, **unset)
    assert (whole.layout.prompt_length, whole.layout.answer_length) == (9, 6)
    assert "(the longest of all pairs, where not set)" in whole.description
    most = only_train(path, **unset, too_long="drop")
    assert (most.layout.prompt_length, most.layout.answer_length) == (4, 3)
    assert most.report["train_dropped_pairs"] == 1 and len(most.train) == 99
    assert "(99 % of all pairs, where not set)" in most.description
    half = only_train(path, prompt_length=12, answer_length=0)
    assert (half.layout.prompt_length, half.layout.answer_length) == (12, 6)


def test_truncate_keeps_what_is_next_to_the_answer_and_is_counted(write):
    dataset = only_train(write([("12345678", "vwxyz"), ("1", "v")]), too_long="truncate")
    row, codec = dataset.train[0], dataset.tokenizer
    assert codec.decode(row.tokens[:6]) == "345678"
    assert codec.decode(row.tokens[6:]) == "vwxyz"
    assert codec.eos_id not in row.tokens
    assert row.units == 5
    assert dataset.report["train_truncated_prompts"] == 1
    assert dataset.report["train_truncated_answers"] == 1
    assert dataset.report["train_dropped_pairs"] == 0
    assert "train truncated prompts 1" in dataset.description


def test_drop_is_counted(write):
    dataset = only_train(write([("12345678", "v"), ("1", "v"), ("1", "vwxyz")]), too_long="drop")
    assert len(dataset.train) == 1
    assert dataset.report["train_dropped_pairs"] == 2
    assert dataset.report["train_pairs"] == 3 and dataset.report["train_rows"] == 1
    for told in ("train dropped pairs 2", "WARNING: 2 of 3 training pairs are longer"):
        assert told in dataset.description
    fault = "every pair of the train split was dropped as too long; the shortest of 1 .* 8 and 2 t"
    with pytest.raises(ValueError, match=fault):
        only_train(write([("12345678", "v")]), too_long="drop")


def test_answers_that_are_all_empty_are_refused(write):
    empty = [("ab", ""), ("c", "")]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: .*the train split was empty; .*answer"):
        only_train(write(empty))
    valid = write(empty, "valid.jsonl")
    with pytest.raises(ValueError, match=r"valid\.jsonl:1: .*the valid split was empty"):
        data.jsonl(write(PAIRS), **LENGTHS, valid_path=valid)
    with pytest.raises(ValueError, match="the train split was empty"):  # what is left is
        only_train(write([*empty, ("ab", "too long")]), too_long="drop")
    assert len(only_train(write([*empty, ("ab", "x")])).train) == 3


def test_marks_and_unknown_characters_are_told(write):
    path = write(PAIRS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    valid = write([("p00", "a1"), ("pé0", "?"), ("p\x1b", "a1")], "valid.jsonl")
    dataset = data.jsonl(path, **LENGTHS, valid_path=valid)
    assert dataset.report["byte_order_marks"] == 1
    assert f"{valid}:2 has 'é' (1); {valid}:2 has '?' (1); {valid}:3" in dataset.description
    assert "'\\x1b' (1)" in dataset.description and "\x1b" not in dataset.description


def prompts_of(source, codec):
    return [codec.decode(source[i].tokens[:6]) for i in range(len(source))]


def test_split_is_by_distinct_prompt_and_covers_everything(write):
    pairs = PAIRS + [(p, "b") for p, _ in PAIRS[:20]]
    settings = {**LENGTHS, "fractions": (0.5, 0.25, 0.25), "tokenizer": "byte"}
    dataset = data.jsonl(write(pairs), **settings)
    found = {
        name: prompts_of(getattr(dataset, name), dataset.tokenizer)
        for name in ("train", "valid", "test")
    }
    assert [len(set(found[name])) for name in found] == [20, 10, 10]
    assert sorted(sum(found.values(), [])) == sorted(p for p, _ in pairs)
    assert not set(found["train"]) & set(found["valid"]) | set(found["train"]) & set(found["test"])
    again = data.jsonl(write(pairs, "copy.jsonl"), **settings)
    assert again.fingerprint == dataset.fingerprint
    other = data.jsonl(write(pairs), **settings, split_seed=1)
    assert prompts_of(other.train, other.tokenizer) != found["train"]
    assert other.fingerprint != dataset.fingerprint
    assert found["train"] != sorted(p for p, _ in pairs)[: len(found["train"])]  # shuffled


def test_separate_files_are_kept_apart_and_overlap_is_counted(write):
    valid = write(PAIRS[:3] + [("new?", "a1")], "valid.jsonl")
    dataset = data.jsonl(write(PAIRS), **LENGTHS, valid_path=valid)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (40, 4, 0)
    assert dataset.report["valid_prompts_also_in_train"] == 3
    # the vocabulary is that of train: "n", "e", "w" and "?" are unknown
    assert dataset.report["valid_unknown_characters"] == 4
    test = write([("p99", "a")], "test.jsonl")
    both = data.jsonl(write(PAIRS), **LENGTHS, valid_path=valid, test_path=test)
    assert len(both.test) == 1 and both.fingerprint != dataset.fingerprint
    with pytest.raises(ValueError, match="test_path needs valid_path"):
        data.jsonl(write(PAIRS), **LENGTHS, test_path=test)


def test_other_field_names_and_empty_lines_at_the_end(write):
    path = write(b'{"q": "1", "a": "2", "more": [1]}\r\n{"q": "\\u2028", "a": "2"}\n\n  \n\n')
    dataset = only_train(path, prompt_field="q", answer_field="a")
    assert len(dataset.train) == 2
    assert dataset.tokenizer.decode(dataset.train[1].tokens[:6]) == "\u2028"


def test_raw_unicode_line_separators_inside_strings_do_not_end_a_line(write):
    dataset = only_train(write('{"prompt": "a\u2028b\x85", "answer": "c"}\n'.encode()))
    assert dataset.tokenizer.decode(dataset.train[0].tokens[:6]) == "a\u2028b\x85"


GOOD = b'{"prompt": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl: the file is empty"),
        (b"\n\n", r"bad\.jsonl: the file is empty"),
        (GOOD + b"{oops}\n", r"bad\.jsonl:2: not JSON, .* at column 2"),
        (GOOD + b"\n" + GOOD, r"bad\.jsonl:2: empty line"),
        (b"[\n" + GOOD, r"bad\.jsonl:1: not JSON, .* one object a line by: jq"),
        (b"[" + GOOD.strip() + b"]", r"bad\.jsonl:1: expected .*got list; a JSON array .* jq"),
        (GOOD + b"[1, 2]\n", r"bad\.jsonl:2: expected a JSON object .*got list"),
        (GOOD + b'{"prompt": "a"}', r"bad\.jsonl:2: no field 'answer'; the line .*; mend the row"),
        (
            b'{"prompt": 3, "answer": "b"}',
            r"bad\.jsonl:1: field 'prompt' must be a string, got int; say .* by prompt_field",
        ),
        (b'{"prompt": "a", "answer": null}', r"bad\.jsonl:1: field 'answer' .*NoneType"),
        (b'{"prompt": "a", "answer": "\\ud800"}', r"bad\.jsonl:1: field 'answer': .*surrogate"),
        (GOOD + b'{"prompt": "\xff"}', r"bad\.jsonl:2: not UTF-8, byte 0xff at offset 43"),
        (b"[" * 200_000, r"bad\.jsonl:1: not usable, .*nested"),
        (b'{"n": ' + b"1" * 5000 + b"}", r"bad\.jsonl:1: not usable, .*digits"),
    ],
)
def test_malformed_files_name_file_and_line(write, content, message):
    with pytest.raises(ValueError, match=message):
        only_train(write(content, "bad.jsonl"))


def test_bad_line_in_the_validation_file_names_that_file(write):
    valid = write(GOOD + b"{}\n", "valid.jsonl")
    with pytest.raises(ValueError, match=r"valid\.jsonl:2: no field 'prompt'"):
        data.jsonl(write(PAIRS), **LENGTHS, valid_path=valid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"too_long": "ignore"}, "too_long: unknown name 'ignore'; known: drop, error, truncate"),
        (
            {"answer_padding": "none"},
            "known: eos_once, eos_scored, pad_hidden",
        ),
        (
            {"fractions": (0.98, 0.01, 0.01)},
            r"too small, the test split .* distinct prompts in \d+ rows",
        ),
    ],
)
def test_bad_settings_are_refused(write, settings, message):
    with pytest.raises(ValueError, match=message):
        data.jsonl(write(PAIRS), **{**LENGTHS, **settings})


def test_fingerprint_depends_on_every_setting(write):
    path = write(PAIRS)
    changes = [
        {},
        {"prompt_length": 7},
        {"answer_length": 6},
        {"answer_padding": "pad_hidden"},
        {"too_long": "drop"},
        {"tokenizer": "byte"},
    ]
    assert len({only_train(path, **change).fingerprint for change in changes}) == len(changes)


# --- answers whose result stands after a marker

MARKED = [
    ("two and one", "2+1=<<2+1=3>>3#### 3"),
    ("half of 2,500", "it is\n#### 1,250"),
    ("q", "#### b"),
]
LONG = {"prompt_length": 6, "answer_length": 24, "answer_marker": "####"}


def held_out(write, marked=MARKED, **settings):
    """All of them as the validation split too; prompts are cut to six characters."""
    path = write(marked)
    return data.jsonl(path, **{**LONG, "too_long": "truncate", **settings}, valid_path=path)


def test_every_reference_is_right_under_the_prompt_that_its_row_shows(write):
    dataset = held_out(write)
    codec = dataset.tokenizer
    for (_, answer), row in zip(MARKED, data.gather(dataset.valid, range(3)).tokens):
        prompt = codec.decode(row[:6][row[:6] != codec.pad_id])
        assert len(prompt) <= 6 and dataset.check(prompt, answer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("#### 1250", True),
        ("so $1,250\n#### $1,250.00", True),
        ("####1250.", True),
        ("#### 3 #### 1250", True),
        ("1250", False),
        ("#### 1251", False),
        ("#### -1250", False),
        ("#### 12500", False),
        ("#### 1250 clips", False),
        ("####", False),
    ],
)
def test_numbers_are_compared_as_numbers(write, answer, right):
    assert held_out(write).check(" 2,500", answer) is right


def test_results_that_are_no_numbers_and_prompts_with_several(write):
    dataset = held_out(write, [*MARKED, ("q", "#### c"), ("r", "#### nan")])
    assert all(dataset.check("q", f"####{one}") for one in [" b", "c"])
    assert not dataset.check("q", "#### 3") and dataset.check("r", "#### nan")
    with pytest.raises(ValueError, match="no reference answer to the prompt 'unknown'"):
        dataset.check("unknown", "#### 3")


def test_without_a_marker_nobody_knows_and_an_answer_without_it_names_its_line(write):
    assert held_out(write, answer_marker="").check is None
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: the answer has no '####'"):
        held_out(write, [MARKED[0], ("q", "3")])
