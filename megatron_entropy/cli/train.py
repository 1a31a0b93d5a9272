"""`megatron-entropy train`: train as a TOML file describes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_entropy.cli.arguments import Subparsers, positive_float, positive_int
from megatron_entropy.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_entropy.launch.prepare import RunSpec


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train as a TOML file describes",
        description="Train as a TOML file describes, on as many ranks of this machine as its layout needs. The keys of "
        "a second file win over those of the first. Every key can be overridden: --actor.parallel.tp=2 for all stages, "
        "--stages.NAME.steps=10 for one, --data.train=a.jsonl,b.jsonl for a list.",
        usage="megatron-entropy train CONFIG [CONFIG ...] [--resume | --overwrite] [--dry-run] "
        "[--nnodes=N --rdzv-endpoint=HOST:PORT [--rdzv-id=ID]] [--KEY.PATH=VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="TOML file")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the run folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print settings and plan, then exit")
    several = parser.add_argument_group("several machines", "The same command on every node, see docs/multi_node.md.")
    several.add_argument("--nnodes", metavar="N", type=positive_int, default=1, help="number of nodes")
    several.add_argument("--rdzv-endpoint", metavar="HOST:PORT", default="", help="of the first node; port 29400")
    several.add_argument("--rdzv-id", metavar="ID", default="", help="keeps nodes of different runs apart")
    several.add_argument(
        "--join-timeout", metavar="SECONDS", type=positive_float, default=600.0, help="to wait for the last node; 600"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the run and start its ranks, or be one of them under torchrun."""
    from megatron_entropy.config import check
    from megatron_entropy.launch import preflight, prepare, rank, torchrun

    flags = {"resume": args.resume, "overwrite": args.overwrite}
    configs, overrides = _split(args)
    if rank.is_rank():
        rank.end_process(rank.run_rank(configs, overrides, **flags, dry_run=args.dry_run))
    if args.nnodes > 1:
        return _run_on_nodes(args, configs, overrides)
    spec = prepare.resolve(configs, overrides)
    for line in check.ignored_settings(spec.configs):
        print(f"warning: {line}", file=sys.stderr)
    preflight.check_machine(spec.configs)
    prepare.check_run_folder(spec, **flags)
    prepare.check_inputs(spec)
    if args.dry_run:
        _print_plan(spec)
        return 0
    ranks = "1 rank" if spec.world_size == 1 else f"{spec.world_size} ranks"
    print(f"starting {ranks}: importing torch takes some seconds", file=sys.stderr, flush=True)
    return torchrun.launch(_rank_arguments(args, configs, overrides), ranks=spec.world_size)


def _run_on_nodes(args: argparse.Namespace, configs: list[str], overrides: list[str]) -> int:
    """Meet the other nodes and start this node's ranks; the ranks check the inputs and compare the machines."""
    from megatron_entropy.launch import nodes, prepare, torchrun

    if args.dry_run:
        raise ConfigError("--dry-run starts no ranks; leave --nnodes out")
    if not args.rdzv_endpoint:
        raise ConfigError("--nnodes above 1 needs --rdzv-endpoint=HOST:PORT of the first node, the same on every node")
    ranks, error = 0, ""
    try:
        world_size = prepare.resolve(configs, overrides).world_size
        ranks = world_size // args.nnodes
        if ranks * args.nnodes != world_size:
            raise ConfigError(f"actor.parallel has {world_size} ranks, which --nnodes={args.nnodes} does not divide")
    except UserError as mistake:
        error = str(mistake)
    spec = nodes.NodesSpec(args.nnodes, args.rdzv_endpoint, args.rdzv_id, args.join_timeout)
    print(f"waiting for {spec.count} nodes at {spec.host}:{spec.port}", file=sys.stderr, flush=True)
    torchrun.quiet_torch()
    try:
        place = nodes.meet(spec, ranks=ranks, error=error)
    except nodes.EndedElsewhere:
        return 2
    return torchrun.launch(_rank_arguments(args, configs, overrides), ranks=ranks, place=place)


def _rank_arguments(args: argparse.Namespace, configs: list[str], overrides: list[str]) -> list[str]:
    given = [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)]
    return ["train", *configs, *given, *overrides]


def _split(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The files and the overrides; argparse takes an override with a space in it for a file."""
    files = [text for text in args.configs if not text.startswith("--")]
    if not files:
        raise ConfigError("the configuration is missing; the arguments of train are TOML files, then --key.path=value")
    return files, [*args.overrides, *(text for text in args.configs if text.startswith("--"))]


def _print_plan(spec: RunSpec) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_entropy.config.load import to_toml
    from megatron_entropy.methods import build_method
    from megatron_entropy.monitor.summary import layout_label

    print(to_toml(spec.configs))
    table = Table(title=f"{spec.arch.architecture}, {spec.arch.num_parameters:,} parameters")
    for heading in ("stage", "method", "steps", "ranks", "layout", "sequences per step", "tokens per step, at most"):
        table.add_column(heading)
    for config in spec.configs:
        layout = config.actor.parallel
        samples = config.batch.samples if build_method(config).uses_rollouts else 1
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        table.add_row(
            config.name,
            config.method.name,
            str(config.steps),
            str(layout.world_size),
            layout_label(layout.model_dump()),
            f"{config.batch.prompts} x {samples}",
            f"{config.batch.prompts * samples * longest:,}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
