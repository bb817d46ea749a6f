"""The speed of an operator on a Ray cluster beside one with the local engine: `make bench-ray`.

Both run at the same time on the same machine, and are measured in turn in each round. The cluster
has one node, on the same machine.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import figures
import one_round
from figures import Results, interleave
from ours import CPU, LOCAL, Cortex, operator

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engines.ray_cluster import cluster

_ENGINES = ("local engine", "Ray engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=500, help="jobs in each round")
    given = parser.parse_args()
    results = Results()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # this also stops what was started

    def measured(cortex: Cortex) -> dict[str, float]:
        few = max(5, given.jobs // 10)
        return {
            "first-line": statistics.median(one_round.first_lines(cortex, few)),
            "end": statistics.median(one_round.times_to_end(cortex, few)),
            "end-to-end": one_round.end_to_end(cortex, given.jobs),
        }

    with tempfile.TemporaryDirectory(prefix="bench-ray-") as folder, cluster(cpus=CPU) as ray:
        root = Path(folder)
        on_ray = ("--engine", "ray", "--ray-address", ray.address, "--ray-node-dir")
        with (
            operator(root / "local", ["noop"], LOCAL) as local,
            operator(root / "ray", ["noop"], (*on_ray, str(root / "nodes"))) as of_ray,
        ):
            subjects = {
                name: lambda cortex=cortex: measured(cortex)
                for name, cortex in zip(_ENGINES, (local, of_ray), strict=True)
            }
            interleave(results, given.rounds, "engine", subjects)
    print(figures.aligned([figures.HEAD[:4], *(row[:4] for row in results.rows())]))
    for figure in results.values:
        ratio = statistics.median(results.ratios(figure, *reversed(_ENGINES)))
        print(f"{figure}: the Ray engine's value is {ratio:.3g} times the local engine's")


if __name__ == "__main__":
    main()
