"""Rows of JSON lines and Parquet: which files, nested fields, templates, bad rows, mixtures."""

import json
import lzma

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.data.records import Template, field, find_files, weighted_paths
from mdm_jax.data.rows import Mixture

LENGTHS = {"prompt_length": 8, "answer_length": 6, "fractions": (1, 0, 0)}


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def pairs(first, count):
    return [{"prompt": f"{first}{i:02d}", "answer": f"{first}"} for i in range(count)]


def prompts(dataset, source=None):
    source = dataset.train if source is None else source
    rows = data.gather(source, np.arange(len(source)))
    return [dataset.tokenizer.decode(row[:8]) for row in rows.tokens]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", (["a.jsonl"], None)),
        ("a.jsonl:0.7, b.jsonl:3", (["a.jsonl", "b.jsonl"], [0.7, 3.0])),
        ("a,b", (["a", "b"], None)),
        (("a:1", "dir:2"), (["a", "dir"], [1.0, 2.0])),
        ("gs://bucket/a:1,gs://bucket/b:2", (["gs://bucket/a", "gs://bucket/b"], [1.0, 2.0])),
    ],
)
def test_paths_of_a_mixture(text, expected, monkeypatch):
    monkeypatch.setattr("mdm_jax.files.Path.exists", lambda _: False)
    assert weighted_paths(text) == expected


@pytest.mark.parametrize("text", ["a:1,b", "a:0,b:1", "a:inf", "a,,b", "a:nan"])
def test_paths_that_are_no_mixture(text):
    with pytest.raises(ValueError, match="a.jsonl:0.7,b.jsonl:0.3|weights must be positive"):
        weighted_paths(text)


