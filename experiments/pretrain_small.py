"""The small pretrained model of the repository, ``experiments/models/small``, trained anew.

  python -m experiments.pretrain_small --novels=../shared/data/english_novels.jsonl.xz --out=DIR

A masked diffusion transformer of 870,000 parameters, from the public-domain novels of the file
(JSON lines with split and text) and the generated conversations of ``experiments.conversations``:
half an hour on a CPU. Everything is a function of --seed, --steps and the file; floating point
makes weights differ a little between machines. It prints its held-out likelihoods and the share of
held-out questions that it answers right; figures of the stored model are in its README.md.
"""

import collections
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import conversations
from mdm_jax import corruption, hub, likelihood, models, objectives, training, variance
from mdm_jax.data.text import read_text
from mdm_jax.data.tokenizers import import_tokenizers
from mdm_jax.hub.tokenizer import HubTokenizer
from mdm_jax.tasks.task import Choices
from mdm_jax.types import Batch

PAD, START, END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
TEMPLATE = (
    "{%- for message in messages %}{%- if not loop.first %}{{- '\\n' }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\\n<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML with the line break between turns, not after them: a row goes on with EOS, which
``<|im_end|>`` is, so that no visible token tells where the answer ends."""

VOCABULARY, LENGTH = 1024, 96
SHAPE = {"width": 128, "depth": 4, "num_heads": 4, "num_kv_heads": 2, "mlp_hidden": 352}
SHARES = {"novel": 0.15, "pair": 0.25}  # of rows; the rest are chats


def train_tokenizer(novels: list[str]) -> Any:
    """Byte-level BPE of :data:`VOCABULARY` ids, each digit a token, special tokens last."""
    t = import_tokenizers()
    model = t.Tokenizer(t.models.BPE())
    split = t.pre_tokenizers
    byte_level = split.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), byte_level])
    model.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        initial_alphabet=split.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    lessons = (
        f"{one.question}\n{one.answer}"
        for number in range(5000)
        for one in (conversations.exchange(n, "train", number) for n in conversations.LESSONS)
    )
    model.train_from_iterator([*lessons, *(text[:100_000] for text in novels)], trainer)
    added = [t.AddedToken(name, special=True, normalized=False) for name in (PAD, START, END, MASK)]
    model.add_special_tokens(added)
    return model


def write_tokenizer(directory: pathlib.Path, tokenizer: Any) -> None:
    """tokenizer.json and tokenizer_config.json."""
    names = {"pad_token": PAD, "eos_token": END, "mask_token": MASK}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": TEMPLATE}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": LENGTH}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    text = json.dumps(settings, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, "utf-8")


class Rows:
    """Rows of the corpus, each a function of (seed, split, number).

    A novel's row is a window, all of which is learned. A chat has as many turns as fit; three in
    ten rows learn all of it, the others the assistant's tokens. A pair is a question and its
    answer without template. After the last answer up to 16 further EOS tokens are learned, then
    padding.
    """

    def __init__(self, codec: HubTokenizer, novels: dict[str, np.ndarray], seed: int):
        self._codec, self._novels, self._seed, self._cache = codec, novels, seed, {}

    def batch(self, split: str, first: int, count: int, kind: str = "") -> Batch:
        rows = [self._row(split, number, kind) for number in range(first, first + count)]
        tokens, eligible, documents = map(np.stack, zip(*rows))
        units = (self._codec.character_counts[tokens] * eligible).sum(1, dtype=np.int32)
        return Batch(tokens, eligible, documents, units)

    def _row(self, split: str, number: int, kind: str) -> tuple[np.ndarray, ...]:
        choices, codec = Choices(f"{self._seed}/{split}/{number}"), self._codec
        share = choices.below(1000) / 1000
        drawn = "novel" if share < SHARES["novel"] else "chat"
        drawn = "pair" if SHARES["novel"] <= share < sum(SHARES.values()) else drawn
        kind = kind or drawn
        if kind == "novel":
            start = choices.below(len(self._novels[split]) - LENGTH)
            whole = np.ones(LENGTH, np.int32)
            return self._novels[split][start : start + LENGTH], whole.astype(bool), whole
        pieces = self._pair(choices) if kind == "pair" else self._chat(choices)
        ids = [i for piece, _ in pieces for i in piece]
        learned = [flag for piece, flag in pieces for _ in piece]
        more = min(choices.below(17), LENGTH - len(ids))
        used = len(ids) + more
        tokens = np.full(LENGTH, codec.pad_id, np.int32)
        tokens[:used] = ids + [codec.eos_id] * more
        eligible, documents = np.zeros(LENGTH, bool), np.zeros(LENGTH, np.int32)
        everything = kind == "chat" and choices.below(10) < 3
        eligible[:used] = np.array(learned + [True] * more) | everything
        documents[:used] = 1
        return tokens, eligible, documents

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self._codec.encode(text, special=True).tolist()
        return self._cache[text]

    def _exchange(self, choices: Choices) -> conversations.Exchange:
        return conversations.LESSONS[choices.one_of(list(conversations.LESSONS))](choices)

    def _pair(self, choices: Choices) -> list[tuple[list[int], bool]]:
        one = self._exchange(choices)
        end = [self._codec.eos_id]
        return [(self._encode(f"{one.question}\n"), False), (self._encode(one.answer) + end, True)]

    def _chat(self, choices: Choices) -> list[tuple[list[int], bool]]:
        pieces: list[tuple[list[int], bool]] = []
        brief = choices.below(8) == 0
        if brief:
            text = f"{START}system\n{conversations.SYSTEM}{END}\n"
            pieces.append((self._encode(text), False))
        size = sum(len(piece) for piece, _ in pieces)
        while True:
            one = self._exchange(choices)
            before = "\n" if size and len(pieces) > brief else ""
            asked = self._encode(f"{before}{START}user\n{one.question}{END}\n{START}assistant\n")
            said = self._encode((one.result if brief else one.answer) + END)
            size += len(asked) + len(said)
            if size > LENGTH:
                return pieces
            pieces += [(asked, False), (said, True)]


def read_novels(path: str, codec: HubTokenizer | None = None) -> dict[str, Any]:
    """Texts by split; as one array of tokens each, if a tokenizer is given."""
    texts = collections.defaultdict(list)
    for line in read_text(path).content.splitlines():
        record = json.loads(line)
        texts[record["split"]].append(record["text"])
    if codec is None:
        return texts
    return {
        split: np.concatenate([codec.encode(text) for text in texts[split]])
        for split in ("train", "valid")
    }


def answered(model: hub.HubModel, number: int = 40) -> Iterator[tuple[str, float, str]]:
    """Lesson, share of held-out questions whose greedy answer holds the result, and one answer."""
    codec = model.tokenizer
    for name in conversations.LESSONS:
        asked = [conversations.exchange(name, "valid", i) for i in range(number)]
        prompts = [
            codec.encode_chat([{"role": "user", "content": one.question}], True).ids
            for one in asked
        ]
        written = hub.generate(model, prompts, 32, steps=32, block_size=32, pad_multiple=64)
        texts = [codec.decode_literally(row[new], True) for row, new in zip(*written[:2])]
        right = [one.result in text for one, text in zip(asked, texts)]
        yield name, float(np.mean(right)), f"{asked[0].question} -> {texts[0]}"


def main(_argv: list[str]) -> None:
    out = pathlib.Path(_OUT.value)
    if out.exists():
        raise app.UsageError(f"{out} exists; name another --out")
    texts = read_novels(_NOVELS.value)
    write_tokenizer(out, train_tokenizer(texts["train"]))
    codec = HubTokenizer.read(out)
    rows = Rows(codec, read_novels(_NOVELS.value, codec), _SEED.value)

    config = models.TransformerConfig(
        codec.vocab_size, mlp="swiglu", qk_norm=True, tie_embeddings=True, **SHAPE
    )
    traits = hub.Traits(
        vocab_size=codec.vocab_size,
        mask_id=codec.mask_id,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
        length=LENGTH,
    )
    described = hub.of_transformer(config, traits)
    network = models.Transformer(config)
    apply_fn = models.readout_apply(network)
    objective = objectives.masked_nelbo(corruption.fixed_count(codec.mask_id))
    chain = variance.chain(variance.stratified(), variance.ppots_slopes())
    spec = objective.spec(_BATCH.value, LENGTH)
    schedule = training.warmup_cosine(2e-2, min(100, _STEPS.value // 2), _STEPS.value, 0.02)
    optimizer = training.muon(schedule, weight_decay=0.01)
    step = training.make_train_step(
        apply_fn, objective, chain, optimizer, spec, seed=_SEED.value, ema_decay=0.995
    )
    step = jax.jit(step, donate_argnums=0, compiler_options=training.compiler_options())
    init = training.linen_init(network, LENGTH)
    params = jax.jit(lambda key: jax.tree.map(jnp.asarray, _unboxed(init(key))))(
        jax.random.key(_SEED.value)
    )
    print(f"{training.num_params(params):,} parameters, {_STEPS.value} steps of {spec}")
    state, started, losses = training.new_state(params, optimizer, chain, spec), time.time(), []
    for number in range(_STEPS.value):
        batch = rows.batch("train", number * _BATCH.value, _BATCH.value)
        state, metrics = step(state, batch)
        losses.append(metrics.loss)
        if (number + 1) % 100 == 0:
            print(
                f"step {number + 1}: {np.mean(jax.device_get(losses[-100:])):.3f} nats per token, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
    params = training.averaged(state)
    measure = likelihood.make_likelihood(apply_fn, codec.mask_id, passes=8, replicates=2)
    for kind in ("novel", "chat", "pair"):
        held_out = [rows.batch("valid", 64 * i, 64, kind) for i in range(4)]
        bound = measure(params, jax.random.key(1), held_out)
        print(f"held-out {kind} rows: {bound.nats_per_token:.3f} nats per token (bound)")
    made = hub.HubModel(**{**vars(described), "params": params})
    partial = out.with_name(f"{out.name}-weights")
    hub.save(partial, made, dtype="bfloat16")
    for path in partial.iterdir():
        path.rename(out / path.name)
    partial.rmdir()
    for name, share, shown in answered(hub.load(out, dtype="float32")):
        print(f"{name}: {share:.2f} right; {shown}")


def _unboxed(params: Any) -> Any:
    import flax.linen as nn

    return nn.meta.unbox(params)


if __name__ == "__main__":
    _NOVELS = flags.DEFINE_string("novels", None, "JSON lines of novels.", required=True)
    _OUT = flags.DEFINE_string("out", None, "New directory of the model.", required=True)
    _STEPS = flags.DEFINE_integer("steps", 3200, "Training steps.", lower_bound=2)
    _BATCH = flags.DEFINE_integer("batch_size", 32, "Rows of a step.", lower_bound=1)
    _SEED = flags.DEFINE_integer("seed", 0, "Of parameters, rows and noise.", lower_bound=0)
    app.run(main)
