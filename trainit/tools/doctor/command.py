"""Checks what a run needs, before it is run: the same flags under the same launcher.

    trainit doctor --config=configs/pile_gpt.py
    launch/local.sh, launch/slurm.sh and launch/sge.sh run it with TRAINIT_COMMAND=doctor

Prints a table, with what to do about each check that fails. Exit code 0 if none does, else 1.
"""

import argparse

from trainit.cluster import logs
from trainit.cluster.place import find_own_place
from trainit.config import command_line

DESCRIPTION = "Checks what a run needs, before it is run: the same flags as of `trainit train`."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    command_line.add_config_arguments(parser)
    command_line.add_job_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table on process 0, and ends this process together with the others."""
    logs.log_to_terminal(lead=False)
    place = find_own_place(arguments)
    config = command_line.load_config(arguments)
    from trainit.cluster import sync
    from trainit.cluster.process import exit_process
    from trainit.tools.doctor import checks
    from trainit.tools.doctor.report import FAIL, table

    results, connected = checks.run(config, place, arguments)
    if place.process_id == 0:
        print(table(results), flush=True)
    code = int(any(result.verdict == FAIL for result in results))
    exit_process(sync.agree(code) if connected else code, connected)
