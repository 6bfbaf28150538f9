"""Checks what a run needs, before it is run: the same command under the same launcher.

    python -m trainit.tools.doctor --config=configs/pile_gpt.py
    launch/local.sh, launch/slurm.sh and launch/sge.sh run it with TRAINIT_MODULE=trainit.tools.doctor

Prints a table, with what to do about each check that fails. Exit code 0 if none does, else 1.
"""

from trainit import cli, logs
from trainit.cluster import sync
from trainit.cluster.place import SetupError
from trainit.cluster.process import exit_process
from trainit.config import ConfigError
from trainit.tools.doctor import checks
from trainit.tools.doctor.report import FAIL, table


def main() -> int:
    logs.log_to_terminal(lead=False)
    try:
        place = cli.place()
    except (ConfigError, SetupError) as error:
        cli.say(error)
        return cli.USAGE_ERROR
    results, connected = checks.run(place)
    if place.process_id == 0:
        print(table(results), flush=True)
    code = int(any(result.verdict == FAIL for result in results))
    exit_process(sync.agree(code) if connected else code, connected)


if __name__ == "__main__":
    cli.run(main)
