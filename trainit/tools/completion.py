"""Prints a script with which a shell completes commands, flags, files, groups and fields of configs.

    eval "$(trainit completion bash)"       in ~/.bashrc; likewise zsh in ~/.zshrc
    trainit completion fish | source        in ~/.config/fish/config.fish

The script holds all names, so that completing starts no Python. Optimizers' files are read as text for their
fields, since importing them takes seconds.
"""

import argparse
import re
from pathlib import Path

from trainit import config as config_lib
from trainit.config.exit_codes import DONE

DESCRIPTION = "Prints a script with which a shell completes this command."
OPTIMIZERS = Path(__file__).parents[1] / "optimizers"
VARIANT = re.compile(r"^def get_(\w+)_config", re.MULTILINE)  # a further choice in an optimizer's file
FIELD = re.compile(r"^    (?:config|base)\.(?!name\b)([\w.]+) = (?!ConfigDict)", re.MULTILINE)

BASH = r"""
  # Bash takes "=" and ":" for words of their own, so the text since the last space decides what is wanted.
  local word=${COMP_WORDS[COMP_CWORD]} line=${COMP_LINE:0:COMP_POINT}
  local typed=${line##* }
  [[ $word != [=:] ]] || word=
  if [ "$COMP_CWORD" -le 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W "${commands[*]}" -- "$word")
    return
  fi
  local tail=${typed##*[:,]}
  case $typed in
    --config=*:*) mapfile -t COMPREPLY < <(compgen -P "${typed%"$tail"}" -W "${groups[*]}" -- "$tail") ;;
    --config.*=*) COMPREPLY=() ;;
    --config.*) mapfile -t COMPREPLY < <(compgen -S = -W "${fields[*]}" -- "$typed") ;;
    --*=*)
      mapfile -t COMPREPLY < <(compgen -P "${typed%%=*}=" -f -- "${typed#*=}")
      compopt -o filenames 2>/dev/null
      ;;
    -*) mapfile -t COMPREPLY < <(compgen -W "${flags[*]} --help" -- "$typed") ;;
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
complete -F _trainit trainit"""
ZSH = r"""
  if (( CURRENT == 2 )); then
    compadd -a commands
    return
  fi
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
compdef _trainit trainit"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(arguments: argparse.Namespace) -> int:
    """Prints the script; returns the exit code."""
    commands = arguments.commands
    flags = {name: _flags(arguments.command_parser(name)) for name in commands}
    if arguments.shell == "fish":
        print(_fish(commands, flags))
        return DONE
    # Both scripts begin with the names, in arrays: those of flags depend on the command.
    words, rest = {"bash": ("${COMP_WORDS[1]}", BASH), "zsh": ("$words[2]", ZSH)}[arguments.shell]
    names = {"commands": commands, "fields": _field_names(), "groups": _groups(), "flags": ()}
    arrays = [f"  local -a {name}=({' '.join(values)})" for name, values in names.items()]
    cases = [f"    {name}) flags=({' '.join(own)}) ;;" for name, own in flags.items()]
    print("_trainit() {", *arrays, f"  case {words} in", *cases, "  esac" + rest, sep="\n")
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


def _field_names() -> list[str]:
    """--config.NAME of all fields that a config may have."""
    configs = [("", config_lib.defaults())]
    configs += [(f"{g}.", make()) for g, choices in config_lib.GROUPS.items() for make in choices.values()]
    names = [name for prefix, config in configs for name, *_ in config_lib.walk(config, prefix)]
    for file in sorted(OPTIMIZERS.rglob("*.py")):
        names += [f"optimizer.{name}" for name in FIELD.findall(file.read_text())]
    return [f"--config.{name}" for name in dict.fromkeys(names)]


def _groups() -> list[str]:
    """GROUP=CHOICE of all groups."""
    files = OPTIMIZERS.glob("[a-z]*.py")
    optimizers = sorted(name for f in files for name in (f.stem, *VARIANT.findall(f.read_text())))
    groups = {**config_lib.GROUPS, "optimizer": optimizers}
    return [f"{group}={choice}" for group, choices in groups.items() for choice in choices]


def _fish(commands: dict[str, str], flags: dict[str, list[str]]) -> str:
    lines = ["complete -c trainit -n __fish_use_subcommand -f"]
    for name, about in commands.items():
        lines.append(f"complete -c trainit -n __fish_use_subcommand -f -a {name} -d '{about}'")
        start = f"complete -c trainit -n '__fish_seen_subcommand_from {name}'"
        own = [flag.removeprefix("--").removesuffix("=") for flag in flags[name] if flag != "--config."]
        lines += [f"{start} -l {flag}" for flag in own]
        if "--config." in flags[name]:
            lines.append(f"{start} -a '{'= '.join(_field_names())}='")
    return "\n".join(lines)
