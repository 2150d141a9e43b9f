"""Speed: beside peers, against batch, length and size, and on a GPU.

    python -m benchmarks.speed compare --size tiny [--rounds 5] [--set critic.layers=2] [--json FILE]
    python -m benchmarks.speed compare --size smollm2
    python -m benchmarks.speed scaling
    python -m benchmarks.speed gpu [--parts peaks generate update step] [--json FILE]

`python -m benchmarks.speed tiny` is short for `compare --size tiny`.
"""

import argparse
import sys

from benchmarks.speed import compare, gpu, scaling


def main() -> None:
    """Run one of the three."""
    words = sys.argv[1:]
    if words and words[0] in ("tiny", "smollm2"):
        words = ["compare", "--size", *words]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare.add_arguments(commands.add_parser("compare", help="training steps beside TRL and generate"))
    scaling.add_arguments(commands.add_parser("scaling", help="tokens a second with rooflines"))
    gpu.add_arguments(commands.add_parser("gpu", help="sampling, updates and steps on a GPU"))
    arguments = parser.parse_args(words)
    run = {"compare": compare.compare, "scaling": scaling.scaling, "gpu": gpu.gpu}
    run[arguments.command](arguments)


if __name__ == "__main__":
    main()
