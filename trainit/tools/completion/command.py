"""Prints a script with which a shell completes commands, flags, files, groups and fields of configs.

    eval "$(trainit completion bash)"       in ~/.bashrc; likewise zsh in ~/.zshrc
    trainit completion fish | source        in ~/.config/fish/config.fish

The script holds all names, so that completing starts no Python. Optimizers' files are read as text for their
fields, since importing them takes seconds.
"""

import argparse
import re
from pathlib import Path

import trainit
from trainit import config as config_lib
from trainit.cluster.process import DONE

DESCRIPTION = "Prints a script with which a shell completes this command."
VARIANT = re.compile(r"^def get_(\w+)_config", re.MULTILINE)  # a further choice in an optimizer's file
FIELD = re.compile(r"^    (?:config|base)\.([\w.]+) = (?!ConfigDict)", re.MULTILINE)

BASH = r"""
_trainit() {
  local fields="@FIELDS@" groups="@GROUPS@"
  # Bash takes "=" and ":" for words of their own, so the text since the last space decides what is wanted.
  local word=${COMP_WORDS[COMP_CWORD]} line=${COMP_LINE:0:COMP_POINT} flags=
  local typed=${line##* }
  [[ $word != [=:] ]] || word=
  if [ "$COMP_CWORD" -le 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W "@COMMANDS@" -- "$word")
    return
  fi
  case ${COMP_WORDS[1]} in
@FLAGS@
  esac
  local tail=${typed##*[:,]}
  case $typed in
    --config=*:*) mapfile -t COMPREPLY < <(compgen -P "${typed%"$tail"}" -W "$groups" -- "$tail") ;;
    --config.*=*) COMPREPLY=() ;;
    --config.*) mapfile -t COMPREPLY < <(compgen -S = -W "$fields" -- "$typed") ;;
    --*=*)
      mapfile -t COMPREPLY < <(compgen -P "${typed%%=*}=" -f -- "${typed#*=}")
      compopt -o filenames 2>/dev/null
      ;;
    -*) mapfile -t COMPREPLY < <(compgen -W "$flags --help" -- "$typed") ;;
    *)
      mapfile -t COMPREPLY < <(compgen -f -- "$typed")
      compopt -o filenames 2>/dev/null
      ;;
  esac
  # After a config file, groups may follow; after "=" a value.
  [[ ${COMPREPLY[*]} != *[=.] && $typed != --config=* ]] || compopt -o nospace 2>/dev/null
  # What stands before the word is on the line already.
  COMPREPLY=("${COMPREPLY[@]#"${typed%"$word"}"}")
}
complete -F _trainit trainit
"""
ZSH = r"""
_trainit() {
  local -a commands fields flags groups
  commands=(@COMMANDS@)
  fields=(@FIELDS@)
  groups=(@GROUPS@)
  if (( CURRENT == 2 )); then
    compadd -a commands
    return
  fi
  case $words[2] in
@FLAGS_ZSH@
  esac
  case $PREFIX in
    --config=*:*) compset -P '*[:,]'; compadd -S '' -a groups ;;
    --config.*=*) ;;
    --config.*) compadd -S '=' -a fields ;;
    --*=*) compset -P '*='; _files ;;
    -*) compadd -S '' -- $flags --help ;;
    *) _files ;;
  esac
}
autoload -Uz compinit
(( $+functions[compdef] )) || compinit
compdef _trainit trainit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(arguments: argparse.Namespace) -> int:
    """Prints the script; returns the exit code."""
    commands = arguments.commands
    flags = {name: _flags(arguments.command_parser(name)) for name in commands}
    fields, groups = [f"--config.{name}" for name in field_names()], _groups()
    if arguments.shell == "fish":
        print(_fish(commands, flags, fields))
        return DONE
    cases = "\n".join(f"    {name}) flags=@({' '.join(own)}@) ;;" for name, own in flags.items())
    script = {"bash": BASH, "zsh": ZSH}[arguments.shell].lstrip()
    for name, value in {
        "@FLAGS@": cases.replace("@(", '"').replace("@)", '"'),
        "@FLAGS_ZSH@": cases.replace("@(", "(").replace("@)", ")"),
        "@COMMANDS@": " ".join(commands),
        "@FIELDS@": " ".join(fields),
        "@GROUPS@": " ".join(groups),
    }.items():
        script = script.replace(name, value)
    print(script, end="")
    return DONE


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a command, with "=" after those that take a value."""
    flags = []
    for action in parser._actions:
        name = next((name for name in action.option_strings if name.startswith("--")), "")
        if name == "--config.FIELD":
            flags.append("--config.")
        elif name and name != "--help":
            flags.append(name + "=" * (action.nargs is None))
    return flags


def field_names() -> list[str]:
    """The dotted names of all fields that a config may have."""
    names = [name for name, _, _ in config_lib.walk(config_lib.defaults())]
    for group, choices in config_lib.GROUPS.items():
        for make in choices.values():
            names += [name for name, _, _ in config_lib.walk(make(), f"{group}.")]
    for file in sorted((Path(trainit.__file__).parent / "optimizers").rglob("*.py")):
        names += [f"optimizer.{name}" for name in FIELD.findall(file.read_text()) if name != "name"]
    return list(dict.fromkeys(names))


def _groups() -> list[str]:
    """GROUP=CHOICE of all groups."""
    optimizers = []
    for file in (Path(trainit.__file__).parent / "optimizers").glob("[a-z]*.py"):
        optimizers += [file.stem, *VARIANT.findall(file.read_text())]
    groups = {**config_lib.GROUPS, "optimizer": sorted(optimizers)}
    return [f"{group}={choice}" for group, choices in groups.items() for choice in choices]


def _fish(commands: dict[str, str], flags: dict[str, list[str]], fields: list[str]) -> str:
    lines = ["complete -c trainit -n __fish_use_subcommand -f"]
    for name, about in commands.items():
        lines.append(f"complete -c trainit -n __fish_use_subcommand -f -a {name} -d '{about}'")
        own = [flag.removesuffix("=") for flag in flags[name] if flag != "--config."]
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c trainit {condition} -l {flag.removeprefix('--')}" for flag in own]
        if "--config." in flags[name]:
            lines.append(f"complete -c trainit {condition} -a '{'= '.join(fields)}='")
    return "\n".join(lines)
