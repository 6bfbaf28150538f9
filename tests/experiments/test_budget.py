"""What plans say of a GPU's program, what runs cost, choices of model.remat: with numbers that are given."""

from dataclasses import replace

import pytest
import tiny

from trainit import config as config_lib
from trainit.__main__ import main
from trainit.cluster import devices
from trainit.config import MESH_AXES, ConfigError
from trainit.experiments.plan import budget, gpu, report, roofline, sweep
from trainit.experiments.plan.gpu import Program
from trainit.experiments.plan.plan import Plan, plan

SCHEDULED = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[1000000]) -> f32[1000000] {
  %x = f32[1000000]{0} parameter(0)
  ROOT %y = f32[1000000]{0} negate(%x)
}
"""


def config(attention: str = "auto", **mesh: int):
    config = tiny.get_config()
    config.mesh.update(**dict.fromkeys(MESH_AXES, 1) | mesh)
    config.model.update(remat="auto", scan_layers="auto", attention=attention)
    return config_lib.resolve(config, 1024)


@pytest.fixture(scope="module")
def planned() -> list[Plan]:
    """Steps of 16 × 32 tokens in 1 s on two GPUs, where they fit nowhere, and in 0.625 s on four."""
    times = [roofline.Times(seconds, 0.0, 0.0, seconds / 2) for seconds in (1.0, 0.625)]
    plans = [plan(config(data=count), count, "H100", 0.5, "", {}) for count in (2, 4)]
    assert [budget.fits(one) for one in plans] == [None, None]
    rest = 80e9, 1e9
    return [replace(one, times=t, temporaries=r) for one, t, r in zip(plans, times, rest, strict=True)]


def test_hours_and_their_cost(planned):
    text = budget.describe(planned, 0, 0)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:-1]]
    assert lines[0] == ["GPUs", "fits", "tokens", "hours", "GPU-hours"]
    # 40 steps, as the config has them, in some seconds.
    assert [line[:3] for line in lines[2:]] == [["2", "no", "20.5 k"], ["4", "yes", "20.5 k"]]
    lines = budget.describe(planned, 512 * 3600 * 8, 12).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-1]]
    # 8 × 3600 steps take 8 hours of two GPUs and 5 of four; 12 GPU-hours are 6 hours of two and 3 of four.
    assert [row[3:5] for row in rows] == [["8.0", "16.0"], ["5.0", "20.0"]]
    assert [row[5:] for row in rows] == [["11.1 M", "no"], ["8.85 M", "no"]]
    assert "the smallest number of H100s that fits is 4." in lines[-1]
    assert "no number of GPUs that was tried fits" in budget.describe(planned[:1], 0, 1e6)


@pytest.mark.parametrize("attention, travel", [("auto", False), ("gather", False), ("ring", True)])
def test_keys_travel_as_the_config_says(attention, travel):
    """For sequences so short that a run would gather keys by itself."""
    found = plan(config(attention, context=2), 2, "H100", 0.5, "", {})
    assert found.shape.attention == ("ring" if travel else "gather")
    assert any(one.kind == "collective-permute" for one in found.predicted) == travel


def test_a_plan_says_what_a_compiled_program_shows(monkeypatch):
    program = Program(int(70e9), "cudnn", SCHEDULED, SCHEDULED, ["--xla_gpu_new=1"])
    monkeypatch.setattr(gpu, "compile_for", lambda *_: program)
    lines = report.describe(plan(config(), 1, "H200", 0.5, "GPU", {}), "").splitlines()
    text = " ".join(lines)
    assert "for H200 (NVIDIA H200) by jaxlib" in text and "does not know --xla_gpu_new=1, which" in text
    assert (
        f"{70e9 / 2**30:.2f} GiB assigned by XLA" in text and "assumed for what XLA does not see: 0.5" in text
    )
    cards = {line.split()[0]: line.split()[-1] for line in lines if line.endswith(("yes", "no"))}
    # JAX's part, nine tenths, has half a GiB that XLA does not assign: 71.5 of 80 GB, and 35.5 of 40 GB.
    assert cards == {"A100-40": "no"} | dict.fromkeys(("A100-80", "H100", "H200", "B200"), "yes")
    # 8 MB at 0.85 of 4.8 TB/s, and 2 µs, as the only kernel.
    seconds = 8e6 / (0.85 * 4.8e12) + 2e-6
    assert f"time       {1e3 * seconds:.2f} ms on H200 by its schedule" in text
    assert "error against a card: not measured yet" in text and "kernels    1 in a step" in text


def test_each_choice_is_compiled(monkeypatch):
    """As it is named, and with the reason where it cannot be; the star is at that of a run."""
    compiled = []

    def compile_for(config, devices, name, environment):
        compiled.append((config.model.remat, config.model.scan_layers))
        assert config.logits_mib == 256 and devices == 2 and environment == {"A": "b"}
        if config.model.remat == "offload":
            raise ConfigError("not on this one")
        return Program(int(60e9), "cudnn", "", SCHEDULED, [])

    monkeypatch.setattr(gpu, "compile_for", compile_for)
    text = sweep.table(config(data=2), 2, "H100", {"A": "b"})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert sorted(compiled) == sorted((row[0].strip("*"), row[1] == "in a loop") for row in rows)
    assert len(rows) == 10 and {row[2] for row in rows if row[0] == "offload"} == {"not on this one"}
    # 8 MB at 0.85 of 3.35 TB/s, and 2 µs; JAX's part of an A100 with 40 GB is 36 GB.
    others = [row[2:] for row in rows if row[0] != "offload"]
    assert others == [["55.88", "0.0", "0.0", "1", "A100-80, H100, H200, B200"]] * 8
    assert [row[:2] for row in rows if row[0].startswith("*")] == [["*none", "unrolled"]]


def test_without_the_compiler_a_sweep_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing", lambda: "it is not there")
    assert main(["plan", "--config=configs/debug.py", "--sweep"]) == 2
    assert "--sweep compiles for GPUs, but it is not there" in capsys.readouterr().err


def test_as_few_gpus_as_fit_are_found(monkeypatch, capsys, tmp_path):
    """One and two cannot have the mesh, four have too little memory, eight fit, and no more are tried."""
    (tmp_path / "config.py").write_text(
        "import tiny\n\ndef get_config(arg=''):\n    config = tiny.get_config(arg)\n"
        "    config.mesh.update(data=-1, fsdp=2, tensor=2)\n    config.model.vocab_size = 1024\n"
        "    return config\n"
    )
    monkeypatch.setattr(devices, "configure", lambda *_: "")
    monkeypatch.setattr(gpu, "missing", lambda: "")
    sizes = {4: 80e9, 8: 40e9}
    monkeypatch.setattr(
        gpu, "compile_for", lambda _, count, *__: Program(int(sizes[count]), "", SCHEDULED, SCHEDULED, [])
    )
    assert main(["plan", f"--config={tmp_path}/config.py", "--tokens=1e9"]) == 0
    output = capsys.readouterr().out
    assert "1 GPUs: mesh=(" in output and "2 GPUs: mesh=(" in output and "16 GPUs" not in output
    assert "the smallest number of H100s that fits is 8." in output