def test_directories_and_globs_are_sorted_and_empty_ones_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl.xz", "notes.txt", "c:1.jsonl"):
        write(tmp_path / name, pairs(name[0], 2))
    names = [path.rpartition("/")[2] for path in find_files(str(tmp_path))]
    assert names == ["a.jsonl.xz", "b.jsonl", "c:1.jsonl"]
    assert find_files(str(tmp_path / "b*")) == [str(tmp_path / "b.jsonl")]
    assert prompts(data.jsonl(tmp_path, **LENGTHS)) == ["a00", "a01", "b00", "b01", "c00", "c01"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: the directory has no files \.jsonl"):
        find_files(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no file has such a name"):
        find_files(str(tmp_path / "*.json"))
    with pytest.raises(ValueError, match=r"note.txt: no such .*; did you mean \S*/notes.txt\?"):
        find_files(str(tmp_path / "note.txt"))


RECORD = {"meta": {"question": "q", "n": 3}, "turns": [{"text": "a"}, {"text": "b"}], "a.b": "c"}


def test_fields_by_dotted_path_and_lists_by_index():
    assert field(RECORD, "meta.question", "f:1") == "q"
    assert field(RECORD, "turns.-1.text", "f:1") == "b"
    assert field(RECORD, "a.b", "f:1") == "c"  # a key as it stands wins
    for path, message in (
        ("meta.answer", r"f:1: no field 'meta.answer'; 'meta' has \['n', 'question'\]"),
        ("turns.2.text", r"f:1: no field 'turns.2.text'; 'turns' is a list of 2"),
        ("turns.x", r"'turns' is a list of 2"),
        ("meta.question.x", r"'meta.question' is of type str"),
        ("no", r"f:1: no field 'no'; the line has \['a.b', 'meta', 'turns'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            field(RECORD, path, "f:1")


def test_templates_are_filled_and_refuse_what_they_do_not_know():
    template = Template(r"Q: {meta.question} {{{meta.n}}}\nA:", "prompt_template")
    assert template.fill(RECORD, "f:1") == "Q: q {3}\nA:"
    with pytest.raises(ValueError, match="f:2: field 'meta' must be a string, got dict"):
        Template("{meta}", "t").fill(RECORD, "f:2")
    for text in ("no field", "{}", "{a", "{a!r}", "{a:>3}"):
        with pytest.raises(ValueError, match="prompt_template=.*write it as in"):
            Template(text, "prompt_template")


def test_pairs_from_nested_fields_and_templates(tmp_path):
    rows = [{"meta": {"q": str(i)}, "a": [i, i + 0.5]} for i in range(3)]
    path = write(tmp_path / "nested.jsonl", rows)
    made = data.jsonl(path, **LENGTHS, prompt_template="Q:{meta.q}?", answer_template="{a.1}")
    assert prompts(made) == ["Q:0?", "Q:1?", "Q:2?"]
    assert made.tokenizer.decode(made.train[2].tokens[8:]) == "2.5"
    with pytest.raises(ValueError, match=r"nested.jsonl:1: field 'a.0' must be a string, got int"):
        data.jsonl(path, **LENGTHS, prompt_field="meta.q", answer_field="a.0")
    with pytest.raises(ValueError, match="both say what the prompt is"):
        data.jsonl(path, **LENGTHS, prompt_field="meta.q", prompt_template="{meta.q}")


def test_bad_rows_are_dropped_and_told_by_file_line_and_reason(tmp_path):
    bad = ["{oops", "[1]", "", {"prompt": "x"}, {"prompt": 1, "answer": "y"}, "nul", "7"]
    path = write(tmp_path / "some.jsonl", [*pairs("a", 2), *bad, *pairs("b", 1)])
    with pytest.raises(ValueError, match=r"some.jsonl:3: not JSON"):
        data.jsonl(path, **LENGTHS)
    made = data.jsonl(path, **LENGTHS, bad_rows="drop")
    assert prompts(made) == ["a00", "a01", "b00"] and made.report["bad_rows"] == 7
    for told in ("7 bad rows", "some.jsonl:3: not JSON", "some.jsonl:5: empty line",
                 "some.jsonl:6: no field 'answer'"):  # fmt: skip
        assert told in made.description
    with pytest.raises(ValueError, match=r"all 7 rows are bad, the first: .*all.jsonl:1"):
        data.jsonl(write(tmp_path / "all.jsonl", bad), **LENGTHS, bad_rows="drop")


def test_a_second_source_leaves_the_rows_and_splits_of_the_first(tmp_path):
    one, two = (write(tmp_path / f"{n}.jsonl", pairs(n, c)) for n, c in (("a", 20), ("b", 10)))
    settings = LENGTHS | {"fractions": (0.5, 0.5, 0), "tokenizer": "byte"}
    alone = data.jsonl(one, **settings)
    both = data.jsonl(f"{one}:0.7,{two}:0.3", **settings)
    assert isinstance(both.train, Mixture) and both.train.weights == (0.7, 0.3)
    assert prompts(both, both.train.parts[0]) == prompts(alone)
    assert prompts(both, both.valid)[:10] == prompts(alone, alone.valid)
    assert "a.jsonl 70.0% (10 rows)" in both.description
    other = data.jsonl(f"{one}:0.6,{two}:0.4", **settings)
    plain = data.jsonl(f"{one},{two}", **settings)
    assert plain.train.weights == (2 / 3, 1 / 3)
    assert len({d.fingerprint for d in (alone, both, other, plain)}) == 4
    held = data.jsonl(f"{one},{two}", **settings, valid_path=f"{two},{one}")
    assert prompts(held, held.valid)[0] == "b00" and len(held.train) == 30


def test_no_prompt_is_in_two_splits_of_several_sources(tmp_path):
    """The second source repeats half of the first in another order, and has some of its own."""
    first = pairs("a", 20)
    one = write(tmp_path / "a.jsonl", first)
    two = write(tmp_path / "b.jsonl", [*first[:10][::-1], *pairs("b", 10)])
    settings = LENGTHS | {"fractions": (0.5, 0.3, 0.2), "tokenizer": "byte"}
    both = data.jsonl(f"{one},{two}", **settings)
    splits = [set(prompts(both, split)) for split in (both.train, both.valid, both.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 30
    assert both.report["valid_prompts_also_in_train"] == 0
    alone = data.jsonl(one, **settings)
    assert prompts(both, both.train.parts[0]) == prompts(alone)
    held = prompts(alone, alone.valid)
    three = write(tmp_path / "c.jsonl", [row for row in first if row["prompt"] in held])
    with pytest.raises(ValueError, match=r"c.jsonl: nothing is left for training"):
        data.jsonl(f"{one},{three}", **settings)


def test_parquet_rows_are_those_of_the_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"meta": {"q": f"q{i}"}, "answer": "a"} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", rows)
    first, second = (
        data.jsonl(tmp_path / f"rows.{kind}", **LENGTHS, prompt_field="meta.q")
        for kind in ("parquet", "jsonl")
    )
    assert first.fingerprint == second.fingerprint
    with pytest.raises(ValueError, match="rows.parquet: row 1: no field 'meta.x'"):
        data.jsonl(tmp_path / "rows.parquet", **LENGTHS, prompt_field="meta.x")
    write(tmp_path / "other.parquet", rows)
    with pytest.raises(ValueError, match="other.parquet: damaged, or not a Parquet file"):
        data.jsonl(tmp_path / "other.parquet", **LENGTHS)
