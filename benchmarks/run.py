"""The speed of a real operator beside peers and the bare limits of the machine: `make bench`.

The ratios count: in each round all compared services are measured in turn, on the same machine
within the same seconds. Every figure is the median of the rounds, with its minimum and maximum.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
from pathlib import Path

import figures
import measurements
import targets
from figures import Results
from kinds import CORES
from measurements import Bench, Options
from peers import registry


def main() -> None:
    options, out = _options()
    results = Results()
    results.about = {
        "machine": f"{CORES} cores, {platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "rounds": str(options.rounds),
        **(registry.versions() if options.peers else {}),
    }
    for what, value in results.about.items():
        print(f"{what}: {value}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # this also stops the started services
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name in options.only:
            print(f"… {name}", file=sys.stderr)
            with Bench(options, results, Path(folder), out) as bench:
                measurements.MEASUREMENTS[name](bench)
    print("\n" + figures.aligned([figures.HEAD, *results.rows()]))
    print("\n" + figures.aligned([targets.HEAD, *(v.cells for v in targets.verdicts(results))]))


def _options() -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__)
    known = ", ".join(measurements.MEASUREMENTS)
    parser.add_argument("--only", type=_names, help=f"some of: {known}", metavar="NAME[,NAME]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=500, help="jobs in each round")
    parser.add_argument(
        "--peers", action="store_true", help="also measure the peers, which must be installed"
    )
    parser.add_argument("--quick", action="store_true", help="one small round: does it run at all?")
    parser.add_argument("--out", type=Path, help="the file of results; other figures in it stay")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.jobs = 1, 20
    only = given.only or list(measurements.MEASUREMENTS)
    return Options(only, given.rounds, given.jobs, given.peers, given.quick), given.out


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in measurements.MEASUREMENTS:
            raise argparse.ArgumentTypeError(f"there is no {name!r}")
    return names


if __name__ == "__main__":
    main()
