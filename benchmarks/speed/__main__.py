"""Speed: beside peers, and against batch, length and size.

    python -m benchmarks.speed compare --size tiny [--rounds 5] [--set critic.layers=2] [--json FILE]
    python -m benchmarks.speed compare --size smollm2
    python -m benchmarks.speed scaling

`python -m benchmarks.speed tiny` is short for `compare --size tiny`.
"""

import argparse
import sys

from benchmarks.speed import compare, scaling


def main() -> None:
    """Run one of the two."""
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
    arguments = parser.parse_args(words)
    if arguments.command == "compare":
        compare.compare(arguments)
    else:
        scaling.scaling(arguments)


if __name__ == "__main__":
    main()
