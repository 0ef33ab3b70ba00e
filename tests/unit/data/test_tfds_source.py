"""TFDS datasets, built here in array_record format, read without TensorFlow."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.data import tfds_source

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
tensorflow_datasets.disable_progress_bar()
core = tensorflow_datasets.core
features = tensorflow_datasets.features

DOCUMENTS = [f"document {i} naïve " + "x" * (i % 7) for i in range(39)] + [""]
SIZES = {"train": 40, "test": 8}


def picture(i):
    return np.arange(12, dtype=np.uint8).reshape(4, 3) * (i % 20)


class Local(core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = core.Version("1.0.0")
    FEATURES: dict

    def _info(self):
        return core.DatasetInfo(
            builder=self,
            description="Built by a test.",
            features=features.FeaturesDict(self.FEATURES),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(size) for name, size in SIZES.items()}

    def example(self, i):
        raise NotImplementedError

    def _generate_examples(self, size):
        for i in range(size):
            yield i, self.example(i)


class LocalDocuments(Local, skip_registration=True):
    FEATURES = {"text": features.Text(), "label": np.int64}

    def example(self, i):
        return {"text": DOCUMENTS[i], "label": i}


class LocalPictures(Local, skip_registration=True):
    FEATURES = {"image": features.Image(shape=(4, 3, 1)), "label": np.int64}

    def example(self, i):
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(picture(i)).save(stream, "png")
        return {"image": stream.getvalue(), "label": i}


class LocalMixed(Local, skip_registration=True):
    FEATURES = {"image": features.Tensor(shape=(None, 2), dtype=np.uint8), "text": features.Text()}

    def example(self, i):
        return {
            "image": np.zeros((2 + i % 2, 2), np.uint8),
            "text": b"ok \xff" if i == 3 else b"ok",
        }


class LocalParquet(LocalDocuments, skip_registration=True):
    pass


SPLITS = ("train[:80%]", "train[80%:]", "test")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    for builder in (LocalDocuments, LocalPictures, LocalMixed):
        builder(data_dir=path, file_format="array_record").download_and_prepare()
    LocalParquet(data_dir=path, file_format="parquet").download_and_prepare()
    return path


@pytest.fixture(scope="module")
def local(data_dir):
    return {"data_dir": data_dir, "download": False, "splits": SPLITS}


def test_documents_end_with_eos_and_share_no_row(local):
    dataset = data.tfds_text("local_documents", length=8, tokenizer="byte", **local)
    codec = dataset.tokenizer
    for source, texts in ((dataset.train, DOCUMENTS[:32]), (dataset.valid, DOCUMENTS[32:])):
        batch = data.gather(source, range(len(source)))
        assert batch.eligible[:, 0].all()
        np.testing.assert_array_equal(batch.documents, batch.eligible)
        assert (batch.tokens[~batch.eligible] == codec.pad_id).all()
        found, rows = [], iter(zip(batch.tokens, batch.eligible))
        for text in texts:
            count = len(text.encode()) + 1
            pieces = [next(rows) for _ in range(-(-count // 8))]
            ids = np.concatenate([tokens[keep] for tokens, keep in pieces])
            assert len(ids) == count and ids[-1] == codec.eos_id
            found.append(codec.decode(ids))
        assert found == texts and next(rows, None) is None
        assert batch.units.sum() == sum(map(len, texts))
    report = dataset.report
    assert report["train_documents"] == 32 and report["valid_documents"] == 8
    assert report["valid_empty_documents"] == 1
    assert report["train_padded_positions"] == len(dataset.train) * 8 - report["train_tokens"]
    assert "local_documents/1.0.0" in dataset.description


def same_rows(first, second):
    for part in ("train", "valid", "test"):
        rows = [
            data.gather(getattr(d, part), range(len(getattr(d, part)))) for d in (first, second)
        ]
        for a, b in zip(*rows):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def reads(monkeypatch):
    """Numbers of the examples read, in order."""
    indices, values = [], tfds_source._values

    def counted(source, field, block):
        indices.extend(block)
        yield from values(source, field, block)

    monkeypatch.setattr(tfds_source, "_values", counted)
    return indices


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_tokens_kept_on_disk_are_those_in_memory(local, tmp_path, reads, tokenizer):
    settings = dict(length=8, tokenizer=tokenizer, bpe_vocab_size=262, packing="first_fit", **local)
    memory = data.tfds_text("local_documents", **settings)
    written = data.tfds_text("local_documents", cache=tmp_path, **settings)
    reads.clear()
    mapped = data.tfds_text("local_documents", cache=tmp_path, **settings)
    assert not reads, "the second time the files are mapped"
    assert isinstance(mapped.train.tokens, np.memmap) and mapped.train.tokens.itemsize <= 2
    for dataset in (written, mapped):
        same_rows(memory, dataset)
        assert dataset.fingerprint == memory.fingerprint and dataset.report == memory.report
        assert dataset.tokenizer.fingerprint == memory.tokenizer.fingerprint
    other = data.tfds_text(
        "local_documents", cache=tmp_path, **settings | {"splits": ("test",) * 3}
    )
    assert other.fingerprint != memory.fingerprint and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["train.tokens", "test.sizes", "about.json"])
def test_damaged_tokens_on_disk_are_named(local, tmp_path, name):
    settings = dict(length=8, tokenizer="byte", cache=tmp_path, **local)
    data.tfds_text("local_documents", **settings)
    (path,) = tmp_path.glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{path.parent}: not tokens .* remove the folder"):
        data.tfds_text("local_documents", **settings)


def test_streamed_documents_are_read_when_their_rows_are(local, reads):
    settings = dict(length=8, tokenizer="byte", long_documents="cut", **local)
    stored = data.tfds_text("local_documents", **settings)
    reads.clear()
    streamed = data.tfds_text("local_documents", stream=True, **settings)
    assert not reads
    same_rows(stored, streamed)
    assert stored.report["train_cut_documents"] == 32
    reads.clear()
    local_rows = next(data.train_iterator(streamed.train, 8, seed=0, rows=np.array([2, 5])))
    assert len(reads) == 2, "a process reads its own rows only"
    whole = next(data.train_iterator(streamed.train, 8, seed=0))
    np.testing.assert_array_equal(local_rows.tokens, whole.tokens[[2, 5]])
    longer = data.tfds_text("local_documents", stream=True, **settings | {"length": 9})
    assert len({stored.fingerprint, streamed.fingerprint, longer.fingerprint}) == 3


def test_a_streamed_document_that_must_fit_is_named(local):
    settings = dict(length=8, tokenizer="char", stream=True, **local)
    rows = data.tfds_text("local_documents", long_documents="error", **settings).train
    with pytest.raises(ValueError, match="'local_documents': 1 of 1 documents do not fit a row"):
        rows[3]
    for refused in ({}, {"packing": "first_fit"}, {"cache": "x"}):
        with pytest.raises(ValueError, match="stream=True makes one row of each example"):
            data.tfds_text("local_documents", **settings | refused)


def test_streamed_pictures_are_the_stored_ones(local):
    stored = data.tfds_images("local_pictures", levels=5, **local)
    streamed = data.tfds_images("local_pictures", levels=5, stream=True, **local)
    same_rows(stored, streamed)
    assert streamed.event_shape == (4, 3) and streamed.fingerprint != stored.fingerprint


def test_text_tokenizers_are_fitted_to_the_train_split(local):
    splits = {**local, "splits": ("train[:4]", "train[30:]", "test")}
    chars = data.tfds_text("local_documents", length=8, **splits)
    assert set(chars.tokenizer.characters) == set("".join(DOCUMENTS[:4]))
    unseen = sum(c not in chars.tokenizer.characters for d in DOCUMENTS[30:] for c in d)
    assert chars.report["valid_unknown_characters"] == unseen > 0
    bpe = data.tfds_text("local_documents", length=8, tokenizer="bpe", bpe_vocab_size=270, **local)
    assert bpe.vocab_size == 270
    other = data.tfds_text("local_documents", length=9, **splits)
    assert len({chars.fingerprint, bpe.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize("levels", [256, 16, 5, 2])
def test_pictures_are_quantised_and_flattened(local, levels):
    dataset = data.tfds_images("local_pictures", levels=levels, **local)
    assert dataset.event_shape == (4, 3) and dataset.length == 12 and dataset.unit == "dimension"
    assert dataset.vocab_size == levels + 1 and dataset.mask_id == levels
    assert [len(dataset.train), len(dataset.valid), len(dataset.test)] == [32, 8, 8]
    for i in range(8):
        want = picture(32 + i).astype(int) * levels // 256
        assert dataset.valid[i].tokens.tolist() == want.reshape(-1).tolist()
    assert dataset.train[3].units == 12 and dataset.train[3].eligible.all()
    assert dataset.tokenizer is None


def test_training_batches_from_tfds(local):
    dataset = data.tfds_images("local_pictures", levels=4, **local)
    batch = next(data.train_iterator(dataset.train, 8, seed=0))
    assert batch.tokens.shape == (8, 12) and batch.tokens.max() < 4


def test_no_tensorflow_is_imported(local):
    """Builders here are not registered, so this reads files whose class is unknown."""
    before = set(sys.modules)
    data.tfds_text("local_documents", length=8, **local)
    data.tfds_images("local_pictures", **local)
    assert not [name for name in set(sys.modules) - before if name.split(".")[0] == "tensorflow"]


EVIL = {"pythonClassName": "planted_module.Evil", "tensor": {"shape": {}, "dtype": "int64"}}


@pytest.mark.parametrize(
    "feature",
    [
        EVIL,
        {"type": "planted_module.Evil", "content": {"shape": []}},  # as older releases wrote it
        {"pythonClassName": f"{Local.__mro__[1].__module__}.X", "sequence": {"feature": EVIL}},
        {"pythonClassName": "tensorflow_datasets.x.Y", "jsonFeature": {"json": json.dumps([EVIL])}},
    ],
    ids=["new", "old", "nested", "in_a_string"],
)
def test_classes_named_by_data_are_not_imported(local, tmp_path, monkeypatch, feature):
    shutil.copytree(Path(local["data_dir"], "local_documents"), tmp_path / "local_documents")
    (path,) = tmp_path.glob("**/features.json")
    content = json.loads(path.read_text())
    content["featuresDict"]["features"]["label"] = feature
    path.write_text(json.dumps(content))
    (tmp_path / "planted_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {**local, "data_dir": tmp_path}
    with pytest.raises(ValueError, match=r"features.json: names planted_module.Evil, which would"):
        data.tfds_text("local_documents", length=8, **settings)
    with pytest.raises(ValueError, match=r"namespace \(kaggle:\) load code of others"):
        data.tfds_text("kaggle:local_documents", length=8, **settings)
    path.write_text("{")
    with pytest.raises(ValueError, match="features.json: not a description of features"):
        data.tfds_text("local_documents", length=8, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("absent_dataset", {}, "'absent_dataset' in .*not found"),
        ("local_documents", {"splits": ("train", "nope", "test")}, "Unknown split 'nope'"),
        ("local_documents", {"splits": "train"}, "three expressions"),
        (
            "local_documents",
            {"splits": ("train", "train[:0]", "test")},
            r"the valid split 'train\[:0\]' cannot be opened.*hold examples",
        ),
        ("local_documents", {"text_field": "body"}, r"no feature 'body'; it has \['label', 'text'"),
        ("local_documents", {"text_field": "label"}, "must be text, got int"),
        ("local_mixed", {}, r"local_mixed/1.0.0, split train.*example 3: not UTF-8 at byte 3"),
        ("local_parquet", {}, "cannot be opened .*prepared with file_format='array_record'"),
        ("mnist", {}, "cannot be opened .*array_record"),
    ],
)
def test_text_errors(local, name, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.tfds_text(name, **{"length": 8, **local, **settings})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("local_mixed", {}, r"example 1: expected a uint8 picture of shape \(2, 2\)"),
        ("local_pictures", {"image_field": "label"}, "expected a uint8 picture"),
    ],
)
def test_image_errors(local, name, settings, message):
    with pytest.raises(ValueError, match=message):
        data.tfds_images(name, **{**local, **settings})


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'mdm_jax\[data\]'"):
        data.tfds_text("mnist", length=8)
