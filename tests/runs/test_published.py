"""Data of the published benchmarks from made-up files, and their configs on these."""

import io
import json
import lzma
import os
import tarfile
import zipfile

import launching
import numpy as np
import pytest

from experiments.configs.benchmarks import lm1b, openwebtext, sudoku9, text8
from experiments.prepare import __main__ as prepare
from experiments.prepare import corpora, puzzles
from experiments.published import curves, gpu_time, held_out
from mdm_jax import data, files, plots, tasks
from mdm_jax.launch import build, presets
from mdm_jax.launch.workdir import saved_config

TEXT = "the cat sat on a mat and saw two dogs run by the old red barn"
WORDS = TEXT.split()
SENTENCES = [" ".join(WORDS[i % 9 : i % 9 + 4 + i % 5]) + " ." for i in range(60)]


def run(*arguments):
    return prepare.main([str(argument) for argument in arguments])


def test_any_text_in_the_letters_of_text8():
    assert corpora.to_letters("It's 1984,\n and Zoë!") == ("it s one nine eight four and zo ")
    assert corpora.to_letters("a  b--c") == "a b c"


def test_pictures_of_an_archive_are_read_as_mnist_is(tmp_path, capsys):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    arrays = {"train_images": np.concatenate([images] * 4), "train_labels": np.arange(8) % 3}
    arrays |= {"test_images": images + 100, "test_labels": np.array([2, 0])}
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    (tmp_path / "small.npz.xz").write_bytes(lzma.compress(packed.getvalue()))
    np.savez(tmp_path / "odd.npz", train_images=images)
    line = ("pictures", f"--source={tmp_path}/small.npz.xz", f"--to={tmp_path}/data/my_digits")
    assert run(*line) == 0
    assert "pictures: 8 train, 2 test; read by --config.data.name" in capsys.readouterr().out
    config = presets.mnist_gaussian("smoke")
    config.data.update(name="my_digits", data_dir=str(tmp_path / "data"))
    config.data.splits = ("train[:6]", "train[6:]", "test")
    built = build.dataset(config)
    assert (built.event_shape, built.num_classes, len(built.valid)) == ((4, 4), 3, 2)
    for row, image, label in zip(built.test, images + 100, (2, 0), strict=True):
        np.testing.assert_array_equal(row.tokens, image.ravel())
        assert set(row.documents) == {2 + label}
    assert run(*line) == 1 and "exists; remove it" in capsys.readouterr().err
    assert run("pictures", f"--source={tmp_path}/odd.npz", f"--to={tmp_path}/b") == 1
    assert "needs train_images and train_labels" in capsys.readouterr().err
    assert run("pictures", f"--source={tmp_path}/small.npz.xz", f"--to={tmp_path}/B-c") == 1
    assert "must end with a name of letters, digits and _" in capsys.readouterr().err


def test_text8_is_itself_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "TEXT8_CHARACTERS", 400)
    text = (" ".join(WORDS) * 10)[:400]
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", text)
    (tmp_path / "text8").write_text(text)
    for source in ("text8.zip", "text8"):
        assert corpora.text8(tmp_path / source) == text
    assert run("text8", f"--source={tmp_path}/text8.zip", f"--to={tmp_path}/a/text8.txt") == 0
    assert (tmp_path / "a/text8.txt").read_text() == text
    assert run("text8", f"--source={tmp_path}/text8", f"--to={tmp_path}/a/text8.txt") == 1
    (tmp_path / "other").write_text(text[:-1])
    for source, message in (
        ("other", "400 characters from a to z and space, this file has 399"),
        ("missing", "missing: no such file .* download text8.zip .*mattmahoney.net.*its path"),
    ):
        with pytest.raises(ValueError, match=message):
            corpora.text8(tmp_path / source)
    assert "exists; remove it" in capsys.readouterr().err
    config = text8.get_config()
    config.data.update(path=str(tmp_path / "a/text8.txt"), length=16)
    built = build.dataset(config)  # 90 %, 5 % and 5 % of the characters
    assert [built.report[f"{split}_characters"] for split in data.datasets.SPLITS] == [360, 20, 20]
    assert built.vocab_size == len(set(text)) + 4


