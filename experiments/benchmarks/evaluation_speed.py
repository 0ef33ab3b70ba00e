"""Requests answered per second, beside the loops of LLaDA's and dllm's harness over transformers.

python -m experiments.benchmarks.evaluation_speed --torch_packages=VENV/lib/python3.11/site-packages

where torch and transformers are installed in that place, or without the flag if they are here. One
core, float32, a random Qwen3 model read as a bidirectional one by both, M shape (width 256, 6
layers, rows of up to 128 tokens, vocabulary 32768). Ours goes through ``evaluation.answering``, as
``mdm eval`` does: text in, text out. Theirs gets token ids, and is

* likelihood: a request at a time, ``--evaluation_passes`` random masks of its answer in batches of
  8, logits of all positions, the cross-entropy of masked ones (as in ``eval_llada.py``);
* generation: a request at a time, a pass over the whole row for each new token, logits, softmax and
  argmax of all positions, the surest masked position of the block is filled (``generate.py``).

Calls take turns until ``--evaluation_seconds`` have passed, twice at least. Figures are requests
over processor seconds, medians with quartiles. A random model writes no EOS: no row ends early.
"""

import functools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

_PACKAGES = flags.DEFINE_string("torch_packages", None, "Site-packages with torch, transformers.")
_REQUESTS = flags.DEFINE_integer(
    "evaluation_requests", 16, "Likelihoods; half as many to generate.", lower_bound=2
)
_PASSES = flags.DEFINE_integer("evaluation_passes", 8, "Of a likelihood; a multiple of 8.", 8)
_SECONDS = flags.DEFINE_float("evaluation_seconds", 30.0, "Rounds go on so long.")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MASK, BATCH, NEW, BLOCK = CONFIG["vocab_size"] - 1, 8, 32, 16
CHARACTERS = "".join(chr(0x4E00 + i) for i in range(MASK - 3))
"""One a token; unknown, padding, EOS and the mask token come behind them."""


class Request(NamedTuple):
    """Token ids of a prompt and of the answer to score."""

    prompt: np.ndarray
    answer: np.ndarray


def requests() -> list[Request]:
    """Prompts of 64 to 96 tokens, answers of 16 to 32."""
    rng, made = np.random.default_rng(1), []
    for _ in range(_REQUESTS.value):
        sizes = rng.integers(64, 97), rng.integers(16, 33)
        made.append(Request(*(rng.integers(0, len(CHARACTERS), size) for size in sizes)))
    return made


