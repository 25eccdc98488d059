"""``genalign steer``, for launchers that start a script: ``python scripts/steer.py --config FILE``."""

import sys

from genalign.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(["steer", *sys.argv[1:]]))
