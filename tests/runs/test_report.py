"""What a finished run says."""

import json

from mdm_jax.launch.modes.evaluate import format_results, write_plots


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
    text = format_results(record, [])
    write_plots(tmp_path, record)
    assert "unigram entropy of the split 2.000, bigram entropy unknown bits per character" in text
    assert (tmp_path / "plots" / "training.png").exists()
