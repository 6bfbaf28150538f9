"""Does steps of a run again, from one of its checkpoints, and compares losses and norms with its log.

    trainit replay runs/pile_gpt --step=1000 --steps=10
    TRAINIT_COMMAND=replay launch/local.sh -n 4 runs/pile_gpt --step=1000

Devices of the same kind with the same mesh must give the logged numbers, bit for bit; on others, `rounding`
bounds the difference. Nothing is written into the run's folder, and the run may still train. Exit codes: 0 as
logged, 1 something differs, 2 wrong usage.
"""

import argparse
from pathlib import Path

from trainit.cluster import logs
from trainit.cluster.place import Place, find_own_place
from trainit.config import ConfigError, command_line
from trainit.config.exit_codes import DONE, FAILED, USAGE

DESCRIPTION = "Does steps of a run again, from a checkpoint, and compares losses and norms with its log."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add = parser.add_argument_group("replay").add_argument
    begin = "checkpoint to begin from, 0: as the run began; by default the newest with logged steps after it"
    add("--step", type=command_line.number(int, 0), default=None, help=begin)
    add(
        "--steps",
        type=command_line.number(int, 1),
        default=10,
        help="steps to do again, as far as one job did them",
    )
    example = "sets a field on which only rounding depends, or where the data lie: --config.mesh.data=2"
    add("--config.FIELD", metavar="VALUE", default=argparse.SUPPRESS, help=example)
    command_line.add_job_arguments(parser, has_folder=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints how the steps compare with the log; ends this process if it is one of several."""
    logs.log_to_terminal(lead=False)
    place = find_own_place(arguments)
    if place.num_processes == 1:
        return _replay(arguments, place)
    from trainit.cluster.process import exit_process
    from trainit.cluster.rendezvous import MeetingError

    try:
        code = _replay(arguments, place)
    except (ConfigError, MeetingError) as error:
        command_line.print_error(error)
        exit_process(USAGE if isinstance(error, ConfigError) else FAILED)
    exit_process(code, together=True)


def _replay(arguments: argparse.Namespace, place: Place) -> int:
    """Does and compares the steps; the exit code. All processes of the job call it together."""
    from trainit.cluster import devices, rendezvous, sync
    from trainit.tools.replay import again

    # The devices are those that the run's last job asked for, unless the flags name others.
    folder = Path(arguments.run)
    last = again.with_fields(again.jobs(folder)[-1].config, arguments.overrides)
    devices.configure(last.platform, last.cpu_devices, command_line.cache(), place)
    _, address = rendezvous.meet_others(place, last.platform, {}, arguments.wait_seconds, lambda: "")
    devices.initialize(last.platform, place, address)

    # The steps as the run did them. Where they differ on other devices, what rounding can do is measured.
    replay = again.prepare(folder, arguments.step, arguments.steps, arguments.overrides)
    done, how = replay.redo(), "bit for bit"
    wrong = again.first_wrong(replay.logged, done)
    if sync.agree(bool(wrong)) and replay.here != replay.there:
        draws = [replay.redo(draw) for draw in range(1, again.DRAWS + 1)]
        bounds = again.rounding(done, draws, replay.sum_error)
        wrong = again.first_wrong(replay.logged, done, bounds)
        how = f"within rounding, ± {bounds[replay.end]['train/loss']:.1g} in the last loss"
    failed = sync.agree(bool(wrong))
    if sync.is_lead():
        found = wrong or f"{len(replay.logged)} logged steps are as logged, {how}"
        where = f"on {replay.here}" + f"; logged on {replay.there or 'others'}" * (
            replay.here != replay.there
        )
        print(f"{folder} steps {replay.begin + 1} to {replay.end}: {found}; {where}", flush=True)
    return FAILED if failed else DONE
