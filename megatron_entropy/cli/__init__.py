"""The command `megatron-entropy`: `main` collects the subcommands, one module each with `add_parser` and `run`.

Modules here import light packages at the top and everything else inside `run`, so that `--help` is immediate.
"""
