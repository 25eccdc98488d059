"""Measure a model in the shapes world: ``python scripts/evaluate.py shapes --output runs/evaluation``."""

import sys

from genalign.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
