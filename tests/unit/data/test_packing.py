"""Documents in shared rows: which row, nothing lost, and losses as in rows of their own."""

import itertools
import json
import lzma
import os

import jax
import numpy as np
import pytest
import tiny

from mdm_jax import corruption, data, models, objectives, samplers
from mdm_jax.data import datasets
from mdm_jax.data.packing import check_document_blocks, cut_documents, first_fit, unpacked
from mdm_jax.data.rows import PackedSpans
from mdm_jax.data.text import documents
from mdm_jax.draws import Draw
from mdm_jax.launch import build, families
from mdm_jax.launch import config as launch_config
from mdm_jax.types import Batch

WORDS = ["", "a", "bb", "abc", "abcd", "cabba", "bcbcbcb", "aabbccaabbcc"]
TEXTS = [f"{word}{i:02d}" for i, word in enumerate(WORDS * 5)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("packing") / "documents.jsonl"
    place.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    return place


def by_hand(sizes, length):
    """First fit, as the definition says it."""
    room, rows = [], []
    for size in sizes:
        row = next((i for i, free in enumerate(room) if free >= size), len(room))
        if row == len(room):
            room.append(length)
        room[row] -= size
        rows.append(row)
    return rows


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 65, 300])
@pytest.mark.parametrize("length", [1, 6, 31])
def test_first_fit_is_the_first_row_with_room(count, length):
    sizes = np.random.default_rng(count).integers(1, length + 1, count)
    rows = first_fit(sizes, length)
    assert rows.tolist() == by_hand(sizes.tolist(), length)
    assert (np.bincount(rows, sizes, 1) <= length).all()


def test_first_fit_of_a_worked_example():
    assert first_fit([5, 7, 3, 2, 3, 4], 8).tolist() == [0, 1, 0, 2, 2, 3]


@pytest.mark.parametrize("sizes", [[0, 1], [3, 9]])
def test_first_fit_refuses_what_cannot_be_placed(sizes):
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        first_fit(sizes, 8)


def test_long_documents_are_cut_into_full_rows_and_a_rest():
    starts, ends, num_split = cut_documents([3, 20, 0, 8, 9], 8, "split", "here")
    assert starts.tolist() == [0, 3, 11, 19, 23, 31, 39]
    assert ends.tolist() == [3, 11, 19, 23, 31, 39, 40]
    assert num_split == 2


def test_long_documents_may_be_cut_to_one_row():
    starts, ends, num_long = cut_documents([3, 20, 0, 8, 9], 8, "cut", "here")
    assert starts.tolist() == [0, 3, 23, 31] and ends.tolist() == [3, 11, 31, 39]
    assert num_long == 2


def test_long_documents_are_named_when_they_are_errors():
    with pytest.raises(ValueError, match=r"here: 2 of 4 .* document 1 .* 20 tokens.*'split'"):
        cut_documents([3, 20, 8, 9], 8, "error", "here")
    with pytest.raises(ValueError, match="must be one of 'split', 'cut', 'error', got 'drop'"):
        cut_documents([3], 8, "drop", "here")


def texts_of(source, codec, pieces=False):
    """Texts of a source's documents; those split over rows are joined again by their EOS."""
    texts, open_text = [], ""
    for row in (source[i] for i in range(len(source))):
        for number in range(1, row.documents.max() + 1):
            ids = row.tokens[row.documents == number]
            open_text += codec.decode(ids)
            if pieces or ids[-1] == codec.eos_id:
                texts.append(open_text)
                open_text = ""
    return texts


@pytest.mark.parametrize("packing", ["", "first_fit"])
def test_every_document_is_in_the_rows_exactly_once(path, packing):
    dataset = documents(path, 16, packing=packing, fractions=(0.8, 0.1, 0.1))
    parts = {n: texts_of(getattr(dataset, n), dataset.tokenizer) for n in datasets.SPLITS}
    assert sorted(itertools.chain(*parts.values())) == sorted(TEXTS)
    for name, texts in parts.items():
        source, report = getattr(dataset, name), dataset.report
        batch = data.gather(source, range(len(source)))
        assert batch.units.sum() == sum(map(len, texts))
        assert (batch.eligible == (batch.documents > 0)).all()
        assert (batch.tokens[~batch.eligible] == dataset.tokenizer.pad_id).all()
        assert report[f"{name}_documents"] == len(texts)
        assert report[f"{name}_padded_positions"] == (~batch.eligible).sum()
    filled = data.gather(dataset.train, range(len(dataset.train))).eligible.mean()
    assert f"Training rows are filled to {filled:.1%}." in dataset.description


