"""Write the demonstration's held-out scans, and views of them, as a data root for m3d_bench.py.

python benchmarks/make_m3d_data.py training/configs/demo/8_evaluate.json out/m3d-bench/data
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench.demo_data import write_root
from benchmarks.command import at_least, run, say
from training.config import read
from training.evaluate import Settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", type=Path, help="of evaluate.py: the checkpoint, scans and augmentation")
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--views", type=at_least(1, most=1000), default=5, help="of each scan")
    options = parser.parse_args()

    def write() -> int:
        settings = read(Settings, options.configuration)
        size = tuple(json.loads((settings.checkpoint / "config.json").read_text())["image_size"])
        write_root(options.root, settings.held_out, size, settings.fine_grid, settings.augmentation, options.views)
        say(f"{options.root} has {options.views} views of each of {', '.join(settings.held_out)}")
        return 0

    return run(write)


if __name__ == "__main__":
    sys.exit(main())
