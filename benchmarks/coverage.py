"""Count how often the 95 % interval of a mean DSC contains the true mean, by number of cases.

    python3 -m benchmarks.coverage

Draws cohorts of made-up DSCs from a distribution whose mean is known, and bootstraps the interval
of each as brainseg.metrics does. Prints the table of docs/intervals.md.
"""

from __future__ import annotations

import argparse

import numpy as np

from brainseg.metrics import mean_interval

GOOD = (12, 1.6)  # beta distribution of a DSC: mean 0.88, median 0.90
FAILS = 0.1  # share of the cases with a DSC of 0, in the second column


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="+", default=[5, 10, 13, 20, 36, 88])
    parser.add_argument("--cohorts", type=int, default=2000, help="of each size (2000)")
    parser.add_argument("--resamples", type=int, default=2000, help="of each cohort (2000)")
    args = parser.parse_args()
    print("| cases | DSC-like | one in ten fails |\n|---|---|---|")
    for cases in args.cases:
        cells = [f"{coverage(cases, share, args):.2f}" for share in (0, FAILS)]
        print(f"| {cases} | {' | '.join(cells)} |", flush=True)


def coverage(cases: int, failing: float, args: argparse.Namespace) -> float:
    """Return the share of cohorts whose interval holds the true mean."""
    rng = np.random.default_rng(0)
    true_mean = (1 - failing) * GOOD[0] / sum(GOOD)
    holds = 0
    for seed in range(args.cohorts):
        dsc = rng.beta(*GOOD, cases)
        dsc[rng.random(cases) < failing] = 0
        low, high = mean_interval(dsc, np.ones(cases), args.resamples, seed)
        holds += low <= true_mean <= high
    return holds / args.cohorts


if __name__ == "__main__":
    main()
