"""What a config's train step costs on a number of GPUs: memory, what devices exchange, time, MFU.

    python -m trainit.tools.plan --config=configs/pile_gpt.py:model=llama2_7b --devices=8,64

The real step is compiled for as many virtual devices, and what they exchange is compared with the formula.
Above --compile_up_to devices, the formula is used alone.
"""

import os

from absl import flags

from trainit import cli
from trainit import config as config_lib
from trainit.cluster import devices
from trainit.config import Config, ConfigError
from trainit.data.dataset import DatasetError
from trainit.parallel.mesh import mesh_sizes
from trainit.tools.plan import report, roofline
from trainit.tools.plan.plan import plan

_DEVICES = flags.DEFINE_list("devices", ["8"], "GPUs of the job, or several numbers of them")
_ROWS = flags.DEFINE_integer(
    "rows", 0, "sequences of a step on each part of data × fsdp, instead of batch_size", lower_bound=0
)
_GPU = flags.DEFINE_enum("gpu", "H100", list(roofline.GPUS), "kind of GPU, whose bandwidths are known")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.6, "part of the peak that computation reaches", 0.01, 1)
_MOST = flags.DEFINE_integer("compile_up_to", 512, "virtual devices for which the step is compiled at most")


def _config(devices: int) -> Config:
    """The resolved config; a vocabulary that it names needs no dataset."""
    config = cli.unresolved()
    if _ROWS.value:
        config.batch_size = _ROWS.value * devices  # which every mesh can share
        sizes = mesh_sizes(config, devices)
        config.batch_size = _ROWS.value * sizes["data"] * sizes["fsdp"]
    if config.model.vocab_size:
        return config_lib.resolve(config, config.model.vocab_size)
    return cli.read()[0]


def main() -> int:
    try:
        if not all(number.isdigit() and int(number) for number in _DEVICES.value):
            raise ConfigError(f"--devices={','.join(_DEVICES.value)}: write numbers above 0, as 8,64")
        numbers = [int(number) for number in _DEVICES.value]
        virtual = max([number for number in numbers if number <= _MOST.value], default=1)
        devices.configure("cpu", virtual, cli.cache())
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
        plans = []
        for number in numbers:
            config = _config(number)
            gpu = roofline.GPUS[_GPU.value]
            plans.append(plan(config, number, gpu, _EFFICIENCY.value, number <= _MOST.value))
            print(report.describe(plans[-1]), flush=True)
        if len(plans) > 1:
            print(report.table(plans))
    except (ConfigError, DatasetError) as error:
        cli.say(error)
        return cli.USAGE_ERROR
    return 0


if __name__ == "__main__":
    cli.run(main)
