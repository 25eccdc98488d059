"""Fine-tune a model on a reward: ``python scripts/train.py --config scripts/configs/train/shapes_flow_grpo_partial.yaml``."""

import sys

from genalign.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
