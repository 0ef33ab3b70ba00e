"""scikit-learn's digits as rows of 17 intensities."""

import sys

import numpy as np
import pytest

from mdm_jax import data


def test_digits_are_the_pictures_of_scikit_learn():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    dataset = data.digits()
    sizes = [len(dataset.train), len(dataset.valid), len(dataset.test)]
    assert sizes == [1438, 179, 180] and sum(sizes) == 1797
    assert (dataset.vocab_size, dataset.mask_id, dataset.length) == (18, 17, 64)
    assert dataset.event_shape == (8, 8) and dataset.unit == "dimension"
    assert dataset.tokenizer is None
    splits = (dataset.train, dataset.valid, dataset.test)
    parts = [data.gather(source, range(len(source))) for source in splits]
    rows, documents = (np.concatenate(field) for field in list(zip(*parts))[::2][:2])
    expected = load_digits().data.astype(np.int32)
    assert rows.min() == 0 and rows.max() == 16
    assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))
    assert not np.array_equal(rows, expected)  # shuffled: the file is ordered by writer
    row = dataset.train[5]
    assert row.eligible.all() and row.units == 64 and dataset.num_classes == 10
    for picture, number in zip(rows[::60], documents[::60]):
        (same,) = np.flatnonzero((expected == picture).all(1))
        assert set(number) == {2 + load_digits().target[same]}
    assert [a.dtype for a in row] == [np.int32, bool, np.int32, np.int32]
    assert data.digits().fingerprint == dataset.fingerprint


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'mdm_jax\[digits\]'"):
        data.digits()
