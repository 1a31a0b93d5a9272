#!/usr/bin/env python3
"""Compare the methods on one small task: same start, same number of generated tokens, several seeds.

    python tools/compare.py [--seeds 1 2 3] [--methods grpo cure] [--out runs/compare] [--page examples/compare]

For each seed it makes data and a random model (`examples/make_compare.py`), trains the model by SFT and by CurioSFT,
and from there by every RL method. Each run is a `megatron-entropy train` with settings from
`examples/compare/compare.toml`. An RL run ends when it has generated `--tokens` tokens for training, whether the method
trains on them, drops them or branches from them. Complete runs are kept, so the tool can be stopped and started again.

The page (`README.md` with plots and `results.json`) is built from the files of the runs, also when runs are missing;
`--page-only` builds it without running anything.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from compare_page import write_page
from compare_runs import SETTINGS, VARIANTS, Curve, Run, run_all

from megatron_entropy.config import load
from megatron_entropy.methods import load_method_config


def main() -> int:
    """Make the missing runs, write the page; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--tokens", type=int, default=240_000, help="generated for training by each RL run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=SETTINGS.parent, help="folder of the page")
    parser.add_argument("--page-only", action="store_true", help="build the page without running anything")
    args = parser.parse_args()
    stages = {config.name: config for config in load.load(SETTINGS, [], load_method_config)}
    wanted = {*args.methods, *(variant.start for variant in VARIANTS if variant.name in args.methods)}
    variants = [variant for variant in VARIANTS if variant.name in wanted]
    variants.sort(key=lambda variant: variant.start is not None)
    runs = [
        Run(variant, seed, args.out, tuple(stages[name] for name in variant.stages), args.tokens)
        for seed in args.seeds
        for variant in variants
    ]
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)  # of each rank of a run
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = [] if args.page_only else run_all(runs, args.jobs)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    curves: dict[str, dict[int, Curve]] = {}
    for run in sorted(runs, key=lambda run: VARIANTS.index(run.variant)):
        if run.is_complete:
            curves.setdefault(run.variant.name, {})[run.seed] = Curve.of_run(run.folder)
    if curves:
        options = " ".join(argument for argument in sys.argv[1:] if argument != "--page-only")
        write_page(args.page, curves, args.tokens, f"python tools/compare.py {options}".strip())
        print(args.page / "README.md")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
