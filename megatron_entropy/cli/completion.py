"""`megatron-entropy completion`: print a script that completes commands, flags and configuration keys."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from megatron_entropy.cli.arguments import Subparsers

SCRIPT = """_megatron_entropy() {
  local current="${COMP_WORDS[COMP_CWORD]}" words=""
  case "${COMP_WORDS[1]}" in
%s
  esac
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then words="%s"; fi
  if [ "$COMP_CWORD" = 1 ] || [ "${current#-}" != "$current" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  fi
%s
}
complete %s -o default -F _megatron_entropy megatron-entropy
"""

BASH_END = """  if [ "${COMPREPLY[*]%=}" != "${COMPREPLY[*]}" ]; then compopt -o nospace; fi"""
ZSH_START = """(( $+functions[compdef] )) || { autoload -U +X compinit && compinit }
autoload -U +X bashcompinit && bashcompinit"""
ZSH_END = """  local word found  # zsh has no compopt: it adds no space, so words bring their own
  found=()
  for word in "${COMPREPLY[@]}"; do
    case "$word" in *=) found+=("$word") ;; *) found+=("$word ") ;; esac
  done
  COMPREPLY=("${found[@]}")"""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands, flags and keys",
        description='Print a script that completes commands, flags and configuration keys: eval "$(megatron-entropy '
        'completion bash)" in ~/.bashrc, or completion zsh in ~/.zshrc.',
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell")
    parser.set_defaults(run=run, subparsers=subparsers)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from megatron_entropy.config import describe
    from megatron_entropy.methods import METHOD_CONFIGS

    commands = args.subparsers.choices
    words = {name: _flags(parser) for name, parser in commands.items()}
    tables = describe.list_tables(METHOD_CONFIGS)
    words["train"] += sorted({f"--{table.path(key)}=" for table in tables for key in table.keys})
    cases = "\n".join(f'    {name}) words="{" ".join(found)}" ;;' for name, found in words.items())
    is_zsh = args.shell == "zsh"
    if is_zsh:
        print(ZSH_START)
    ending = (ZSH_END, "-o nospace") if is_zsh else (BASH_END, "")
    print(SCRIPT % (cases, " ".join(commands), *ending), end="")
    return 0


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Options of a command and of the commands below it."""
    nested: Iterable[argparse.ArgumentParser] = ()
    found: list[str] = []
    for action in parser._actions:
        found += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            nested = action.choices.values()
    return found + sorted({flag for child in nested for flag in _flags(child)} - set(found))
