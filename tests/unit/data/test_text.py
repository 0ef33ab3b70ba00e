"""Plain text: windows that cover every split, counts, and errors that name the file."""

import gzip
import lzma
import sys
import unicodedata

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.data.text import EMBEDDED, read_text

TEXT = "".join(chr(ord("a") + i * i % 23) for i in range(1000))


@pytest.fixture
def write(tmp_path):
    def write(content, name="corpus.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def all_rows(source):
    return data.gather(source, range(len(source)))


def test_splits_are_contiguous_and_covered_exactly_once(write):
    dataset = data.text(write(TEXT), 16, fractions=(0.8, 0.1, 0.1))
    parts = {"valid": TEXT[800:900], "test": TEXT[900:]}
    for name, part in parts.items():
        batch = all_rows(getattr(dataset, name))
        kept = batch.tokens[batch.eligible]
        assert dataset.tokenizer.decode(kept) == part
        assert batch.units.sum() == len(part) == batch.eligible.sum()
        assert batch.tokens.shape == (7, 16)
        assert dataset.report[f"{name}_padded_positions"] == 7 * 16 - 100
    train = all_rows(dataset.train)
    assert len(dataset.train) == 800 - 16 + 1
    assert dataset.tokenizer.decode(train.tokens[:, 0]) == TEXT[: 800 - 15]
    assert dataset.tokenizer.decode(train.tokens[-1]) == TEXT[784:800]
    assert train.eligible.all()


def test_last_window_is_padded_and_padding_is_out_of_sight(write):
    dataset = data.text(write(TEXT), 30, fractions=(0.8, 0.1, 0.1))
    row = dataset.test[3]
    assert row.tokens.shape == row.eligible.shape == row.documents.shape == (30,)
    assert row.eligible.tolist() == [True] * 10 + [False] * 20
    assert row.documents.tolist() == [1] * 10 + [0] * 20
    assert (row.tokens[10:] == dataset.tokenizer.pad_id).all()
    assert row.units == 10
    assert [a.dtype for a in row] == [np.int32, bool, np.int32, np.int32]
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        dataset.test[4]
    with pytest.raises(IndexError):
        dataset.test[-1]


def test_rows_at_once_are_the_single_rows(write):
    dataset = data.text(write(TEXT), 30)
    indices = [3, 0, 17]
    for many, one in zip(
        dataset.train.rows(np.array(indices)), zip(*map(dataset.train.__getitem__, indices))
    ):
        np.testing.assert_array_equal(many, np.stack(one))


@pytest.mark.parametrize(
    ("stride", "rows", "left"), [(1, 881, 0), (7, 126, 5), (20, 45, 0), (50, 18, 540)]
)
def test_train_stride_and_its_uncovered_tokens(write, stride, rows, left):
    dataset = data.text(write(TEXT), 20, train_stride=stride)
    assert len(dataset.train) == rows
    covered = np.zeros(900, bool)
    for i in range(rows):
        covered[i * stride : i * stride + 20] = True
        assert (
            dataset.tokenizer.decode(dataset.train[i].tokens) == TEXT[i * stride : i * stride + 20]
        )
    assert dataset.report["train_tokens_in_no_row"] == (~covered).sum() == left


def test_vocabulary_is_that_of_the_train_split_and_unknowns_are_counted(write):
    dataset = data.text(write("ab" * 45 + "cacbc" + "ddddd"), 5, fractions=(0.9, 0.05, 0.05))
    assert dataset.vocab_size == 2 + 1 + 3
    assert dataset.report["valid_unknown_characters"] == 3
    assert dataset.report["test_unknown_characters"] == 5
    assert dataset.report["train_unknown_characters"] == 0
    assert "valid unknown characters 3" in dataset.description


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_units_count_characters_of_the_text(write, kind):
    content = "naïve café 字 12 \U0001f600\r\n" * 60
    dataset = data.text(write(content), 10, tokenizer=kind, bpe_vocab_size=280)
    total = sum(all_rows(getattr(dataset, name)).units.sum() for name in ("valid", "test"))
    first = dataset.report["train_characters"]
    assert total == len(content) - first
    assert dataset.tokenizer.kind == kind and dataset.mask_id == dataset.vocab_size - 1
    assert all_rows(dataset.train).tokens.max() < dataset.tokenizer.pad_id
    assert dataset.unit == "character" and dataset.event_shape is None


def test_bpe_is_trained_on_the_train_split_only(write):
    train, rest = "abcd efgh " * 90, "zzzz qqqq " * 10
    with_rest = data.text(write(train + rest), 8, tokenizer="bpe", bpe_vocab_size=300)
    alone = data.BPETokenizer.train([train], 300)
    assert with_rest.tokenizer.fingerprint == alone.fingerprint
    assert with_rest.vocab_size == with_rest.tokenizer.vocab_size < 300


def test_tokenizer_may_be_a_file_or_an_object(write, tmp_path):
    tokenizer = data.CharTokenizer.fit(TEXT + "XYZ")
    tokenizer.save(tmp_path / "chars.json")
    path = write(TEXT)
    for given in (tokenizer, str(tmp_path / "chars.json")):
        dataset = data.text(path, 16, tokenizer=given)
        assert dataset.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="'char', 'byte', 'bpe'.*'words'"):
        data.text(path, 16, tokenizer="words")


