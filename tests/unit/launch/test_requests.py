"""Requests for samples: places to fill, files, their rows, and how results are shown."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mdm_jax import data, tasks
from mdm_jax.launch.sampling import film, marks, screen
from mdm_jax.launch.sampling import requests as asked
from mdm_jax.launch.sampling.requests import Request, lay_out, make_request, rows_of

pytestmark = pytest.mark.keyless


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Rows of 16 characters of a text without ends."""
    path = tmp_path_factory.mktemp("windows") / "corpus.txt"
    path.write_text("the cat sat on a mat 123\n" * 40)
    return data.text(path, 16)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Texts of 3 to 9 tokens, EOS included, in rows of 12; a function of further settings."""
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    texts = ["ab" * (n % 4 + 1) for n in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return lambda **settings: data.documents(path, 12, fractions=(1, 0, 0), **settings)


def row(dataset, prompt=None, infill=None, length=None, **order):
    """The visible part of a row, ▁ where masked and ␃ for EOS."""
    request = make_request("--here", prompt, infill, length)
    canvas, seen = lay_out(request, rows_of(dataset, **order), np.random.default_rng(0))
    codec, hidden = dataset.tokenizer, canvas[seen == 0]
    assert np.isin(hidden, [codec.pad_id, codec.eos_id]).all()
    named = {dataset.mask_id: "▁", codec.eos_id: "␃", codec.pad_id: "?"}
    return "".join(named.get(int(t)) or codec.decode([t]) for t in canvas[seen > 0])


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "texts", "gaps"),
    [
        ("The ▁▁5 cat ▁▁", ("The ", " cat ", ""), (5, None)),
        ("▁▁", ("", ""), (None,)),
        ("▁▁{2}9▁▁{}1", ("", "9", "1"), (2, None)),
        (r"\▁\▁5 ▁▁12 \n \▁", ("▁▁5 ", r" \n ▁"), (12,)),
        ("a▁▁{x", ("a", "{x"), (None,)),
    ],
)
def test_places_of_a_text(text, texts, gaps):
    request = make_request("--infill", infill=text)
    assert (request.texts, request.gaps, request.kind) == (texts, gaps, "infill")
    assert not request.rest and dict(request.asked) == {"infill": text}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"infill": "a cat"}, "'a cat' has no place to fill; write ▁▁5 for five"),
        ({"infill": r"a \▁▁"}, "malformed place '▁'"),
        ({"infill": "a ▁ cat"}, "malformed place '▁' in 'a ▁ cat'"),
        ({"infill": "a▁▁▁"}, "malformed place '▁'"),
        ({"infill": "▁▁2▁▁"}, "malformed place '▁▁'"),
        ({"infill": "a ▁▁0"}, "malformed place '▁▁0'"),
        ({"infill": "▁▁{1234567}"}, "malformed place '▁▁{1234567}'"),
        ({"prompt": ""}, "the prompt is empty; leave it out"),
        ({"infill": "a▁▁2", "length": 3}, "length=3 is that of places without a number"),
        ({"prompt": "a", "length": 0}, "length must be at least 1"),
    ],
)
def test_requests_that_mean_nothing_are_refused_by_origin(given, message):
    with pytest.raises(ValueError, match=f"^x:7: .*{message.replace('{', '.').replace('}', '.')}"):
        make_request("x:7", **given)


def test_files_of_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ["a\nb", "a ▁▁2", {"prompt": "▁▁", "length": 3}, {"prompt": "q", "infill": "1▁▁"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = asked.read_requests(path, length=4)
    assert [r.prompt for r in found] == ["a\nb", None, "▁▁", "q"]  # a prompt is as it stands
    assert [r.gaps for r in found] == [(), (2,), (), (None,)]
    assert [r.length for r in found] == [4, None, 3, 4]
    assert [r.origin for r in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a record in JSON"),
        ("3", "a line is a text, or an object with prompt, infill or both, got 3"),
        ('{"length": 3}', "an object with prompt, infill or both"),
        ('{"prompt": "a", "temperature": 1}', "unknown field 'temperature'"),
        ('{"prompt": 3}', "prompt must be str, got '3'"),
        ('{"prompt": "a", "length": true}', "length must be int, got 'True'"),
        ('{"prompt": "a", "length": -1}', "length must be at least 1 token, got -1"),
        ('""', "the prompt is empty"),
        ('"a ▁ b"', "malformed place"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n{line}\n', "utf-8")
    with pytest.raises(ValueError, match=f"prompts.jsonl:2: .*{message}"):
        asked.read_requests(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"prompts\.jsonl: the file is empty"):
        asked.read_requests(path)


def test_characters_outside_the_vocabulary_are_named(windows):
    request = make_request("--infill", infill="é cat?? ▁▁")
    with pytest.raises(
        ValueError, match=r"--infill: outside .*: 'é' \(1\), '\?' \(2\); leave them"
    ):
        asked.check_known(request, windows.tokenizer)
    asked.check_known(make_request("--prompt", "the cat"), windows.tokenizer)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompt": "the "}, "the " + 12 * "▁"),
        ({"prompt": "the ", "length": 3}, "the ▁▁▁"),
        ({"infill": "the ▁▁5 sat"}, "the ▁▁▁▁▁ sat"),
        ({"infill": "the ▁▁2 sat▁▁"}, "the ▁▁ sat" + 6 * "▁"),
        ({"infill": "▁▁ sat▁▁"}, 6 * "▁" + " sat" + 6 * "▁"),
        ({"infill": "▁▁ sat▁▁", "length": 2}, "▁▁ sat▁▁"),
        ({"infill": "▁▁ sat ▁▁4"}, 7 * "▁" + " sat ▁▁▁▁"),
        ({"prompt": "the ", "infill": "cat ▁▁1"}, "the cat ▁"),
    ],
)
def test_texts_without_ends_hold_what_is_asked_and_no_more(windows, given, expected):
    assert row(windows, **given) == expected


def test_texts_with_ends_end_where_they_are_said_to(documents):
    hidden = documents()
    assert row(hidden, infill="ab▁▁2b") == "ab▁▁b␃"  # as rows of the data show it
    assert row(hidden, prompt="ab", length=3) == "ab▁▁▁␃"
    assert row(hidden, prompt="abab") in {"abab" + n * "▁" for n in (1, 3, 5)}
    assert row(hidden, infill="abab▁▁b") in {"abab▁" + n * "▁" + "b␃" for n in (0, 2, 4)}
    scored = documents(document_padding="eos_scored")
    assert row(scored, infill="ab▁▁2b") == "ab▁▁b" + 7 * "␃"
    assert row(scored, prompt="ab") == "ab" + 10 * "▁"


def test_answers_stand_where_those_of_the_data_stand():
    options = {"train_rows": 40, "valid_rows": 9, "test_rows": 9}
    add = tasks.task_dataset(tasks.Add(2), **options)
    middle = add.layout.prompt_length
    size = add.layout.answer_length
    assert row(add, prompt="12+34=") == "12+34=" + size * "▁"
    assert row(add, infill="12+34=▁▁") == "12+34=" + size * "▁"
    assert row(add, prompt="1+2=", length=1) == "1+2=▁" + (size - 1) * "␃"
    request = make_request("--here", "1+2=", "3▁▁1")  # the answer, not the prompt, begins with 3
    canvas, _ = lay_out(request, rows_of(add), np.random.default_rng(0))
    assert add.tokenizer.decode(canvas[middle : middle + 1]) == "3"
    countdown = tasks.task_dataset(tasks.Countdown(), **options)
    codec = countdown.tokenizer
    shown = codec.decode(countdown.test[0].tokens[: countdown.layout.prompt_length])
    assert row(countdown, prompt=shown, length=4) == shown + "▁▁▁▁␃"
    with pytest.raises(ValueError, match="--here: rows show where the answer ends"):
        row(countdown, prompt=shown)
    with pytest.raises(ValueError, match="give ▁▁ a number"):
        row(countdown, prompt=shown, infill="▁▁ ▁▁2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": 16 * "a"}, "16 tokens do not fit a row of 16 in which at least one"),
        (
            {"prompt": "aa", "length": 15},
            "2 tokens do not fit a row of 16 with 15 more to generate",
        ),
        ({"infill": "a▁▁16"}, "17 tokens do not fit a row of 16"),
        ({"infill": "▁▁" + 15 * "a" + "▁▁"}, "15 tokens do not fit a row of 16 with 2 more"),
    ],
)
def test_what_does_not_fit_is_refused(windows, given, message):
    with pytest.raises(ValueError, match=f"^--here: {message}.*; change it"):
        row(windows, **given)


def test_a_process_that_writes_from_left_to_right_fills_no_gap_before_text(windows):
    left = {"left_to_right": True, "block_size": 1}
    assert row(windows, prompt="the ", **left) == "the " + 12 * "▁"
    assert row(windows, infill="the ▁▁", **left) == "the " + 12 * "▁"
    with pytest.raises(ValueError, match="autoregressive model writes from left to right.*masked"):
        row(windows, infill="the ▁▁ cat", **left)
    assert row(windows, infill="the ▁▁2 c", block_size=8) == "the ▁▁ c"
    with pytest.raises(ValueError, match="blocks of 8 tokens from left to right, and a gap does"):
        row(windows, infill="the ▁▁2 ca", block_size=8)


def test_lengths_are_drawn_for_each_sample(documents):
    rows, request = rows_of(documents()), Request(prompt="ab", rest=True, origin="x")
    rng = np.random.default_rng(0)
    sizes = [int(lay_out(request, rows, rng)[1].sum()) for _ in range(40)]
    assert {*sizes} == {3, 5, 7, 9}


# --- marks, screen, film --------------------------------------------------------------------------


def test_parts_are_given_and_generated_by_turns():
    codec = data.tokenizers.ByteTokenizer()
    tokens = codec.encode("aé☃b")  # é is two bytes, the snowman three
    made = np.array([0, 1, 1, 1, 0, 0, 1], bool)
    assert marks.parts(codec, tokens, made) == ["a", "é", "☃", "b"]  # the snowman was cut
    assert marks.parts(codec, tokens, np.ones(7, bool)) == ["", "aé☃b"]
    assert marks.parts(codec, tokens, np.zeros(7, bool)) == ["aé☃b"]
    assert marks.marked(["a", "b\x1b", "", "c"], False) == "a⟦b\\u001b⟧⟦c⟧"
    assert marks.marked(["a", "b", "c"], True) == "a\x1b[1;32mb\x1b[0mc"


def test_colours_take_no_cells_and_go_on_in_the_next_line():
    text = "ab" + marks.marked(["", "cdef\ng"], True)
    on, off = "\x1b[1;32m", "\x1b[0m"
    expected = [f"ab{on}cd{off}", f"{on}ef{off}", f"{on}g{off}"]
    assert screen.wrapped(text, 5) == expected
    assert screen.wrapped("字字字", 5) == ["字字", "字"]


def test_off_a_terminal_every_state_is_a_line():
    out = io.StringIO()
    shown = screen.Screen(out)
    for text in ("a▁", "a▁", "a\nb"):
        shown.draw(text)
    shown.clear()
    assert out.getvalue() == "a▁\na⏎b\n"


def test_a_film_of_texts_keeps_its_size_and_ends_on_the_last_frame(tmp_path):
    path = str(tmp_path / "film.gif")
    frames = [[["The ", "▁" * n + "x" * (130 - n), " end\n"]] for n in range(130, -1, -1)]
    film.write_texts(path, film.thinned(frames))
    with Image.open(path) as image:
        assert image.n_frames <= 100
        blue, grey, counts = (0, 114, 178), (196, 196, 196), []
        for n in (0, image.n_frames - 1):
            image.seek(n)
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
            counts.append([int((pixels == colour).all(1).sum()) for colour in (blue, grey)])
        assert image.info["duration"] > 1000  # of the last
    (first_blue, first_grey), (last_blue, last_grey) = counts
    # Edges of black letters are grey too.
    assert first_blue == 0 < last_blue and 5 * last_grey < first_grey
    assert film.thinned(list(range(130)))[::99] == [0, 129]


def test_a_film_of_pictures_is_blue_where_masked(tmp_path):
    path = str(tmp_path / "film.gif")
    frames = np.linspace(0, 1, 2 * 3 * 16).reshape(2, 3, 4, 4)
    frames[0, 0, 0, 0] = np.nan
    film.write_pictures(path, list(frames))
    with Image.open(path) as image:
        assert image.n_frames == 2 and image.width >= 160
        assert image.convert("RGB").getpixel((0, 0)) == (0, 114, 178)
        image.seek(1)
        red, green, blue = image.convert("RGB").getpixel((0, 0))
        assert abs(red - 128) < 4 and red == green == blue


def test_a_film_takes_no_name_that_is_taken(tmp_path):
    (tmp_path / "old.gif").write_text("")
    for name, message in (
        ("old.gif", "exists; name a new file"),
        ("film.png", "ends in .gif"),
        ("none/film.gif", "there is no directory"),
    ):
        with pytest.raises(ValueError, match=f"--gif=.*{message}"):
            film.check_path(str(tmp_path / name))
    film.check_path(str(tmp_path / "new.gif"))
