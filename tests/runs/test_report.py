"""What a finished run says."""

import json

import numpy as np

from mdm_jax import data
from mdm_jax.launch.modes.evaluate import format_results, summary, write_plots
from mdm_jax.launch.reports.curves import level_lines


def test_a_split_without_neighbours_has_no_bigram_entropy(tmp_path):
    """As where one token of a row is scored: said, and left out of the plot."""
    train = {"step": 1, "kind": "train", "loss": 1.0, "bits_per_unit": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train) + "\n")
    record = {
        "unit": "character",
        "split": "test",
        "rows": 3,
        "step": 1,
        "bits_per_unit": 1.5,
        "standard_error_bits_per_unit": None,
        "data_standard_error_bits_per_unit": None,
        "unigram_bits_per_unit": 2.0,
        "bigram_bits_per_unit": None,
    }
    text = format_results(record, [], exact=False)
    write_plots(tmp_path, {"process": "masked"}, record)
    assert "unigram entropy of the split 2.000, bigram entropy unknown bits per character" in text
    assert "held-out likelihood bound" in text and "1.500 ± unknown bits" in text
    assert (tmp_path / "plots" / "training.png").exists()


def test_bits_of_a_masked_token_by_masking_rate():
    """As weighting.entropy_rise.bits takes them; nothing where tokens are not corrupted."""
    levels = {"masking_rate_edges": [0, 0.5, 1], "nats_per_masked_token": [np.log(2), None]}
    lines = level_lines({"process": "masked"}, {"levels": levels})
    assert lines == [
        "  bits of a masked token by masking rate, means of 2 equal ranges:",
        "  (1.000,unknown)",
    ]
    assert level_lines({"process": "autoregressive"}, {"levels": levels}) == []
    assert level_lines({"process": "masked"}, {}) == []


def test_an_exact_likelihood_is_not_called_a_bound():
    record = {
        "unit": "character",
        "split": "test",
        "rows": 3,
        "step": 1,
        "bits_per_unit": 1.5,
        "standard_error_bits_per_unit": 0.0,
        "data_standard_error_bits_per_unit": 0.25,
        "unigram_bits_per_unit": 2.0,
        "bigram_bits_per_unit": 1.0,
    }
    text = format_results(record, [], exact=True)
    assert "held-out exact likelihood (test split" in text and "bound" not in text
    assert "  1.500 bits per character   (± 0.250 over rows)\n" in text


def test_a_run_ends_with_its_likelihood_and_the_share_of_known_words(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" the cat sat" * 30 + " the hat sat" * 10)
    dataset = data.text(path, 16, fractions=(0.75, 0.0, 0.25))
    record = {"split": "test", "unit": "character"}
    record |= {"bits_per_unit": 1.5, "standard_error_bits_per_unit": 0.25}
    samples = [
        {"kind": "free", "text": "t the cat zog t"},  # the ends may be cut
        {"kind": "free", "text": " cat, the cat "},
        {"kind": "infilled", "text": " zog zog zog "},
    ]
    assert summary(dataset, dataset.test, record, samples, exact=False).splitlines() == [
        "held-out test split: 1.500 ± 0.250 bits per character",
        "free samples: 83% of 6 words occur in the training text (3 different ones); "
        "of held-out text 64%",
    ]
    said = "held-out test split: 1.500 bits per character\n"
    assert summary(dataset, dataset.test, record, samples[2:], exact=True) == said
