"""The command ``genalign``. Help, version and misspelt commands are quick: only commands import torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from genalign.cli.error_messages import did_you_mean, shadowed_package

USAGE = """usage: genalign COMMAND ...

  train     --config FILE [--key value ...]       fine-tune a model on a reward
  train     --resume RUN                          resume a run that was interrupted or killed
  plan      --config FILE [--key value ...]       check a configuration, estimate memory and cost; loads no weights
  evaluate  shapes --output DIR [--lora DIR ...]  evaluate a model in the shapes world, or --samples of another program
  evaluate  tones --output DIR [--lora DIR ...]   the same in the tones world
  evaluate  geneval --output DIR --prompts FILE   evaluate on GenEval's prompts, in any number of processes
  evaluate  geneval-images --output DIR --images DIR       images of another program
  evaluate  geneval-original --output DIR --results FILE   an evaluation's images by results of GenEval's own script
  evaluate  geneval-compare --output DIR --against DIR     compare two finished evaluations in pairs
  calibrate --config FILE --output FILE.json       tune the noise level of each sampling step
  compare   FILE                                   train several recipes at equal budget and compare them
  steer     --config FILE [--key value ...]       search for the best sample of each prompt
  prices    --output FILE.json                    measure the cost of NFE, decoding and rewards on this machine
  train-noise-aware --config FILE                 train a reward to score noisy previews
  serve     MODULE:CLASS [--args.key value ...]   serve a reward over HTTP, for rewards.remote.RemoteReward
  reward check MODULE:CLASS --samples SOURCE      test a reward against the reward contract
  export    --run RUN --output DIR                export a run's weights as a LoRA, a merged network or a pipeline
  report    RUN                                   write RUN/report.html
  demo      [shapes | tones] [--output DIR]       train an embedded model in minutes

genalign COMMAND --help lists the settings of a command, genalign --version prints the version, and --debug anywhere
prints the traceback of an error."""

COMMANDS = tuple(dict.fromkeys(line.split()[0] for line in USAGE.splitlines() if line.startswith("  ")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` starts with, by default those of the process, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    words = [word for word in arguments if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"genalign {version('genalign')}")
        return 0
    if words[0] not in COMMANDS:
        similar = did_you_mean(words[0], COMMANDS, ": see --help for all")
        print(f"error: no command {words[0]!r}{similar}", file=sys.stderr)
        return 2
    if message := shadowed_package():
        print(f"error: {message}", file=sys.stderr)
        return 2
    from genalign.cli.main import main as run  # takes seconds

    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