def test_a_split_may_be_left_out(write):
    dataset = data.text(write(TEXT), 16, fractions=(0.9, 0.1, 0.0))
    assert len(dataset.test) == 0 and len(dataset.valid) == 7
    everything = data.text(write(TEXT), 16, fractions=(1.0, 0, 0))
    assert len(everything.train) == 985 and len(everything.valid) == 0


def test_fingerprint_depends_on_content_and_on_every_setting(write):
    path = write(TEXT)
    base = data.text(path, 16)
    assert data.text(path, 16).fingerprint == base.fingerprint
    assert data.text(write(TEXT, "other.txt"), 16).fingerprint == base.fingerprint
    others = [
        data.text(write(TEXT[:-1] + "!", "x.txt"), 16),
        data.text(path, 17),
        data.text(path, 16, tokenizer="byte"),
        data.text(path, 16, fractions=(0.8, 0.1, 0.1)),
        data.text(path, 16, train_stride=2),
    ]
    assert len({base.fingerprint, *(d.fingerprint for d in others)}) == 6


def test_empty_file_is_named(write):
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        data.text(write("", "empty.txt"), 4)


def test_a_description_has_no_power_over_a_terminal(write):
    dataset = data.text(write(TEXT, "a\x1b[31m\x9b.txt"), 16)
    assert "Text file a\\u001b[31m\\u009b.txt, 1000 characters" in dataset.description


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        data.text(tmp_path / "absent.txt", 4)


def test_bad_utf8_is_named_with_line_and_offset(write):
    path = write(b"first\nsecond \xe9 line\n", "latin.txt")
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8, byte 0xe9 at offset 13"):
        data.text(path, 4)


def test_compressed_files_are_read_by_their_suffix(write):
    base = data.text(write(TEXT), 16)
    for name, compress in [("c.txt.gz", gzip.compress), ("c.XZ", lzma.compress)]:
        packed = compress(TEXT.encode())
        found = data.text(write(packed, name), 16)
        assert found.fingerprint == base.fingerprint and (all_rows(found.test).tokens > 0).any()
        for broken in (packed[:-9], packed[:40] + b"!!!" + packed[43:], TEXT.encode()):
            with pytest.raises(ValueError, match=f"{name}: damaged, or not a"):
                read_text(write(broken, name))
    with pytest.raises(ValueError, match=r"c\.txt:1: not UTF-8, .*name it \*\.gz"):
        read_text(write(gzip.compress(TEXT.encode()), "c.txt"))


def test_a_byte_order_mark_at_the_beginning_is_dropped_and_counted(write):
    marked = data.text(write("\ufeff" + TEXT, "marked.txt"), 16)
    plain = data.text(write(TEXT), 16)
    assert marked.fingerprint == plain.fingerprint and "\ufeff" not in marked.tokenizer.characters
    assert (marked.report["byte_order_marks"], plain.report["byte_order_marks"]) == (1, 0)
    assert "byte order marks 1" in marked.description
    assert read_text(write("a\ufeff\ufeff")).content == "a\ufeff\ufeff"
    with pytest.raises(ValueError, match=r"corpus\.txt: the file is empty"):
        read_text(write("\ufeff"))


