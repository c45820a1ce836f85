"""The command `python -m data.phantom NAME FOLDER` makes a synthetic data set."""

import argparse
import sys
from pathlib import Path

from data.files import DataError
from data.phantom import SETS, make, usual_numbers


def main():
    """Read the command line and make the set -> exit status, 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m data.phantom",
                                     description="Make a synthetic data set.")
    parser.add_argument("name", choices=SETS, help="which set")
    parser.add_argument("folder", type=Path, help="where to; must not exist")
    parser.add_argument("--subjects", type=int,
                        help="how many (default 24; neuro 40; cxr 600 to train on in each of its "
                             "three sets)")
    parser.add_argument("--size", type=int, default=64,
                        help="pixels a side of a slice (default 64)")
    parser.add_argument("--slices", type=int,
                        help="slices per subject (default 12; neuro 16; cxr 1)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed makes other subjects (default 0)")
    options = parser.parse_args()
    try:
        make(**vars(options))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    subjects = usual_numbers(options.name)[0] if options.subjects is None else options.subjects
    print(f"{options.folder}: {subjects} synthetic subjects ({options.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
