"""How run folders are read and grouped, what is computed of them, and how it is shown."""

import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from processes import ROOT
from scipy import stats

from trainit.__main__ import main
from trainit.config import ConfigError
from trainit.experiments.compare import report, runs, statistics
from trainit.experiments.compare.report import compare

PNG = b"\x89PNG\r\n\x1a\n"


def write(folder, losses, seconds=0.5, steps=None, **config):
    """A run that validates every 10 steps with these losses, and trains one loss lower."""
    folder.mkdir(parents=True)
    fields = {"name": "adamw", "learning_rate": 0.01} | config
    seed = fields.pop("seed", 1)
    top = {name: fields.pop(name) for name in ("batch_size", "mesh", "schedule") if name in fields}
    end = 10 * (len(losses) - 1)
    about = {"seed": seed, "steps": steps or end, "optimizer": fields, **top}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "run.json").write_text(
        json.dumps({"flops_per_token": 6.0, "optimizer_bytes": 2**20, "devices": "1 × cpu", "versions": "T"})
    )
    records = []
    for step in range(end + 1):
        record = {"step": step, "tokens": 8 * step}
        if step:
            record |= {"train/loss": 4.0 - step / 100, "throughput/tokens_per_second": 16.0}
        if step % 10 == 0:
            record |= {"valid/loss": losses[step // 10], "valid/bits_per_byte": 1.5}
        if step > 1 and step % 10 != 1:  # the first steps of all, and after a validation, are not timed
            record["time/step_seconds"] = seconds
        records.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(records) + '\n{"step": 11, "tok')  # a crash in a line
    return runs.read(folder)


def test_curves_have_the_finite_points(tmp_path):
    run = write(tmp_path / "a", [5.0, None, 3.0], seconds=0.25)
    assert run.curve("step", "valid/loss") == ([0, 20], [5.0, 3.0])
    assert run.curve("tokens", "valid/loss")[0] == [0, 160]
    assert run.curve("flops", "valid/loss")[0] == [0, 960]
    assert run.curve("seconds", "valid/loss")[0] == [0, 5.0]  # what was not timed counts as usual
    assert run.curve("step", "train/loss")[0] == list(range(1, 21))
    assert (run.finished, run.final) == (True, 3.0)


def test_seconds_between_lines_that_are_not_logged(tmp_path):
    lines = [{"step": 0, "tokens": 0}, {"step": 1, "tokens": 8}]
    lines += [{"step": n, "tokens": 8 * n, "time/step_seconds": 2.0} for n in (4, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert runs.read(tmp_path).seconds() == [0, 2, 8, 16]


def test_what_did_not_end_has_failed(tmp_path):
    assert math.isinf(write(tmp_path / "a", [5.0, 4.0], steps=50).final)
    assert math.isinf(write(tmp_path / "b", [5.0, None]).final)
    assert report.unfinished(runs.find([tmp_path]))[0].endswith(
        "a: ended at step 10 of 50; counted as failed"
    )


def test_runs_are_put_together_by_what_they_mean(tmp_path):
    """By seed, by rate, by optimizer and its fields; where it ran tells nothing apart."""
    for rate in (0.01, 0.02):
        for seed in (1, 2):
            write(tmp_path / f"adamw{rate}{seed}", [5, 4 + rate], learning_rate=rate, seed=seed, b1=0.9)
    write(tmp_path / "other mesh", [5, 4], learning_rate=0.01, seed=3, b1=0.9, mesh={"data": 8})
    write(tmp_path / "beta", [5, 4], learning_rate=0.01, b1=0.95)
    write(tmp_path / "sgdm", [5, 4], learning_rate=1.0, name="sgdm", momentum=0.9)
    methods = {m.name: m for m in runs.group(runs.find([tmp_path]))}
    assert set(methods) == {"adamw, b1 0.9", "adamw, b1 0.95", "sgdm"}
    settings = methods["adamw, b1 0.9"].settings
    assert [(s.rate, sorted(r.seed for r in s.runs)) for s in settings] == [(0.01, [1, 2, 3]), (0.02, [1, 2])]
    assert methods["adamw, b1 0.9"].best.rate == 0.01
    assert settings[1].name == "adamw, b1 0.9, learning_rate 0.02"


def test_what_chose_a_rate_does_not_judge_it(tmp_path):
    """The tuning seed's loss decides between rates, and is left out of the mean."""
    for rate, lucky, other in ((0.01, 3.0, 3.6), (0.02, 3.1, 3.5)):
        write(tmp_path / f"{rate}0", [5, lucky], learning_rate=rate, seed=0)
        write(tmp_path / f"{rate}1", [5, other], learning_rate=rate, seed=1)
    (method,) = runs.group(runs.find([tmp_path]), tuning_seeds=[0])
    assert method.best.rate == 0.01
    assert method.best.finals == {1: 3.6}
    (method,) = runs.group(runs.find([tmp_path]))
    assert method.best.rate in (0.01, 0.02)
    assert method.best.finals == {0: 3.0, 1: 3.6} or method.best.finals == {0: 3.1, 1: 3.5}


def test_the_same_run_twice_is_two(tmp_path):
    for name in "ab":
        write(tmp_path / name, [5, 4])
    assert [m.name for m in runs.group(runs.find([tmp_path]))] == [str(tmp_path / name) for name in "ab"]


@pytest.mark.evidence("intervals of a comparison against SciPy")
def test_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3, 0.1, 5)
    result = statistics.mean(list(values))
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([result.value, result.low, result.high], [values.mean(), low, high])
    assert math.isnan(statistics.mean([3.0]).low)


@pytest.mark.evidence("differences by seed against SciPy's tests")
@pytest.mark.parametrize("seeds", [(1, 2, 3, 4), (5, 6, 7)])
def test_difference_is_paired_by_seed_or_after_welch(seeds):
    draw = np.random.default_rng(1)
    a = dict(zip((1, 2, 3, 4), draw.normal(3, 0.1, 4), strict=True))
    b = dict(zip(seeds, draw.normal(3.1, 0.3, len(seeds)), strict=True))
    result = statistics.difference(a, b)
    x, y = list(a.values()), list(b.values())
    oracle = stats.ttest_rel(x, y) if len(x) == len(y) else stats.ttest_ind(x, y, equal_var=False)
    low, high = oracle.confidence_interval(0.95)
    np.testing.assert_allclose([result.low, result.high, result.p], [low, high, oracle.pvalue])
    np.testing.assert_allclose(result.value, np.mean(x) - np.mean(y))


@pytest.mark.evidence("speed-ups of a comparison against SciPy's tests")
def test_speed_up_is_a_ratio_of_geometric_means():
    base, fast = {1: 100.0, 2: 110.0, 3: 120.0}, {1: 52.0, 2: 54.0, 3: 60.0}
    result = statistics.speed_up(base, fast)
    oracle = stats.ttest_rel(np.log(list(base.values())), np.log(list(fast.values())))
    low, high = np.exp(oracle.confidence_interval(0.95))
    np.testing.assert_allclose(
        result.value, stats.gmean(list(base.values())) / stats.gmean(list(fast.values()))
    )
    np.testing.assert_allclose([result.low, result.high, result.p], [low, high, oracle.pvalue])


def test_cost_to_a_loss_lies_on_the_line_between_validations(tmp_path):
    run = write(tmp_path / "a", [6.0, 5.0, 4.0, 4.5, 3.0])
    assert statistics.cost(run, 4.25, "step") == pytest.approx(
        17.5
    )  # the first time, although it rises again
    assert statistics.cost(run, 4.25, "tokens") == pytest.approx(140)
    assert statistics.cost(run, 4.25, "seconds") == pytest.approx(8.75)
    assert statistics.cost(run, 6.0, "step") == 0
    assert statistics.cost(run, 2.9, "step") is None


def test_how_wide_the_valley_of_rates_is(tmp_path):
    """Losses 1 + log2(rate / 8)^2 / 100 at powers of two, of which the tops lie between the ones tried."""
    for power in range(6):
        rate = 2.0**power
        write(tmp_path / str(power), [5, 1 + (power - 3) ** 2 / 50], learning_rate=rate)
    (method,) = runs.group(runs.find([tmp_path]))
    span = statistics.nearly_best(method)
    # 1 % above the best is half-way, on a straight line, to the neighbours at 2 %.
    np.testing.assert_allclose([span.low, span.high], [2**2.5, 2**3.5])
    assert (span.low_open, span.high_open, statistics.at_edge(method)) == (False, False, False)
    write(tmp_path / "6", [5, 0.9], learning_rate=64.0)
    (method,) = runs.group(runs.find([tmp_path]))
    assert statistics.at_edge(method)
    assert statistics.nearly_best(method).high_open


def test_smooth_is_the_weighted_mean():
    values = np.random.default_rng(0).normal(size=50)
    weights = 0.9 ** np.arange(50)
    expected = [np.average(values[: n + 1][::-1], weights=weights[: n + 1]) for n in range(50)]
    np.testing.assert_allclose(statistics.smooth(list(values), 10), expected)


@pytest.fixture
def two_methods(tmp_path):
    """Three seeds of two optimizers, of which the second takes half the steps, and a third that breaks."""
    for seed, noise in ((1, 0.0), (2, 0.02), (3, 0.05)):
        write(tmp_path / f"adamw/{seed}", [5, 4.5, 4 + noise, 3.5 + noise, 3 + noise], seed=seed)
        fast = [5, 4 + noise, 3 + noise, 2.8 + noise, 2.7 + noise]
        write(tmp_path / f"muon/{seed}", fast, 1.0, seed=seed, name="muon")
        write(tmp_path / f"sgdm/{seed}", [5, 4], 0.5, 40, seed=seed, name="sgdm")
    write(tmp_path / "muon/high", [5, 4, 4, 4, 4], name="muon", learning_rate=0.02)
    return tmp_path


def test_table_of_methods(two_methods):
    found = runs.find([two_methods])
    text = compare(found, "adamw")
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert rows[1][:6] == ["muon", "0.01", "3", "40", "320", "2.7233 ± 0.0625"]
    assert rows[2][:2] == ["adamw", "0.01"]
    assert rows[2][5].startswith("3.0233")
    assert rows[3][5] == "failed"
    way = next(row for row in rows if row[:2] == ["muon", "3 of 3"])
    # To 3.05, adamw's worst: adamw 39, 39.4, 40 steps; muon 19.5, 19.7, 20: half, each at twice the cost.
    assert float(way[2]) == pytest.approx(19.73, abs=0.01)
    assert way[6] == "2 (2 to 2)"
    assert way[8] == "1 (1 to 1)"
    assert next(row for row in rows if row[:2] == ["sgdm", "0 of 3"])[2:6] == ["-"] * 4
    assert text.count("counted as failed") == 3


def test_picture_and_page(two_methods):
    """Whatever is drawn stands in the page, which needs no other file."""
    found = runs.find([two_methods])
    compare(found, "adamw", None, (), two_methods / "c.png", two_methods / "c.html", "the command <&>")
    assert (two_methods / "c.png").read_bytes()[:8] == PNG
    page = (two_methods / "c.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(pictures) == 6
    for picture in pictures:
        ET.fromstring(picture)
    assert not re.search(r"(src|href)=\"(?!#)(?!http://www.w3.org)", page)
    assert "the command &lt;&amp;&gt;" in page
    assert page.count("<table>") == 3
    assert "ended at step 10 of 40" in page


def test_runs_without_times_without_a_config_and_at_the_target_from_the_start(tmp_path):
    """They are drawn and named as far as is known, and have no speed-up."""
    for name in ("adamw", "muon", "unknown"):
        write(tmp_path / name, [5, 4], name=name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        untimed = [line for line in lines if "time/step_seconds" not in line]
        (tmp_path / name / "metrics.jsonl").write_text(
            "\n".join([*untimed, lines[-2].replace("time/", "no/")])
        )
    (tmp_path / "unknown/config.json").unlink()
    text = compare(runs.find([tmp_path]), "adamw", 6.0, (), tmp_path / "c.png")
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["adamw", "muon", f"{tmp_path}/unknown"]
    assert next(row for row in rows if row[:2] == ["muon", "1 of 1"])[2:] == ["0"] * 4 + ["-"] * 4
    assert (tmp_path / "c.png").read_bytes()[:8] == PNG


def test_a_baseline_that_is_not_there(two_methods):
    with pytest.raises(ConfigError, match=r"--baseline=lion: there are 'adamw', 'muon', 'sgdm'"):
        compare(runs.find([two_methods]), "lion")


def test_command(tmp_path):
    """One run, drawn as it was trained."""
    write(tmp_path / "run", [5.0, 4.0])
    command = [sys.executable, "-m", "trainit", "compare", tmp_path / "run", f"--output={tmp_path}/c.png"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    header, row = result.stdout.splitlines()[:2]
    assert header.split()[:6] == ["method", "rate", "seeds", "steps", "tokens", "valid/loss"]
    assert row.split()[1:] == ["0.01", "1", "10", "80", "4.0000", "1.5000", "16", "1"]
    assert (tmp_path / "c.png").read_bytes()[:8] == PNG


def test_what_is_no_run_folder(tmp_path):
    command = [sys.executable, "-m", "trainit", "compare", tmp_path / "none"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        f"trainit: error: {tmp_path}/none: no metrics.jsonl: it is no run folder, and none is in it"
    )


def test_a_baseline_that_has_failed(two_methods):
    """The others are still reported; there is no loss to reach."""
    text = compare(runs.find([two_methods]), "sgdm")
    assert "2.7233 ± 0.0625" in text
    assert "reached by" not in text


def test_schedules_tell_methods_apart_by_their_name_and_their_own_fields(tmp_path):
    constant, linear = {"name": "constant", "warmup": "5%"}, {"name": "linear", "warmup": "10%", "final": 0.0}
    write(tmp_path / "a", [5, 4], schedule=constant)
    write(tmp_path / "b", [5, 4], schedule=linear)
    names = [method.name for method in runs.group(runs.find([tmp_path]))]
    assert names == ["adamw, schedule constant", "adamw, schedule linear"]
    write(tmp_path / "c", [5, 4], schedule=linear | {"final": 0.1})
    names = [method.name for method in runs.group(runs.find([tmp_path]))]
    assert names == ["adamw, schedule constant", "adamw, final 0", "adamw, final 0.1"]
    write(tmp_path / "d", [5, 4], schedule=linear, name="muon")
    write(tmp_path / "e", [5, 4], schedule=linear, name="sgdm")
    names = [method.name for method in runs.group(runs.find([tmp_path]))]
    assert names == ["adamw, schedule constant", "adamw", "adamw, final 0.1", "muon", "sgdm"]


SHORT = {
    "nothing": [],
    "start": [{"step": 0, "tokens": 0, "valid/loss": 5.0}],
    "no_validation": [{"step": 0, "tokens": 0}, {"step": 1, "tokens": 8, "train/loss": 5.0}],
    "not_finite": [{"step": 1, "tokens": 8, "train/loss": math.nan, "valid/loss": math.nan}],
    "infinite": [{"step": 1, "tokens": 8, "train/loss": math.inf, "valid/loss": math.inf}],
    "a_step": [{"step": 1, "tokens": 8, "valid/loss": 4.5}],
    "timed": [{"step": 1, "tokens": 8, "valid/loss": 4.5, "time/step_seconds": 0.2}],
}


@pytest.mark.parametrize("field", ["beta1", "learning_rate"])
@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(SHORT, 2)), ids="-".join)
def test_short_runs(field, pair, tmp_path):
    """Whatever two runs of one step have left, both are in the table, and only a number is a loss."""
    for i, name in enumerate(pair):
        write(tmp_path / str(i), [5.0, 4.0], steps=1, **{field: 0.1 + i})
        lines = "".join(json.dumps(record) + "\n" for record in SHORT[name])
        (tmp_path / str(i) / "metrics.jsonl").write_text(lines)
    text = compare(runs.find([tmp_path]), output=tmp_path / "c.png")
    reached = [name in ("a_step", "timed") for name in pair]
    assert text.splitlines()[1].count("4.5000") == any(reached)
    assert "nan" not in text
    has_picture = (tmp_path / "c.png").exists()
    assert has_picture != ("no picture: no run has" in text)
    assert has_picture or not any(reached)


def test_seconds_below_one_are_not_milli(tmp_path):
    for i in range(2):
        write(tmp_path / str(i), [5.0, 4.0], seconds=0.02, beta1=0.1 * i)
    compare(runs.find([tmp_path]), page=tmp_path / "c.html")
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "c.html").read_text())
    assert "0.2" in ticks
    assert not [tick for tick in ticks if re.fullmatch(r"[\d.]+ ?m", tick)]


def test_rates_that_agree_to_six_digits_are_two(tmp_path):
    rates = [0.1, math.nextafter(0.1, 1)]
    found = [write(tmp_path / str(i), [5.0, 4.0], learning_rate=rate) for i, rate in enumerate(rates)]
    (method,) = runs.group(found)
    assert [setting.rate for setting in method.settings] == rates
    assert len({setting.name for setting in method.settings}) == 2


def test_a_run_that_went_on_with_another_config_is_marked(tmp_path):
    """It is no seed of the run that had the last config from the start."""
    write(tmp_path / "whole", [5.0, 4.0, 3.0], seed=1)
    write(tmp_path / "other", [5.0, 4.0, 3.0], seed=1, learning_rate=0.02)
    joined = tmp_path / "joined"
    write(joined, [5.0, 4.5, 4.0], seed=2)
    facts = json.loads((joined / "run.json").read_text())
    (joined / "run.json").write_text(json.dumps(facts | {"changes": [[10, "steps: 10 -> 20"]]}))
    found = runs.find([tmp_path])
    names = {member.path.name: s.name for m in runs.group(found) for s in m.settings for member in s.runs}
    assert len(set(names.values())) == 3
    assert names["joined"] == "adamw, changed after 10, learning_rate 0.01"
    page = tmp_path / "page.html"
    text = compare(found, page=page)
    line = f"{joined}: after step 10 with steps: 10 -> 20"
    assert f"put together  {line}" in text
    assert line.replace(">", "&gt;") in page.read_text()
    # Alone, it is drawn with a line at the step.
    figures = pytest.importorskip("trainit.experiments.compare.figures")
    methods = runs.group([runs.read(joined)])
    drawn = figures.draw(figures.panels(statistics.table(methods, methods[0], 4.0), methods, methods[0]))
    assert [10.0, 10.0] in [list(line.get_xdata()) for line in drawn.axes[0].get_lines()]


def test_lines_that_are_no_steps_are_passed_over(tmp_path):
    """Files that were edited by hand, or torn by a crash of the machine."""
    expected = write(tmp_path / "a", [5.0, 4.0])
    path = tmp_path / "a/metrics.jsonl"
    odd = b'[1]\n5\nnull\n{"a": 1}\n{"step": "3"}\n\0\0\n\xff\n'
    path.write_bytes(odd + path.read_bytes() + b"\n" + odd)
    assert runs.read(tmp_path / "a") == expected
    path.write_text(path.read_text(errors="replace").replace('"valid/loss": 4.0', '"valid/loss": "NaN"'))
    assert runs.read(tmp_path / "a").final == math.inf


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "", "a/config.json is damaged: "),
        ("config.json", "[]", "a/config.json is damaged: it is a list instead of an object"),
        (
            "config.json",
            '{"architectures": ["GPT"]}',
            "a/config.json is no config of Trainit: it has no seed, ",
        ),
        (
            "config.json",
            '{"seed": 1, "steps": 10, "optimizer": {"name": "a", "learning_rate": "0.1"}}',
            "a/config.json is no config of Trainit: it has no number as optimizer.learning_rate",
        ),
        ("run.json", "{", "a/run.json is damaged: "),
    ],
)
def test_files_of_a_run_that_cannot_be_read(file, content, message, tmp_path, capsys):
    write(tmp_path / "a", [5.0, 4.0])
    (tmp_path / "a" / file).write_text(content)
    assert main(["compare", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_links_to_runs(tmp_path):
    """They are followed, and a run counts once."""
    write(tmp_path / "far/a", [5.0, 4.0])
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a").symlink_to(tmp_path / "far/a")
    (tmp_path / "here/here").symlink_to(tmp_path / "here")
    assert [run.path for run in runs.find([tmp_path / "here"])] == [tmp_path / "here/a"]
    both = [tmp_path / "far/a", tmp_path / "here", tmp_path / "far/a/../a"]
    assert [run.path for run in runs.find(both)] == [tmp_path / "far/a"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--output=a.xyz", "--output=a.xyz: Format 'xyz' is not supported (supported formats: "),
        ("--output=a", "a: Is a directory"),
        ("--page=a", "a: Is a directory"),
        ("--target=nan", "--target: nan must be at least 0"),
    ],
)
def test_outputs_and_targets_that_cannot_be(flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", [5.0, 4.0])
    assert main(["compare", "a", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("flag", ["--output", "--page"])
def test_a_full_disk_is_reported_with_the_file(flag, tmp_path, capsys):
    write(tmp_path / "a", [5.0, 4.0])
    (tmp_path / "c.png").symlink_to("/dev/full")
    assert main(["compare", str(tmp_path / "a"), f"{flag}={tmp_path}/c.png"]) == 2
    assert f"error: {tmp_path}/c.png: No space left on device" in capsys.readouterr().err


def test_the_picture_is_where_it_is_said_to_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", [5.0, 4.0])
    assert main(["compare", "a", "--output=picture"]) == 0
    assert capsys.readouterr().out.endswith("curves in picture\n")
    assert (tmp_path / "picture").read_bytes().startswith(PNG)
    assert main(["compare", "a", "--output=", "--page="]) == 0  # as unset variables of a shell give them
    assert "curves" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a", "picture"}
