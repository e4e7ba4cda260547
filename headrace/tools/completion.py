"""``headrace completion bash | zsh | fish``: what a shell needs to complete commands, actions, options and values.

The words come from the same tables as the parsers, so a script names what the installed version has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.options import Option

SHELLS = ("bash", "zsh", "fish")
FILES = ("PATH", "DIR", "FILE", "JSONL", "PATH|ID", "URL|PATH")  # metavars whose values are paths


def script(shell: str, commands: Mapping[str, str], actions: Mapping[str, Sequence[str]], options: Any) -> str:
    """``commands``: name to summary; ``actions``: the words after a command; ``options``: a command's rows."""
    make = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return make(commands, actions, options)


def _flags(options: Sequence[Option]) -> list[str]:
    flags = ["--help"]
    for option in options:
        flags.append(option.flag)
        if option.switch:
            flags.append("--no-" + option.flag.removeprefix("--"))
    return flags


def _bash(commands: Mapping[str, str], actions: Mapping[str, Sequence[str]], options: Any) -> str:
    lines = [
        "# source <(headrace completion bash)",
        "_headrace() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "  COMPREPLY=()",
        "  if (( COMP_CWORD == 1 )); then",
        f'    COMPREPLY=( $(compgen -W "{" ".join(commands)} --help --version" -- "$word") )',
        "    return",
        "  fi",
        '  case "${COMP_WORDS[1]} $before" in',
    ]
    for command in commands:
        for option in options(command):
            if option.choices:
                words = " ".join(option.choices)
                lines.append(
                    f'    "{command} {option.flag}") COMPREPLY=( $(compgen -W "{words}" -- "$word") ); return ;;'
                )
            elif option.metavar in FILES:
                lines.append(f'    "{command} {option.flag}") COMPREPLY=( $(compgen -f -- "$word") ); return ;;')
            elif not option.switch:
                lines.append(f'    "{command} {option.flag}") return ;;')
    lines += ["  esac", '  case "${COMP_WORDS[1]}" in']
    for command in commands:
        words = " ".join([*actions.get(command, ()), *_flags(options(command))])
        lines.append(f'    {command}) words="{words}" ;;')
    lines += [
        "  esac",
        '  COMPREPLY=( $(compgen -W "$words" -- "$word") )',
        "}",
        "complete -o default -F _headrace headrace",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh(commands: Mapping[str, str], actions: Mapping[str, Sequence[str]], options: Any) -> str:
    def plain(text: str) -> str:
        return text.replace("[", "(").replace("]", ")").replace(":", " -")

    lines = [
        "#compdef headrace",
        "# headrace completion zsh > ~/.zfunc/_headrace, with ~/.zfunc in fpath",
        "_headrace() {",
    ]
    lines += ["  if (( CURRENT == 2 )); then", "    local -a commands=("]
    lines += [f"      {_quoted(name + ':' + plain(summary))}" for name, summary in commands.items()]
    lines += ["    )", "    _describe command commands", "    return", "  fi", '  case "$words[2]" in']
    for command in commands:
        lines.append(f"    {command})")
        lines.append("      shift words; (( CURRENT-- ))")
        specs = ["'--help[show the help]'"]
        for option in options(command):
            text = plain(option.help)
            if option.switch:
                no = "--no-" + option.flag.removeprefix("--")
                specs += [_quoted(f"{option.flag}[{text}]"), _quoted(f"{no}[not: {text}]")]
                continue
            value = f"({' '.join(option.choices)})" if option.choices else "_files" if option.metavar in FILES else " "
            specs.append(_quoted(f"{option.flag}=[{text}]:value:{value}"))
        if command in actions:
            specs.append(_quoted(f"1:action:({' '.join(actions[command])})"))
        lines.append("      _arguments " + " \\\n        ".join(specs))
        lines.append("      ;;")
    lines += [
        "  esac",
        "}",
        'if [ "$funcstack[1]" = "_headrace" ]; then _headrace "$@"; else compdef _headrace headrace; fi',
    ]
    return "\n".join(lines) + "\n"


def _fish(commands: Mapping[str, str], actions: Mapping[str, Sequence[str]], options: Any) -> str:
    lines = ["# headrace completion fish > ~/.config/fish/completions/headrace.fish", "complete -c headrace -f"]
    for command, summary in commands.items():
        lines.append(f"complete -c headrace -n __fish_use_subcommand -a {command} -d {_quoted(summary)}")
        seen = f"-n '__fish_seen_subcommand_from {command}'"
        for action in actions.get(command, ()):
            lines.append(f"complete -c headrace {seen} -a {action}")
        for option in options(command):
            name = option.flag.removeprefix("--")
            value = ""
            if option.choices:
                value = f" -x -a {_quoted(' '.join(option.choices))}"
            elif option.metavar in FILES:
                value = " -r -F"
            elif not option.switch:
                value = " -x"
            lines.append(f"complete -c headrace {seen} -l {name}{value} -d {_quoted(option.help)}")
            if option.switch:
                lines.append(f"complete -c headrace {seen} -l no-{name} -d {_quoted('not: ' + option.help)}")
    return "\n".join(lines) + "\n"
