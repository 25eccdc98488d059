"""``genalign train``, for launchers that start a script: ``torchrun scripts/train.py --config FILE``."""

import sys

from genalign.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
