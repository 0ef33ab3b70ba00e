"""Train, evaluate, sample diffusion models; space steps, measure variance.

  mdm new      text --path=FILE        a config for your data (docs/own_data.md)
  mdm train    --config=quickstart --workdir=runs/mine   (the same line resumes)
  mdm evaluate --workdir=runs/mine     held-out bound, accuracy
  mdm sample   --workdir=runs/mine     or --source=DIR; your own: --prompt="The"
               --infill="A ▁▁5 cat ▁▁" --prompts=FILE --n --length --live --gif
  mdm spacing  --workdir=runs/mine --steps=8,16   search the best sampling grid
  mdm tune-levels --config=digits_gaussian --workdir=runs/t   law, weight, grid
  mdm variance --workdir=runs/mine     of the gradient, by method; --fit: P-POTS
  mdm config   quickstart train        settings: values, meanings, ranges
  mdm report   --workdir=runs/mine     the run so far on a page, report.html
  mdm compile  --config=quickstart --topology=v5e:2x4   memory and time there
  mdm export   --workdir=runs/mine --to=DIR   in the layout of Hugging Face
  mdm chat     --workdir=runs/mine     or --source=DIR: talk, see the unmasking
  mdm eval     --workdir=runs/mine     or --source=DIR: lm-eval, --tasks=a,b
  mdm sweep    --config=quickstart --workdir=runs/seeds   a table over seeds of
               --over="seed=0,1,2;optimizer.peak=1e-2,2e-2"   all combinations

--config is a file or a built-in config: quickstart, text_ar, text_block:16,
text_partition, text_uniform, text_cdcd, table_cdtd, digits_masked, convert,
digits_gaussian, mnist_gaussian, finetune, finetune_pairs, preference, reward.

Settings:   --config.train.steps=2000  --config.variance.order="('stratified',)"
Own model:  --config=finetune --config.model.source=DIR   (docs/hub.md)
Adapters:   --config.adapter.name=lora --config.adapter.rank=16
Devices:    --config.mesh=data=2,fsdp=4,tensor=1
Free where read: --config.evaluate.* sample.* spacing.* measure.* panel.* mesh.*

Flags:
  --workdir: directory of the run, made if missing; --mode: the first word
  --steps=16: sets sample.num_steps, spacing: spacing.steps; also --temperature
  --allow_config_change: go on in a workdir whose run has another config
  export: --parameters=last (else averages) --dtype=bfloat16 --adapter (PEFT)
  --max_tokens, --temperature, --answer_steps, --template: chat, eval
  --restart: start anew in a workdir with a run, whose history is kept beside
  --compilation_cache_dir: of compiled programs, default ~/.cache/mdm_jax
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I: one of
    several processes; found under Slurm and on TPUs (docs/pods.md)
  --verbosity=1: where an error came from; --helpfull: all flags
"""

import re
import sys

from mdm_jax.launch import HELP_FLAG

HELP = __doc__
_CONFIG_FLAG = re.compile("--?config(=|$)")


def run() -> None:
    """Console script ``mdm``, also ``python -m mdm_jax.launch``."""
    status = answer(sys.argv)
    if status is not None:
        sys.exit(status)
    from mdm_jax.launch import main  # loads JAX

    main.run()


def answer(argv: list[str]) -> int | None:
    """Print what needs no JAX, the help; returns the exit status, or None for other commands."""
    if len(argv) == 1:
        first = "\n\n".join(HELP.split("\n\n")[1:3])
        print(f"error: say what to do; mdm --help says more\n\n{first}", file=sys.stderr)
        return 2
    if any(map(HELP_FLAG.fullmatch, argv)) and not any(map(_CONFIG_FLAG.match, argv)):
        print(HELP.rstrip())
        return 0
    return None


if __name__ == "__main__":
    run()
