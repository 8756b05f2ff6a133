"""Balanced k-means at the size of a 7B model's layer: seconds and inertia, ours and a package's.

    python benchmarks/balanced_kmeans.py
    python benchmarks/balanced_kmeans.py --other PATH/OF/python

The second form measures the package k-means-constrained as well, in the Python of another
environment that has it (it cannot share ours: its ortools pins a protobuf that Ray refuses). Both
make ten iterations from one start; inertia is that of the points about the means of the clusters.
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from analysis.kmeans import balanced_kmeans, balanced_sizes, normalise_rows

MAX_ITERATIONS = 10

# Runs in the other environment, which has nothing of ours.
OTHER = """
import json, sys, time
import numpy as np
from k_means_constrained import KMeansConstrained

points, clusters, seed, iterations = np.load(sys.argv[1]), *map(int, sys.argv[2:5])
smallest, largest = len(points) // clusters, -(-len(points) // clusters)
start = time.perf_counter()
found = KMeansConstrained(
    n_clusters=clusters, size_min=smallest, size_max=largest, n_init=1, max_iter=iterations,
    random_state=seed,
).fit(points)
seconds = time.perf_counter() - start
np.save(sys.argv[5], found.labels_)
print(json.dumps({"seconds": seconds, "num_iterations": int(found.n_iter_)}))
"""


def make_points(kind: str, num_points: int, width: int, num_clusters: int) -> np.ndarray:
    """Unit rows: plain noise, planted clusters of equal size, or directions of unequal weight."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((num_points, width), dtype=np.float32)
    if kind == "gaussian":
        return normalise_rows(noise)
    if kind == "planted":
        centres = random.standard_normal((num_clusters, width), dtype=np.float32)
        return normalise_rows(centres[np.arange(num_points) % num_clusters] + 3 * noise)
    mixed = random.standard_normal((num_points, 64), dtype=np.float32)
    directions = random.standard_normal((64, width), dtype=np.float32)
    lifted = random.random((num_points, 1)) < 0.3
    common = random.standard_normal((1, width), dtype=np.float32)
    return normalise_rows(mixed @ directions / 8 + np.float32(0.7) * noise + 2 * lifted * common)


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the means of the clusters, in float64."""
    total = 0.0
    for label in np.unique(labels):
        members = points[labels == label].astype(np.float64)
        total += float(((members - members.mean(axis=0)) ** 2).sum())
    return total


def measure(points: np.ndarray, args: argparse.Namespace, folder: Path) -> None:
    start, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
    ours = balanced_kmeans(points, args.clusters, seed=args.seed, max_iterations=MAX_ITERATIONS)
    seconds, cpu = time.perf_counter() - start, _cpu(resource.RUSAGE_SELF) - cpu
    _report("ours", seconds, cpu, ours.num_iterations, points, ours.labels)
    if args.other is None:
        return
    np.save(folder / "points.npy", points)
    options = map(str, (args.clusters, args.seed, MAX_ITERATIONS))
    files = str(folder / "points.npy"), *options, str(folder / "labels.npy")
    before = _cpu(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [args.other, "-W", "ignore", "-c", OTHER, *files],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    theirs, labels = json.loads(done.stdout), np.load(folder / "labels.npy")
    cpu = _cpu(resource.RUSAGE_CHILDREN) - before
    _report("k-means-constrained", theirs["seconds"], cpu, theirs["num_iterations"], points, labels)
    ratio = inertia(points, ours.labels) / inertia(points, labels)
    print(f"  time {seconds / theirs['seconds']:.3f} of theirs, inertia {ratio:.5f} of theirs")


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _report(
    name: str, seconds: float, cpu: float, iterations: int, points: np.ndarray, labels: np.ndarray
) -> None:
    sizes = np.bincount(labels)
    print(
        f"  {name:<20}{seconds:8.2f} s {cpu:8.2f} s of processor time, {iterations} iterations, "
        f"sizes {sizes.min()} to {sizes.max()}, inertia {inertia(points, labels):,.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=14_336)
    parser.add_argument("--width", type=int, default=4_096)
    parser.add_argument("--clusters", type=int, default=112)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="gaussian,planted,uneven")
    parser.add_argument("--points", type=Path, help="rows of your own instead, as a .npy file")
    parser.add_argument("--other", help="Python of an environment with k-means-constrained")
    args = parser.parse_args()
    balanced_sizes(args.rows, args.clusters)
    with tempfile.TemporaryDirectory() as folder:
        for kind in [args.points.name] if args.points else args.kinds.split(","):
            points = (
                normalise_rows(np.load(args.points))
                if args.points
                else make_points(kind, args.rows, args.width, args.clusters)
            )
            print(
                f"{kind}: {points.shape[0]:,} x {points.shape[1]:,} into {args.clusters} clusters"
            )
            measure(points, args, Path(folder))


if __name__ == "__main__":
    main()
