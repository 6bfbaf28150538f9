"""Measures the loader, the train step, blocking saves, and what processes, optimizers and logits cost.

    python -m trainit.tools.benchmark --config=configs/debug.py [--only=loader,step,save,...]
    python -m trainit.tools.benchmark --config=configs/debug.py --sweep
    python -m trainit.tools.benchmark --suite=cpu
    python -m trainit.tools.benchmark --only=prepare --corpus=FILES

Times are medians over repetitions on this machine as it is; what counts is the ratios within one run.
"""

import re
import sys

from trainit.cluster.process import tune_process

# Which need no config; what --suite compares is started without our settings.
alone = any(re.match(r"--?(only=prepare|suite)\b", argument) for argument in sys.argv[1:])
if __name__ == "__main__" and not alone:  # as the command that trains
    tune_process()

from absl import flags

from trainit import cli, logs
from trainit.config import ConfigError
from trainit.data.dataset import DatasetError
from trainit.tools.benchmark import measures, step, suite
from trainit.tools.benchmark.measures import PARTS

_ONLY = flags.DEFINE_list("only", list(PARTS[:3]), f"which of {', '.join(PARTS)} to measure")
_TOKENS = flags.DEFINE_integer("tokens", 1 << 27, "tokens of the synthetic dataset; a quarter GB by default")
_CORPUS = flags.DEFINE_string("corpus", "", "files of documents to prepare, for --only=prepare")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of what prepare and loss compare", lower_bound=1)
_SWEEP = flags.DEFINE_bool("sweep", False, "try other settings of the step that change no result")
_SUITE = flags.DEFINE_enum(
    "suite", "", ["", "cpu", "gpu"], "the table beside other programs, without a config"
)
_STEPS = flags.DEFINE_integer("steps", 20, "train steps that are timed", lower_bound=3)


def main() -> int:
    try:
        unknown = set(_ONLY.value) - {*PARTS, "prepare"}
        if unknown:
            raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(PARTS)}, prepare")
        if _SUITE.value:
            return suite.measure(_SUITE.value, _ROUNDS.value)
        if "prepare" in _ONLY.value:
            if _ONLY.value != ["prepare"] or not _CORPUS.value:
                raise ConfigError("--only=prepare stands alone and needs --corpus=FILES")
            measures.measure_prepare(_CORPUS.value, _ROUNDS.value)
            return 0
        logs.log_to_terminal(lead=True)
        config, dataset = cli.read()
        measures.take_devices(config)
        if _SWEEP.value:
            step.sweep(config, dataset, _STEPS.value)
        else:
            measures.measure(_ONLY.value, config, dataset, _TOKENS.value, _STEPS.value, _ROUNDS.value)
    except (ConfigError, DatasetError) as error:
        cli.say(error)
        return cli.USAGE_ERROR
    return 0


if __name__ == "__main__":
    cli.run(main, needs_config=not alone)