def test_documents_begin_at_multiples_of_align(path):
    dataset = documents(path, 16, packing="first_fit", align=4)
    assert sorted(texts_of(dataset.train, dataset.tokenizer)) == sorted(
        texts_of(documents(path, 16).train, dataset.tokenizer)
    )
    rows = data.gather(dataset.train, range(len(dataset.train)))
    begins = np.argwhere(np.diff(rows.documents, axis=1, prepend=0) > 0)
    assert (begins[:, 1] % 4 == 0).all() and (begins[:, 1] > 0).any()
    assert (dataset.train.offsets == begins[:, 1]).all()
    check_document_blocks(dataset, 4)
    assert "several to a row, first fit in order, from multiples of 4 on" in dataset.description
    others = ({}, {"long_documents": "error"}, {"long_documents": "cut"})
    same = [documents(path, 16, packing="first_fit", **other).fingerprint for other in others]
    assert same[0] == same[1] and len({dataset.fingerprint, *same}) == 3
    with pytest.raises(ValueError, match="align must divide a row of 16 tokens, got 5"):
        documents(path, 16, packing="first_fit", align=5)


def test_documents_that_begin_inside_blocks_are_refused(path):
    packed = documents(path, 16, packing="first_fit")
    with pytest.raises(ValueError, match="train split .* blocks of 4 tokens.* align=4"):
        check_document_blocks(packed, 4)
    check_document_blocks(packed, 1)
    check_document_blocks(documents(path, 16), 4)  # each in rows of its own
    config = launch_config.get_config()
    config.process = "block"
    config.block.size, config.mesh.data = 4, 1
    config.data.update(source="documents", path=str(path), length=16, packing="first_fit")
    with pytest.raises(ValueError, match="align=4"):
        families.block(config, build.dataset(config))
    config.data.align = 4
    families.block(config, build.dataset(config))


def test_padding_may_be_eos_that_counts(path):
    """The likelihood then includes the length, and every position is generated."""
    apart, scored = (documents(path, 16, document_padding=p) for p in ("pad_hidden", "eos_scored"))
    rows, hidden = (data.gather(d.train, range(len(d.train))) for d in (scored, apart))
    assert rows.eligible.all() and (rows.documents == 1).all()
    eos = scored.tokenizer.eos_id
    np.testing.assert_array_equal(rows.tokens, np.where(hidden.eligible, hidden.tokens, eos))
    np.testing.assert_array_equal(rows.units, hidden.units)
    assert scored.fingerprint != apart.fingerprint
    with pytest.raises(ValueError, match="document_padding='eos_scored' .* packing='first_fit'"):
        documents(path, 16, document_padding="eos_scored", packing="first_fit")


def test_documents_are_told_apart_and_end_with_their_eos():
    tokens = np.array([[1, 2, 9, 3, 9, 0], [4, 9, 5, 6, 9, 0], [7, 7, 7, 7, 7, 7]], np.int32)
    numbers = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 3, 3, 3], [1] * 6], np.int32)
    apart, valid = unpacked(tokens, numbers, eos_id=9)
    texts = [row[keep].tolist() for row, keep in zip(apart, valid)]
    assert texts == [[1, 2, 9], [3, 9], [4, 9], [6, 9], [7] * 6]


def test_packing_fills_rows_and_has_a_fingerprint_of_its_own(path):
    apart, packed = (documents(path, 16, packing=p) for p in ("", "first_fit"))
    assert len(packed.train) < 0.6 * len(apart.train)
    assert packed.report["train_padded_positions"] < 0.1 * 16 * len(packed.train)
    assert apart.fingerprint != packed.fingerprint
    again = documents(path, 16, packing="first_fit")
    assert again.fingerprint == packed.fingerprint
    rows = range(len(packed.train))
    for one, other in zip(data.gather(packed.train, rows), data.gather(again.train, rows)):
        np.testing.assert_array_equal(one, other)


def test_a_stream_of_packed_rows_resumes(path):
    source = documents(path, 16, packing="first_fit", fractions=(1, 0, 0)).train
    stream = data.train_iterator(source, 4, seed=5)
    next(stream)
    state = stream.get_state()
    expected = next(stream)
    resumed = data.train_iterator(source, 4, seed=5)
    resumed.set_state(state)
    for one, other in zip(next(resumed), expected):
        np.testing.assert_array_equal(one, other)