def test_lines_end_at_newlines_alone(write):
    inside = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"
    path = write(f"\ufeff{inside}\r\n é \nlast\r\n\n \r\n")
    lines, dropped = data.read_lines(path)
    assert lines == [(inside, f"{path}:1"), (" é ", f"{path}:2"), ("last", f"{path}:3")]
    assert dropped == {"byte_order_marks": 1, "carriage_returns": 2}
    with pytest.raises(ValueError, match=r"corpus\.txt:2: empty line"):
        data.read_lines(write("a\n\t\nb"))


def test_unknown_characters_are_named_with_file_and_line(write):
    path = write("ab\n" * 30 + "a\x1bb\nüa\n" + "ab\n")
    dataset = data.text(path, 4, fractions=(0.85, 0.07, 0.08))
    assert (
        dataset.report["valid_unknown_characters"] + dataset.report["test_unknown_characters"] == 2
    )
    places = f"Outside the vocabulary: {path}:31 has '\\x1b' (1); {path}:32 has 'ü' (1)."
    assert places in dataset.description


def test_documents_tell_unknown_characters_marks_and_empty_splits(write):
    good, odd = b'{"text": "ab"}\n', '{"text": "aü"}\n'.encode()
    valid = write(b"\xef\xbb\xbf" + good + odd, "valid.jsonl.gz")
    valid.write_bytes(gzip.compress(valid.read_bytes()))
    dataset = data.documents(write(good * 3, "train.jsonl"), 4, valid_path=valid)
    assert dataset.report["byte_order_marks"] == 1
    assert f"Outside the vocabulary: {valid}:2 has 'ü' (1)." in dataset.description
    empty = write(b'{"text": ""}\n' * 3, "empty.jsonl")
    with pytest.raises(ValueError, match=r"train\.jsonl: every document of the valid split is em"):
        data.documents(write(good, "train.jsonl"), 4, valid_path=empty)


def test_short_files_are_named(write):
    path = write(TEXT[:100], "short.txt")
    with pytest.raises(ValueError, match=r"short\.txt: too short, .*90 tokens .* length = 91"):
        data.text(path, 91)
    assert len(data.text(path, 90).train) == 1
    with pytest.raises(ValueError, match=r"tiny\.txt: too small, the test split would be empty"):
        data.text(write("abcdefgh", "tiny.txt"), 2, fractions=(0.9, 0.09, 0.01))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 4, "fractions": (0.5, 0.5)}, "three non-negative numbers"),
        ({"length": 4, "fractions": (0.5, 0.2, 0.2)}, "sum 1"),
        ({"length": 4, "fractions": (0.0, 0.5, 0.5)}, "the train split would be empty"),
    ],
)
def test_bad_settings_are_refused(write, settings, message):
    with pytest.raises(ValueError, match=message):
        data.text(write(TEXT), **settings)


def test_embedded_text_is_the_same_everywhere_and_described():
    dataset = data.embedded_text(128)
    assert dataset.report["train_characters"] == 418_153
    assert dataset.report["test_characters"] == 23_231
    assert dataset.tokenizer.characters.isascii()
    assert "sha256 89096ba6643b64b5" in dataset.description and "PSF-2.0" in dataset.description
    assert dataset.report["valid_unknown_characters"] == 0
    # That of runs that were made when the text was read from CPython 3.11.7.
    assert dataset.fingerprint == "b8a3243fbe82295c17f2d153d4a168db40bc8827eaf90201f86036d283bab3b3"


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the text of another CPython")
def test_embedded_text_is_that_of_cpython():
    from pydoc_data.topics import topics

    text = unicodedata.normalize("NFKD", "\n\n".join(topics[name] for name in sorted(topics)))
    content, _ = read_text(EMBEDDED)
    assert content == text.encode("ascii", "ignore").decode("ascii")


def test_dataset_refuses_contradictions(write):
    dataset = data.text(write(TEXT), 16)
    import dataclasses

    for change, message in [
        ({"mask_id": 3}, r"those of the tokenizer, \(16, 15\), got \(16, 3\)"),
        ({"tokenizer": data.ByteTokenizer()}, r"those of the tokenizer, \(259, 258\)"),
        ({"tokenizer": None, "mask_id": 3}, "K and the last id"),
        ({"unit": "word"}, "'character' or 'dimension'"),
        ({"event_shape": (3, 3)}, "does not hold 16"),
        ({"length": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(dataset, **change)
