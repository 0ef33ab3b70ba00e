"""What samples are drawn for: prompts of a file, laid out as in training; how texts are written."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from mdm_jax import data, files, tasks
from mdm_jax.launch import main
from mdm_jax.launch.modes import sample
from mdm_jax.samplers import filters

PAIRS = [(f"{a}+{b}=", str(a + b)) for a in range(12) for b in range(12)]
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]")
HOSTILE = "a\x1b]0;owned\x07\x9b31m\r\x7f\u2028b\u202ec\td"


@pytest.fixture
def pairs(tmp_path):
    def pairs(**settings):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in PAIRS))
        return data.jsonl(path, prompt_length=8, answer_length=6, **settings)

    return pairs


@pytest.fixture
def ask(tmp_path):
    """Jobs for the prompts of a file with this content."""

    def ask(dataset, content, **settings):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        settings |= {"num_samples": 9, "gap": 0, "prompts": str(path)}
        return sample.make_jobs(dataset, dataset.test, **settings)

    return ask


def _held_out(dataset):
    """Answers to held-out prompts, and these prompts as text."""
    jobs = sample.make_jobs(dataset, dataset.test, num_samples=7, gap=0, prompts="")
    codec, middle = dataset.tokenizer, dataset.layout.prompt_length
    return jobs, [codec.decode(job.original[:middle]) for job in jobs]


def _assert_same(found, expected):
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one.canvas, other.canvas)
        np.testing.assert_array_equal(one.documents, other.documents)


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_prompts_of_a_file_stand_where_held_out_prompts_stand(pairs, ask, kind):
    dataset = pairs(tokenizer=kind)
    expected, prompts = _held_out(dataset)
    _assert_same(ask(dataset, "\n".join(prompts)), expected)


def test_prompts_of_a_task_whose_answers_fill_their_positions(ask):
    dataset = tasks.task_dataset(tasks.Add(2), train_rows=9, valid_rows=9, test_rows=9)
    expected, prompts = _held_out(dataset)
    _assert_same(ask(dataset, "\n".join(prompts)), expected)


def test_where_rows_show_the_length_of_the_answer_the_line_has_to_say_it(pairs, ask):
    hidden = pairs(answer_padding="pad_hidden")
    countdown = tasks.task_dataset(tasks.Countdown(), train_rows=40, valid_rows=9, test_rows=9)
    for dataset in (hidden, countdown):
        expected, prompts = _held_out(dataset)
        masks = [np.sum(job.canvas == dataset.mask_id) for job in expected]
        assert len(set(masks)) > 1
        lines = [prompt + n * "▁" for prompt, n in zip(prompts, masks)]
        _assert_same(ask(dataset, "\n".join(lines)), expected)
        with pytest.raises(ValueError, match=r"prompts\.txt:2: rows show where the answer ends"):
            ask(dataset, f"{lines[0]}\n{prompts[1]}\n")


def test_the_answer_begins_at_the_first_mask(pairs, ask):
    dataset = pairs()
    (job,) = ask(dataset, "1+2=▁9▁")
    codec, mask = dataset.tokenizer, dataset.mask_id
    assert codec.decode(job.canvas[4:8]) == "1+2=" and (job.canvas[:4] == codec.pad_id).all()
    assert job.canvas[8:].tolist() == [mask, codec.encode("9")[0], *[mask] * 4]
    assert job.documents.tolist() == [0] * 4 + [1] * 10


@pytest.mark.parametrize("line", ["1234567+1=", "1+1=▁23456▁"])
def test_what_does_not_fit_its_positions_is_refused_by_line(pairs, ask, line):
    with pytest.raises(ValueError, match=r"prompts\.txt:2: too long, .*prompt_length 8.*change"):
        ask(pairs(), f"1+1=\n{line}\n")


def test_texts_without_prompts_begin_at_the_first_column(tmp_path, ask):
    (tmp_path / "corpus.txt").write_text("abcdefgh" * 40)
    dataset = data.text(tmp_path / "corpus.txt", 8)
    (job,) = ask(dataset, "ab▁d")
    masked = [dataset.mask_id]
    a, b, d = dataset.tokenizer.encode("abd").tolist()
    assert job.canvas.tolist() == [a, b, *masked, d, *masked * 4] and job.documents.all()


def test_documents_that_continue_a_prompt_are_as_long_as_those_of_the_data(tmp_path, ask):
    """Rows show where a document ends; a left-to-right model ends it by itself."""
    texts = ["ab" * (n % 4 + 1) for n in range(60)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for packing in ("", "first_fit"):
        dataset = data.documents(path, 12, packing=packing, fractions=(1, 0, 0))
        jobs = ask(dataset, "abab\n" * 90)
        sizes = [int(job.documents.sum()) for job in jobs]
        assert set(sizes) == {5, 7, 9}  # with their EOS, of 3, 5, 7 and 9
        for job, size in zip(jobs, sizes):
            assert dataset.tokenizer.decode(job.canvas[:4]) == "abab"
            assert (job.canvas[4:size] == dataset.mask_id).all()
            assert (job.canvas[size:] == dataset.tokenizer.pad_id).all()
        (long,) = ask(dataset, "ab" * 5)  # longer than all
        assert long.documents.all() and (long.canvas == dataset.mask_id).sum() == 2
        (job,) = ask(dataset, "ab", left_to_right=True)
        assert job.documents.all() and (job.canvas == dataset.mask_id).sum() == 10
    hidden = data.documents(path, 12, document_padding="eos_scored", fractions=(1, 0, 0))
    assert ask(hidden, "ab")[0].documents.all()


def test_left_to_right_models_end_answers_by_themselves(pairs, ask):
    hidden = pairs(answer_padding="pad_hidden")
    (job,) = ask(hidden, "1+2=", left_to_right=True)
    assert job.documents.tolist() == [0] * 4 + [1] * 10
    assert (job.canvas[8:] == hidden.mask_id).all()


# --- the file -----------------------------------------------------------------------------------


def test_a_line_is_a_prompt_whatever_unicode_calls_a_line_end(pairs, ask):
    lines = ["1\u2028+1=", "1\x0c+2=", "1\x85+3=", "1+4="]
    jobs = ask(pairs(tokenizer="byte"), "\n".join(lines) + "\n\n")
    shown = [bytes(t for t in job.canvas if t < 256).decode() for job in jobs]
    assert shown == lines


def test_what_the_network_does_not_get_is_said_by_line(pairs, ask, caplog):
    dataset = pairs()
    jobs = ask(dataset, "\ufeff1+1=\r\n1?+é=▁\n2+2=\n\x1b?=")
    assert "1 byte order marks dropped, 1 carriage returns dropped." in caplog.text
    assert "prompts.txt:2 has '?' (1), 'é' (1); " in caplog.text
    assert "prompts.txt:4 has '\\x1b' (1), '?' (1)." in caplog.text and ":1 has" not in caplog.text
    assert [dataset.tokenizer.count_unknown(job.canvas) for job in jobs] == [0, 2, 0, 2]
    for content, told in (("1+1=\n2?=", "prompts.txt: Outside the voc"), ("1+1=\n2+2=▁", "")):
        caplog.clear()
        ask(dataset, content)
        assert told in caplog.text and bool(told) == bool(caplog.text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1+1=\n\xff\n", r"prompts\.txt:2: not UTF-8, byte 0xff at offset 5"),
        (b"1+1=\n\n2+2=\n", r"prompts\.txt:2: empty line"),
        (b"\n", r"prompts\.txt: the file is empty"),
    ],
)
def test_files_that_cannot_be_read_are_named(pairs, ask, content, message):
    with pytest.raises(ValueError, match=message):
        ask(pairs(), content)


# --- texts that are written -----------------------------------------------------------------------


def test_logits_that_are_not_finite_are_said_with_the_request(pairs, ask, tmp_path):
    """Not as a token outside the vocabulary."""
    dataset = pairs()
    jobs = ask(dataset, "1+1=\n2+2=\n")

    def generate(_params, _key, canvas, _documents):
        tokens = np.where(canvas == dataset.mask_id, 0, canvas)
        tokens[1, -1] = filters.NOT_FINITE
        return tokens

    where = (files.as_path(tmp_path), 4, None, None)
    message = r"prompts.txt:2, sample 1: the model's logits are not finite; compute in float32"
    with pytest.raises(ValueError, match=message):
        sample.show_samples(dataset, jobs, generate, *where)
    assert not (tmp_path / "samples").exists()


def test_no_text_of_a_model_steers_the_terminal(tmp_path):
    content = (HOSTILE * 30).encode()
    (tmp_path / "corpus.txt").write_bytes(content)
    dataset = data.text(tmp_path / "corpus.txt", 32, tokenizer="byte")
    jobs = sample.make_jobs(dataset, dataset.test, num_samples=1, gap=4, prompts="")
    rows = np.stack([dataset.train[0].tokens, dataset.test[1].tokens])
    drawn = sample.show_samples(dataset, jobs, lambda *_: rows, tmp_path, 3, {}, jax.random.key(0))
    texts = [record["text"] for record in drawn["samples"]]
    assert UNFIT.search(texts[0]) and texts[0].startswith(HOSTILE[:9])
    contents = [pathlib.Path(path).read_bytes().decode() for path in drawn["files"]]
    assert not any(map(UNFIT.search, contents))
    assert [json.loads(line)["text"] for line in contents[0].splitlines()] == texts
    printed = sample.format_samples(drawn["samples"])
    assert not UNFIT.search(printed) and "a\\u001b]0;owned\\u0007\\u009b31m\\u000d" in printed


def test_no_error_steers_the_terminal(capsys):
    main._fail(f"bad.jsonl:3: {HOSTILE}\n  next line")
    shown = capsys.readouterr().err
    assert not UNFIT.search(shown) and "a\\u001b]0;" in shown and shown.endswith("\n  next line\n")