def test_the_launcher_reaches_packing_by_config(path):
    config = launch_config.get_config()
    config.data.update(source="documents", path=str(path), length=16, packing="first_fit")
    dataset = build.dataset(config)
    assert "several to a row, first fit in order" in dataset.description
    config.data.long_documents = "error"
    config.data.length = 12
    with pytest.raises(ValueError, match="do not fit a row of 12 tokens"):
        build.dataset(config)
    config.data.packing = "best_fit"
    with pytest.raises(ValueError, match="packing: unknown name 'best_fit'; .*first_fit"):
        build.dataset(config)
    config.data.update(source="embedded", packing="first_fit", length=16)
    with pytest.raises(ValueError, match="does not read .*data.packing="):
        build.dataset(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', r":2: empty line"),
        ('{"text": "a"}\n{"body": "b"}\n', r":2: no field 'text'; the line has \['body'\]"),
        ('{"text": 3}\n', r":1: field 'text' must be a string, got int"),
        ("[1]\n", r":1: expected a JSON object with 'text', got list"),
        ('{"text": \n', r":1: not JSON"),
        ("", "the file is empty"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path, content, message):
    place = tmp_path / "bad.jsonl"
    place.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        documents(place, 8)


def test_losses_of_packed_documents_are_those_of_rows_of_their_own():
    """The same tokens under the same noise: sums per document agree, wherever the document stands.

    Positions are not restarted, so this also shows that the rotary embedding does not mind.
    """
    sizes, length = np.asarray([3, 6, 2, 5, 4, 1]), 8
    ends = np.cumsum(sizes)
    starts, stream = ends - sizes, np.random.default_rng(0)
    tokens = stream.integers(0, tiny.MASK_ID, ends[-1]).astype(np.int32)
    noise = np.append(stream.random(ends[-1]), 0.5).astype(np.float32)  # the last for padding
    counts = np.ones(tiny.VOCAB, np.int32)
    numbers = first_fit(sizes, length)
    packed = PackedSpans(tokens, starts, ends, numbers, length, 0, counts)
    apart = PackedSpans(tokens, starts, ends, np.arange(len(sizes)), length, 0, counts)
    # Where each position of a row came from: the same sources over the numbers of the tokens.
    places = np.arange(ends[-1], dtype=np.int32)
    origin_packed = PackedSpans(places, starts, ends, numbers, length, ends[-1], noise)
    origin_apart = PackedSpans(places, starts, ends, np.arange(len(sizes)), length, ends[-1], noise)

    model = tiny.transformer(depth=2, qk_norm=True)
    params = tiny.parameters(model, length)
    bound = objectives.masked_nelbo(corruption.bernoulli(tiny.MASK_ID))

    @tiny.jit
    def losses(batch: Batch, noise):
        rows = batch.tokens.shape[0]
        level = np.full((1, rows, 1), 0.2, np.float32)
        draw = Draw(level, np.zeros_like(level), noise[None])
        return bound.loss(lambda *inputs: model.apply(params, *inputs), batch, draw).raw[0, :, 0]

    def rows_of(*sources):
        batches = [data.gather(source, range(len(source))) for source in sources]
        return Batch(*map(np.concatenate, zip(*batches)))

    origins = rows_of(origin_packed, origin_apart).tokens
    both = np.asarray(losses(rows_of(packed, apart), noise[origins]))
    shared, own = both[: len(packed)], both[len(packed) :]
    assert len(shared) == 4 and len(own) == 6 and (own > 0).sum() >= 5
    np.testing.assert_allclose(shared, np.bincount(numbers, own), rtol=2e-5)


def test_block_logits_of_aligned_documents_are_those_of_rows_of_their_own():
    """Three documents in a row of 12; begun inside a block of 4, the second is another one."""
    model = tiny.transformer(depth=2, qk_norm=True)
    params = tiny.parameters(model, 12)
    apply_fn = models.block_apply(model, 4)
    run = tiny.jit(lambda inputs, level, documents: apply_fn(params, inputs, level, documents))
    draw = np.random.default_rng(0)
    texts, noised = (
        [draw.integers(0, k, n) for n in (3, 2, 4)] for k in (tiny.MASK_ID, tiny.VOCAB)
    )

    def logits(offsets_of_rows):
        """Logits of the three documents, each put at an offset of a row."""
        rows = np.zeros((len(offsets_of_rows), 2, 12), np.int32)
        documents = np.zeros((len(offsets_of_rows), 12), np.int32)
        where = {}
        for row, offsets in enumerate(offsets_of_rows):
            for number, offset in offsets.items():
                where[number] = row, slice(offset, offset + len(texts[number]))
                rows[row, :, where[number][1]] = noised[number], texts[number]
                documents[where[number]] = number + 1
        level = np.full((len(rows), 3), 0.3, np.float32)
        found = np.asarray(run(rows.reshape(len(rows), 24), level, documents))
        return np.concatenate([found[where[number]] for number in range(3)]), documents

    own, _ = logits([{0: 0}, {1: 0}, {2: 0}])
    shared, documents = logits([{0: 0, 1: 4, 2: 8}, {}, {}])
    np.testing.assert_allclose(shared, own, atol=2e-5)
    models.masks.check_document_blocks(documents, 4)
    models.masks.check_document_blocks(np.array([[0, 1, 1, 1, 2, 2, 0, 0]]), 4)  # first: anywhere
    wrong, documents = logits([{0: 0, 1: 3, 2: 8}, {}, {}])
    assert np.abs(wrong - own).max() > 0.05
    inputs = np.zeros((3, 24), np.int32)
    decoder = models.cached_block_decoder(model, 4)
    generate = samplers.make_block_generator(
        decoder, samplers.first_hitting(), None, mask_id=tiny.MASK_ID
    )
    for refuse in (
        lambda: apply_fn(params, inputs, np.zeros((3, 3), np.float32), documents),
        lambda: models.masks.check_document_blocks(documents, 4),
        lambda: generate(params, jax.random.key(0), inputs[:, :12], documents),
    ):
        with pytest.raises(ValueError, match=r"document 2 of row 0 begins at position 3.*align=4"):
            refuse()


def test_wrapped_documents_are_one_text_cut_anywhere(path):
    """Written down from the texts: EOS after each, rows of 16 without a gap, attended to whole."""
    dataset = documents(path, 16, packing="wrapped", fractions=(1, 0, 0))
    codec, report = dataset.tokenizer, dataset.report
    order = sorted(TEXTS, key=TEXTS.index)
    stream = np.concatenate([np.append(codec.encode(text), codec.eos_id) for text in order])
    rows = data.gather(dataset.train, range(len(dataset.train)))
    full = len(stream) // 16
    np.testing.assert_array_equal(rows.tokens.reshape(-1)[: len(stream)], stream)
    assert rows.eligible.reshape(-1)[: len(stream)].all() and rows.documents[:full].all()
    assert len(np.unique(rows.documents[:full])) == 1
    assert report["train_padded_positions"] == len(rows.tokens) * 16 - len(stream) < 16
    ends = np.cumsum([len(text) + 1 for text in order])
    starts = ends - [len(text) + 1 for text in order]
    across = sum(any(start < cut < end for cut in range(0, len(stream), 16))
                 for start, end in zip(starts, ends))  # fmt: skip
    assert report["train_split_documents"] == across > 0
    assert report["train_documents"] == len(TEXTS)
    assert "cut into rows anywhere" in dataset.description
    for wrong in ({"long_documents": "cut"}, {"align": 4}):
        with pytest.raises(ValueError, match="'wrapped' cuts one stream .* needs"):
            documents(path, 16, packing="wrapped", **wrong)
    with pytest.raises(ValueError, match="eos_scored"):
        documents(path, 16, packing="wrapped", document_padding="eos_scored")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_cached_documents_are_those_read_at_once(tmp_path, suffix):
    paths = {}
    for number, name in enumerate(("path", "valid_path", "test_path")):
        lines = "".join(json.dumps({"body": t}) + "\n" for t in TEXTS[number::3])
        place = tmp_path / f"{name}{suffix}"
        content = lines.encode()
        place.write_bytes(lzma.compress(content) if suffix.endswith("xz") else content)
        paths[name] = str(place)
    first, *held_out = paths.values()
    settings = {"length": 16, "text_field": "body", "packing": "wrapped", "tokenizer": "byte"}
    settings |= {"valid_path": held_out[0], "test_path": held_out[1]}
    plain = documents(first, **settings)
    written = documents(first, cache=tmp_path / "cache", **settings)
    mapped = documents(first, cache=tmp_path / "cache", **settings)
    assert written.fingerprint == mapped.fingerprint
    for split in datasets.SPLITS:
        sources = [getattr(d, split) for d in (plain, written, mapped)]
        for one, *others in zip(*(data.gather(s, range(len(s))) for s in sources)):
            for other in others:
                np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    documents(first, cache=tmp_path / "cache", **settings | {"tokenizer": "char"})
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(ValueError, match="give valid_path and test_path too"):
        documents(first, 16, text_field="body", cache=tmp_path / "cache")
    # A file that was changed, to the same size, is not taken for the one before.
    before = os.stat(first)
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    documents(first, cache=tmp_path / "cache", **settings)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    with pytest.raises(ValueError, match=r"path.jsonl.*:1: no field 'text'; .* has \['body'\]"):
        documents(first, cache=tmp_path / "cache", **settings | {"text_field": "text"})
