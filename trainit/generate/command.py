"""Continues texts with a run's model.

trainit generate runs/debug --prompt="To the Congress" [--temperature=0.8 --top_p=0.95 --number=3]
trainit generate runs/debug --prompts=FILE --json
trainit generate runs/debug                              (asks for prompts)
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainit.cluster import logs
from trainit.config import ConfigError, command_line, require
from trainit.config.exit_codes import DONE
from trainit.config.fields import PRECISIONS

if TYPE_CHECKING:
    from trainit.generate.writer import Writer

DESCRIPTION = "Continues texts with a run's model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    command_line.add_finished_run_arguments(parser)
    add = parser.add_argument_group("prompts", "without one, those of the input, one a line").add_argument
    add("--prompt", default=None, help="text to continue; empty: a new text")
    add("--prompts", default="", help='file of prompts, one a line; NAME.jsonl: the "prompt" of each line')
    add = parser.add_argument_group("text").add_argument
    count, share = command_line.number(int, 1), command_line.number(float, 0, 1)
    add("--length", type=count, default=256, help="most tokens that are added; the context is a limit, too")
    add("--number", type=count, default=1, help="texts for each prompt")
    add("--stop", action="append", default=[], help="text before which to end; may be given several times")
    add("--json", action="store_true", help="print an object a line, for programs")
    add("--rows", type=count, default=16, help="texts that are written at once; each has a part of the cache")
    add(
        "--precision",
        choices=PRECISIONS,
        help="by default the run's; on a CPU float32, which is fastest there",
    )
    add = parser.add_argument_group("choice of tokens", "in this order").add_argument
    add("--seed", type=command_line.number(int, 0, 2**32 - 1), default=0, help="of what is drawn")
    penalty = "divides the logits of tokens that stand in prompt or text, if above 0, else multiplies them"
    add("--repetition_penalty", type=command_line.number(float, 0.01), default=1.0, help=penalty)
    add(
        "--temperature",
        type=command_line.number(float, 0),
        default=0.0,
        help="divides logits; 0: the most likely token",
    )
    add(
        "--top_k",
        type=command_line.number(int, 0),
        default=0,
        help="draw from the K most likely tokens; 0: from all",
    )
    add(
        "--top_p", type=share, default=1.0, help="draw from the most likely ones of this probability together"
    )
    add("--min_p", type=share, default=0.0, help="draw from those of at least this part of the highest one")


def run(arguments: argparse.Namespace) -> int:
    """Writes texts, and returns the exit code."""
    logs.log_to_terminal(lead=True)
    require(arguments.prompt is None or not arguments.prompts, "--prompt and --prompts exclude each other")
    for name in ("top_k", "top_p", "min_p"):
        unset = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}[name]
        value = getattr(arguments, name)
        needs = f"--{name}={value} needs --temperature above 0: at 0 the most likely token is taken"
        require(arguments.temperature > 0 or value == unset, needs)
    require(arguments.top_p > 0, "--top_p=0 leaves no token; take --temperature=0 for the most likely one")
    require("" not in arguments.stop, "--stop= is empty; name the text before which to end")

    from trainit.cluster import devices
    from trainit.cluster.place import Place
    from trainit.generate import texts
    from trainit.generate.writer import Writer

    prompts = [arguments.prompt] if arguments.prompt is not None else None
    if arguments.prompts:
        prompts = texts.read_file(arguments.prompts)
    asks = prompts is None and sys.stdin.isatty()
    if prompts is None and not asks:
        prompts = texts.read_prompts(sys.stdin, "the input")
        require(bool(prompts), "no prompt: give --prompt=TEXT, --prompts=FILE, or lines in the input")
    devices.configure("", 1, command_line.cache(), trains=False)
    devices.initialize("", Place("alone"))
    writer = Writer(arguments, arguments.run, command_line.cache())
    if asks:
        _ask(writer)
    else:
        _write(writer, arguments, prompts or [])
    return DONE


def _write(writer: "Writer", arguments: argparse.Namespace, prompts: Sequence[str]) -> None:
    rows = [(index, number) for index in range(len(prompts)) for number in range(arguments.number)]
    encoded = [writer.encode(prompt) for prompt in prompts]
    if len(rows) == 1 and not arguments.json:
        _show(writer, prompts[0])
        return
    for begin in range(0, len(rows), arguments.rows):
        some = rows[begin : begin + arguments.rows]
        found = writer.write([(encoded[index], number) for index, number in some])
        for (index, number), text in zip(some, found, strict=True):
            if arguments.json:
                print(json.dumps({"prompt": prompts[index], "number": number, **text.facts()}), flush=True)
            else:
                sample = f", {number + 1} of {arguments.number}" * (arguments.number > 1)
                print(f"--- prompt {index + 1}{sample}\n{prompts[index]}{text.text}", flush=True)


def _show(writer: "Writer", prompt: str) -> None:
    """Prints a prompt, and its text as it comes."""
    ids = writer.encode(prompt)
    print(prompt, end="", flush=True)
    try:
        [text] = writer.write([(ids, 0)], lambda more: print(more, end="", flush=True))
    finally:
        print(flush=True)
    writer.explain(text)


def _ask(writer: "Writer") -> None:
    """Continues each line that is typed; Ctrl-C ends a text, Ctrl-D all."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited then
    while True:
        try:
            _show(writer, input("> "))
        except ConfigError as error:
            command_line.print_error(error)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