def test_letters_of_texts_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("One!\nTwo")
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "3 More."}\n{"text": "x"}\n'))
    out = tmp_path / "letters.txt"
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl.xz"]
    assert run("letters", "--source", *sources, f"--to={out}") == 0
    assert out.read_text() == "one two three more x"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small copies of LM1B and OpenWebText as they are unpacked, prepared; and tokenizers."""
    root = tmp_path_factory.mktemp("corpora")
    shards = root / "lm1b/training-monolingual.tokenized.shuffled"
    held_out = root / "lm1b/heldout-monolingual.tokenized.shuffled"
    names = {shards: "news.en-{:05d}-of-00100", held_out: "news.en.heldout-{:05d}-of-00050"}
    for folder, name in names.items():
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / name.format(number)).write_text("\n".join(SENTENCES[number::3]) + "\n")
    (root / "owt").mkdir()
    for number in range(2):
        with tarfile.open(root / f"owt/urlsf_subset0{number}_data.xz", "w:xz") as archive:
            for document, text in enumerate(SENTENCES[number::2]):
                member = tarfile.TarInfo(f"{document}.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora.openwebtext, "__defaults__", (12,))
        for name in ("lm1b", "openwebtext"):
            source = root / {"lm1b": "lm1b", "openwebtext": "owt"}[name]
            assert run(name, f"--source={source}", f"--to={root}/prepared/{name}") == 0
    write_tokenizers(root)
    return root


def write_tokenizers(root):
    """Files as those of bert-base-uncased and gpt2, with few tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *dict.fromkeys(WORDS)]
    bert = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    )
    bert.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    bert.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    bert.decoder = tokenizers.decoders.WordPiece()
    bert.add_special_tokens(names[:5])
    gpt2 = tokenizers.Tokenizer(tokenizers.models.BPE())
    gpt2.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, show_progress=False
    )
    gpt2.train_from_iterator(SENTENCES, trainer)
    gpt2.add_special_tokens(["<|endoftext|>"])
    special = {"pad_token": "[PAD]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    for name, model, settings in (
        ("bert", bert, special | {"eos_token": "[SEP]"}),
        ("gpt2", gpt2, {"eos_token": "<|endoftext|>"}),
    ):
        (root / name).mkdir()
        model.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps(settings))


def on(folders, config, name, tokenizer):
    prepared = folders / "prepared" / name
    config.data.update(path=str(prepared / "train.jsonl"), tokenizer=str(folders / tokenizer))
    config.data.valid_path = str(prepared / "valid.jsonl")
    config.data.test_path = str(prepared / ("test" if name == "lm1b" else "valid")) + ".jsonl"
    return config