def ours(directory: str, asked: Sequence[Request]) -> dict[str, Callable[[], Any]]:
    """Calls by name; each returns its answers."""
    from mdm_jax import hub
    from mdm_jax.data.tokenizers import CharTokenizer
    from mdm_jax.evaluation.answering import Answerer
    from mdm_jax.evaluation.model import EvaluatedModel
    from mdm_jax.evaluation.settings import Settings

    model = hub.bidirectional(hub.load(directory, dtype="float32"))
    codec = CharTokenizer(CHARACTERS)
    subject = EvaluatedModel(model, codec)
    texts = [(codec.decode(one.prompt), codec.decode(one.answer)) for one in asked]
    prompts = [(text, {}) for text, _ in texts[: len(asked) // 2]]

    def likelihoods() -> list[dict[str, Any]]:
        settings = Settings(passes=_PASSES.value // 2, replicates=2, exact_up_to=0, rows=BATCH)
        return Answerer(subject, settings).likelihoods(texts)

    def continuations(**options: Any) -> list[dict[str, Any]]:
        settings = Settings(rule="llada", block_size=BLOCK, rows=BATCH, max_tokens=NEW, **options)
        return Answerer(subject, settings).continuations(prompts)

    cached = functools.partial(continuations, approximation="dual")
    return {
        "likelihood": likelihoods,
        "generation": continuations,
        "generation over an approximate dual cache": cached,
    }


def theirs(directory: str, asked: Sequence[Request]) -> dict[str, Callable[[], Any]]:
    """The loops, by the same names."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()

    def logits(rows: Any) -> Any:
        """Both ways: nothing is hidden."""
        size = rows.shape[1]
        nothing = torch.zeros(1, 1, size, size).expand(len(rows), 1, size, size)
        return model(rows, attention_mask=nothing, use_cache=False).logits

    @torch.inference_mode()
    def likelihoods() -> list[np.ndarray]:
        draws, found = torch.Generator().manual_seed(0), []
        for prompt, answer in asked:
            row = torch.tensor(np.concatenate([prompt, answer]))
            start, size, values = len(prompt), len(answer), []
            for _ in range(_PASSES.value // BATCH):
                count = torch.randint(1, size + 1, (BATCH,), generator=draws)
                ranks = torch.rand(BATCH, size, generator=draws).argsort(-1).argsort(-1)
                masked = torch.zeros(BATCH, len(row), dtype=torch.bool)
                masked[:, start:] = ranks < count[:, None]
                rows = row.expand(BATCH, -1)
                out = logits(torch.where(masked, MASK, rows))
                nats = torch.nn.functional.cross_entropy(
                    out[masked], rows[masked], reduction="none"
                )
                weight = (size / count)[:, None].expand(masked.shape)[masked]
                own = torch.zeros(masked.shape)
                own[masked] = nats * weight
                values.append(own.sum(-1).numpy())
            found.append(-np.concatenate(values))
        return found

    @torch.inference_mode()
    def continuations() -> list[np.ndarray]:
        found = []
        for prompt, _ in asked[: len(asked) // 2]:
            row = torch.cat([torch.tensor(prompt), torch.full((NEW,), MASK)])[None]
            for start in range(len(prompt), len(prompt) + NEW, BLOCK):
                for _ in range(BLOCK):
                    out = logits(row)
                    best = out.argmax(dim=-1)
                    sure = torch.softmax(out, dim=-1).gather(-1, best[..., None])[0, :, 0]
                    sure[row[0] != MASK] = -torch.inf
                    sure[start + BLOCK :] = -torch.inf
                    place = sure.argmax()
                    row[0, place] = best[0, place]
            found.append(row[0, len(prompt) :].numpy())
        return found

    return {"likelihood": likelihoods, "generation": continuations}


def interleaved(calls: dict, seconds: float) -> tuple[dict, dict]:
    """Processor seconds of calls that take turns, and their last results."""
    times, results, began = {name: [] for name in calls}, {}, time.monotonic()
    while time.monotonic() < began + seconds or len(times[next(iter(calls))]) < 2:
        for name, call in calls.items():
            start = time.process_time()
            results[name] = call()
            times[name].append(time.process_time() - start)
            print(*name, f"{times[name][-1]:.2f} s", flush=True)
    return times, results


def main(_: list[str]) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before libraries start threads
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    )
    if _PACKAGES.value:
        sys.path.append(_PACKAGES.value)  # behind our own
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"not measured: {error}; name the site-packages that have it with --torch_packages")
        return
    from experiments.benchmarks import command, machine
    from experiments.benchmarks.hub_load import make
    from mdm_jax.data.tokenizers import CharTokenizer

    print(machine.describe(machine.facts()))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one core\n")
    asked = requests()
    with tempfile.TemporaryDirectory() as name:
        make(pathlib.Path(name), CONFIG, "float32")
        own, other = ours(name, asked), theirs(name, asked)
        for call in own.values():
            call()  # compiles
        calls = {(call, "ours"): own[call] for call in own}
        calls |= {(call, "theirs"): other[call] for call in other}
        times, results = interleaved(calls, _SECONDS.value)
    nats = [answer["log_likelihood"] for answer in results["likelihood", "ours"]]
    errors = [answer["standard_error"] for answer in results["likelihood", "ours"]]
    apart = np.subtract(nats, [np.mean(draws) for draws in results["likelihood", "theirs"]])
    print(
        f"log-likelihoods: ours minus theirs {apart.mean():+.3f} on average, of {np.mean(nats):.1f}"
    )
    print(f"their mean Monte Carlo error here: {np.mean(errors):.3f}")
    rows, codec = [], CharTokenizer(CHARACTERS)
    for call in own:
        reference = "generation" if call.startswith("generation") else call
        rates = [
            [len(results[name, side]) / t for t in times[name, side]]
            for name, side in ((call, "ours"), (reference, "theirs"))
        ]
        same = "-"
        if reference == "generation":
            pairs = zip(results[call, "ours"], results[reference, "theirs"])
            same = np.mean([codec.encode(one["text"]) == other for one, other in pairs])
            same = f"{same:.3f}"
        speed = command.spread(command.ratios(*rates))
        figures = [command.spread(command.summary(rate), 2) for rate in rates]
        rows.append((call, *figures, speed, same))
    header = ("requests a second", "mdm_jax", "loop over transformers", "speed", "tokens alike")
    print()
    print("\n".join(command.markdown(header, rows)))


if __name__ == "__main__":
    app.run(main)
