"""Search for the best sample of every prompt: ``scripts/steer.py --config scripts/configs/steer/shapes_prune_partial.yaml``."""

import sys

from genalign.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["steer", *sys.argv[1:]]))
