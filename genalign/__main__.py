"""The command ``genalign``. Help answers at once: torch and the model libraries are imported for a command alone."""

from __future__ import annotations

import sys

USAGE = """usage: genalign COMMAND ...

  train     --config FILE [--key value ...]       fine-tune a model on a reward
  train     --resume RUN                          go on with a run that was interrupted or killed
  plan      --config FILE [--key value ...]       what training would do, hold and refuse; reads no weights
  evaluate  shapes --output DIR [--lora DIR ...]  measure a model in the shapes world, or --samples of another program
  evaluate  tones --output DIR [--lora DIR ...]   the same in the tones world
  evaluate  geneval --output DIR --prompts FILE   measure it on GenEval's prompts; any number of processes
  evaluate  geneval-images --output DIR --images DIR       images that another program made of them
  evaluate  geneval-original --output DIR --results FILE   an evaluation's images by GenEval's own results
  evaluate  geneval-compare --output DIR --against DIR     two finished evaluations, in pairs
  calibrate --config FILE --output FILE.json       find the noise level that each sampling step bears
  compare   FILE                                   train several recipes at equal budget, and set them side by side
  steer     --config FILE [--key value ...]       search for the best sample of every prompt
  prices    --output FILE.json                    measure what forwards, decodes and rewards cost here
  train-noise-aware --config FILE                 teach a reward to score previews
  serve     MODULE:CLASS [--args.key value ...]   a reward behind HTTP, for rewards.remote.remote_reward.RemoteReward
  reward check MODULE:CLASS [--args.key value ...]   whether a reward keeps to what every reward must
  export    --run RUN --output DIR                write what a run trained as a LoRA, a network or a pipeline
  report    RUN                                   write RUN/report.html
  demo      [shapes | tones] [--output DIR]       watch an embedded model learn, in minutes

genalign COMMAND --help lists the settings of a command."""


def main() -> int:
    """Run the command that the process was given; its exit status."""
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return 0
    from genalign.cli.main import main as run  # takes seconds

    return run(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
