"""Tables of numbers and categories: codes and back, CSV files, and what is refused."""

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.data.tables import Column, as_csv, decoded, diabetes, table, table_dataset

pytestmark = pytest.mark.keyless
COLOURS = ["red", "blue", "a,b", "red"] * 10
HEIGHTS = np.linspace(1.0, 9.0, 40)


def made(**values):
    return table_dataset(values, origin="here", headline="A table.", settings={})


def test_codes_lead_back_to_the_values():
    dataset = made(colour=COLOURS, height=HEIGHTS)
    colour, height = dataset.columns
    assert colour.categories == ("a,b", "blue", "red") and height.is_numeric
    rows = np.concatenate(
        [data.gather(part, np.arange(len(part))).tokens for part in (dataset.train, dataset.test)]
    )
    back = decoded(dataset.columns, rows)
    for name, value in zip(back["colour"], back["height"]):
        nearest = np.argmin(abs(HEIGHTS - value))
        assert abs(HEIGHTS[nearest] - value) <= height.step / 2
        assert COLOURS[nearest] == name
    # Half the training range is free on both sides; what is beyond gets the last code.
    train = height.decode(data.gather(dataset.train, np.arange(len(dataset.train))).tokens[:, 1])
    middle, reach = (train.max() + train.min()) / 2, train.max() - train.min()
    ends = height.decode(height.encode([middle - 2 * reach, middle + 2 * reach]))
    np.testing.assert_allclose(ends, [middle - reach, middle + reach], rtol=1e-3)
    np.testing.assert_allclose([train.mean(), train.std()], [height.mean, height.std], rtol=1e-3)
    assert colour.entropy == pytest.approx(
        -sum(f * np.log(f) for f in colour.frequencies), rel=1e-12
    )


def test_a_file_is_read_as_it_was_written(tmp_path):
    first = made(colour=COLOURS, height=HEIGHTS)
    codes = data.gather(first.test, np.arange(len(first.test))).tokens
    file = tmp_path / "rows.csv"
    file.write_text(as_csv(first.columns, codes), "utf-8")
    second = table(str(file), fractions=(1.0, 0.0, 0.0))
    again = data.gather(second.train, np.arange(len(second.train))).tokens
    found, wanted = decoded(second.columns, again), decoded(first.columns, codes)
    assert sorted(found["colour"]) == sorted(wanted["colour"])
    np.testing.assert_allclose(sorted(found["height"]), sorted(wanted["height"]), atol=1e-3)


def test_the_table_of_scikit_learn():
    dataset = diabetes()
    sizes = [len(c.categories) for c in dataset.columns]
    assert sizes == [2, 7, 4, 6] + [0] * 7 and dataset.length == 11
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [265, 44, 133]
    assert dataset.report["numbers_beyond_the_codes"] == 0
    assert dataset.fingerprint != diabetes((0.7, 0.1, 0.2)).fingerprint


@pytest.mark.parametrize(
    "content, words",
    [
        ("a,b\n1,x\n2\n", "line 3: 2 values are needed"),
        ("a,b\n1,x\n ,y\n", "line 3: 2 values are needed, none of them empty"),
        ("a,a\n1,x\n", "line 1 must name two or more different columns"),
        ("", "the file is empty"),
        ("\n1,x\n", "line 1 must name"),
        ('a,b\n1,"x\ny"\n2\n', "line 4: 2 values are needed"),
        ("\ufeffa,a\n1,x\n", "got \\['a', 'a'\\]"),
        ("a,b\n1,x\n1,y\n1,z\n1,x\n", "'a' is constant in the training rows"),
        ("a,b\n1,x\nnan,y\n3,z\n4,x\n", "row 1 holds nan"),
        ("a,b\n1,x\n2,x\n3,x\n4,x\n", "'b' is constant in the training rows"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, words):
    file = tmp_path / "bad.csv"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=words):
        table(str(file), fractions=(1.0, 0.0, 0.0))


def test_bad_columns_are_refused():
    with pytest.raises(ValueError, match="equally many rows"):
        made(a=[1.0, 2.0], b=["x"])
    with pytest.raises(ValueError, match="has the categories x, y, not z"):
        Column("a", ("x", "y")).encode(["x", "z"])