def texts(folders, name, split):
    lines = (folders / "prepared" / name / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_shards_of_lm1b_go_to_their_splits(folders):
    assert sorted(texts(folders, "lm1b", "train")) == sorted(SENTENCES)
    assert texts(folders, "lm1b", "valid") == SENTENCES[::3]
    assert texts(folders, "lm1b", "test") == SENTENCES[1::3] + SENTENCES[2::3]
    with pytest.raises(ValueError, match="no files news.en.*1-billion-word"):
        list(corpora.lm1b(folders / "owt"))


def test_the_last_documents_of_openwebtext_are_held_out(folders, tmp_path):
    order = SENTENCES[::2] + SENTENCES[1::2]
    assert texts(folders, "openwebtext", "train") == order[:-12]
    assert texts(folders, "openwebtext", "valid") == order[-12:]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in order)
    (tmp_path / "a.jsonl").write_text(lines)
    assert [text for _, text in corpora.openwebtext(tmp_path, 12)] == order
    (tmp_path / "a.jsonl").unlink()
    for folder, message in (
        (tmp_path, "give a folder with"),
        (tmp_path / "b", "download a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            list(corpora.openwebtext(folder))


def test_a_sentence_of_lm1b_has_a_row_or_goes_on(folders):
    config = on(folders, lm1b.get_config(), "lm1b", "bert")
    config.data.update(length=16, cache="")
    apart = build.dataset(config)
    assert len(apart.test) == 40 and apart.mask_id == 4 and apart.tokenizer.eos_id == 3
    row = apart.test[0]
    count = len(SENTENCES[1].split()) + 1
    assert row.eligible.sum() == count and row.documents.sum() == count
    config = on(folders, lm1b.get_config("wrapped"), "lm1b", "bert")
    config.data.update(length=16, cache="")
    wrapped = build.dataset(config)
    rows = data.gather(wrapped.test, np.arange(len(wrapped.test)))
    total = sum(len(text.split()) + 1 for text in texts(folders, "lm1b", "test"))
    assert rows.eligible.sum() == total and len(wrapped.test) == -(-total // 16)


def test_documents_of_openwebtext_follow_one_another(folders):
    config = on(folders, openwebtext.get_config(), "openwebtext", "gpt2")
    config.data.update(length=16, cache=str(folders / "cache"))
    built = build.dataset(config)
    rows = data.gather(built.train, np.arange(len(built.train)))
    assert (rows.documents[:-1] == 1).all() and built.mask_id == built.vocab_size - 1
    text = built.tokenizer.decode(rows.tokens.reshape(-1))
    assert text.rstrip("␃").split("␃") == texts(folders, "openwebtext", "train")


def test_puzzles_of_files_are_problems_of_the_task(tmp_path, capsys):
    task = tasks.Sudoku(3, 3, (30, 54))
    pairs = [tuple(tasks.example(task, "train", i)) for i in range(6)]
    csv = "\n".join(["quizzes,solutions", *map(",".join, pairs)])
    bank = "\n".join(f"{p.replace('0', '.')} {a} 7.2" for p, a in pairs)
    (tmp_path / "million.csv").write_text(csv)
    (tmp_path / "bank.txt.xz").write_bytes(lzma.compress(bank.encode()))
    for name in ("million.csv", "bank.txt.xz"):
        assert list(puzzles.sudoku(tmp_path / name)) == pairs
    out = tmp_path / "pairs.jsonl"
    assert run("sudoku", f"--source={tmp_path}/million.csv", f"--to={out}") == 0
    config = sudoku9.get_config("file")
    config.data.update(path=str(out), fractions=(0.5, 0.25, 0.25))
    assert build.dataset(config).check(*pairs[0])
    (tmp_path / "wrong.csv").write_text(csv.replace(pairs[3][1], pairs[2][1]))
    assert run("sudoku", f"--source={tmp_path}/wrong.csv", f"--to={tmp_path}/x.jsonl") == 1
    assert "wrong.csv:5: the solution is not one of the puzzle" in capsys.readouterr().err
    (tmp_path / "wrong.csv").write_text(csv + "\n123,456")
    with pytest.raises(ValueError, match=r"wrong.csv:8: no puzzle and solution of 81 digits"):
        list(puzzles.sudoku(tmp_path / "wrong.csv"))


@pytest.mark.parametrize("module", [lm1b, openwebtext])
def test_settings_of_tfds_are_read(module, folders, monkeypatch):
    def opened(name, splits, *_):
        raise RuntimeError(f"{name} has {len(splits)} splits")

    monkeypatch.setattr("mdm_jax.data.tfds_source._open", opened)
    config = module.get_config("tfds")
    config.data.tokenizer = str(folders / "gpt2")
    with pytest.raises(RuntimeError, match=f"{config.data.name} has 3 splits"):
        build.dataset(config)


def test_operations_of_a_run_by_hand():
    """Of a block of width 4: 12 x 16 weights; 3 steps of 2 rows of 5 tokens, 7 ids."""
    config = text8.get_config("smoke")
    config.model.update(width=4, depth=1)
    config.train.update(steps=3, batch_size=2)
    found = gpu_time.estimate(config, length=5, vocab_size=7)
    each = 6 * 192 + 12 * 5 * 4 + 6 * 4 * 7 / 2
    assert found[:3] == (192, 30, 30 * each)
    assert found.seconds == pytest.approx(30 * each / (0.1 * 989e12))
    config.process = "block"  # twice the tokens, half of them without logits
    assert gpu_time.estimate(config, 5, 7).operations == 30 * (2 * each - 6 * 4 * 7 / 2)


def test_the_page_has_the_estimates(capsys):
    gpu_time.main()
    page = (launching.ROOT / "docs/benchmarks.md").read_text("utf-8")
    for line in capsys.readouterr().out.splitlines()[1:]:
        name, weights, steps, _, _, operations, *_ = line.split()
        name = name.replace(":", ".py:") if ":" in name else f"{name}.py"
        (row,) = [row for row in page.splitlines() if row.startswith(f"| `{name}` ")]
        for cell in (f"{weights[:-1]} M", steps, operations.replace("e+", "e")):
            assert f" {cell} |" in row


@pytest.mark.slow
def test_problems_made_ahead_are_those_of_the_config(tmp_path):
    config = launching.ROOT / "experiments/configs/benchmarks/zebra.py"
    out = tmp_path / "zebra.jsonl"
    assert run("generate", f"--config={config}:smoke", "--split=test", f"--to={out}") == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    task = tasks.Zebra(houses=(3, 6), attributes=(3, 6))
    for index, pair in enumerate(found):
        assert tasks.example(task, "test", index) == (pair["prompt"], pair["answer"])
    assert len(found) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text8", "lm1b", "openwebtext", "sudoku9", "countdown4", "zebra"])
def test_a_smoke_run_of_each_config(name, folders, tmp_path, monkeypatch, capsys):
    """Trained, evaluated and reported; paths are those of the headers, below another folder."""
    os.makedirs(tmp_path / "data", exist_ok=True)
    (tmp_path / "data/text8.txt").write_text(" ".join(WORDS * 60))
    paths = {"text8": [f"--config.data.path={tmp_path}/data/text8.txt"]}
    for corpus, tokenizer in (("lm1b", "bert"), ("openwebtext", "gpt2")):
        config = on(folders, lm1b.get_config("smoke"), corpus, tokenizer)
        keys = ("path", "valid_path", "test_path", "tokenizer")
        paths[corpus] = [f"--config.data.{key}={config.data[key]}" for key in keys]
    file = launching.ROOT / f"experiments/configs/benchmarks/{name}.py:smoke"
    code, out, err = launching.call(
        *(monkeypatch, capsys, f"--config={file}", f"--workdir={tmp_path}/run"),
        *paths.get(name, ()),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert 0 < record["bits_per_unit"] < 20
    assert ("accuracy" in record) == (name in ("sudoku9", "countdown4", "zebra"))
    result = curves.kept(tmp_path / "run", cpu_seconds=60.0)
    assert [r["step"] for r in result["curves"] if r["kind"] == "evaluate"] == [2, 4]
    assert result["final"]["bits_per_unit"] == record["bits_per_unit"]
    if name in ("text8", "sudoku9"):
        assert curves.draw(plots.new_figure((4, 3)).add_subplot(), name, result).get_title("left")
        _measure_on_a_file(name, tmp_path, record)


def _measure_on_a_file(name, folder, record):
    """The problems or the text that the run was tested on, from a file: the same bound."""
    path = folder / "held_out"
    if name == "sudoku9":
        task = tasks.Sudoku(3, 3, (30, 54))
        pairs = (tasks.example(task, "test", i) for i in range(16))
        puzzles.write_pairs(map(tuple, pairs), path.with_suffix(".jsonl"))
        path = path.with_suffix(".jsonl")
    else:
        path.write_text(" ".join(WORDS * 60))
    config = held_out.on_file(saved_config(folder / "run"), str(folder / "run"), str(path))
    found = held_out.measure(config, files.as_path(folder / "run"))
    if name == "sudoku9":
        assert found["bits_per_unit"] == pytest.approx(record["bits_per_unit"], rel=1e-5)
        assert found["accuracy"] == record["accuracy"] and found["answers"] == 8
    else:
        assert abs(found["bits_per_unit"] - record["bits_per_unit"]) < 1 and found["step"] == 4
