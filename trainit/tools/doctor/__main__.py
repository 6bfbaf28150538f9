"""Checks what a run needs, before it is run: the same command under the same launcher.

    python -m trainit.tools.doctor --config=configs/pile_gpt.py
    launch/local.sh, launch/slurm.sh and launch/sge.sh run it with TRAINIT_MODULE=trainit.tools.doctor

Prints a table, with what to do about each check that fails. Exit code 0 if none does, else 1.
"""

from trainit import cli
from trainit.cluster import distributed
from trainit.config import ConfigError
from trainit.tools.doctor import checks
from trainit.tools.doctor.report import FAIL, table
from trainit.train import trackers


def main() -> int:
    trackers.log_to_terminal(lead=False)
    try:
        place = cli.place()
    except (ConfigError, distributed.PlaceError) as error:
        cli.say(error)
        return cli.USAGE_ERROR
    rows = checks.run(place)
    if place.process_id == 0:
        print(table(rows), flush=True)
    code, together = int(any(row.verdict == FAIL for row in rows)), any(r.name == "clocks" for r in rows)
    distributed.leave(distributed.agree(code) if together else code, together)


if __name__ == "__main__":
    cli.run(main)
