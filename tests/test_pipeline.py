"""`far reproduce --preset smoke` from an empty folder, killed on the way, and everything that must hold afterwards."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from far_nb.cli import _alone, app, evaluate_method, main, reproduce
from far_nb.core import FarError, read_json
from far_nb.experiments import EXPERIMENTS, PRESETS, TARGETS, get_experiment, make_plan, resolve

FAR = [sys.executable, "-c", "from far_nb.cli import main; main()"]
COLUMNS = "table,row,metric,paper,measured,spread,ci_low,ci_high,images,preset,dataset,steps,seed,protocol,run"
PLAN = make_plan(PRESETS["smoke"])
TRAINED = [name for name, run in PLAN["runs"].items() if run["kind"] in ("mae", "far", "hr")]
MEASURED = sorted({file.split("/")[0] for files in PLAN["targets"].values() for file in files if file.endswith("metrics.json")})
OURS = {".lock", "snakemake.log"}          # files that a call may touch although it has nothing to do


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and ".snakemake" not in path.parts and path.name not in OURS}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A finished smoke run that was killed with -9 as soon as a training had a checkpoint, and then called again.

    Returns the folder, what the second call said, its seconds, and the checkpoints that the kill left."""
    out = tmp_path_factory.mktemp("smoke")
    command = [*FAR, "reproduce", "--preset", "smoke", "--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (left := list(out.glob("runs/smoke/*/checkpoints/step-*.pt"))):
            assert first.poll() is None, first.stdout.read()
            assert time.monotonic() < deadline, "no checkpoint after two minutes"
            time.sleep(0.2)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    began = time.monotonic()
    second = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert second.returncode == 0, second.stdout + second.stderr
    return out, second.stdout, time.monotonic() - began, left


@pytest.fixture
def copy(smoke, tmp_path):
    "A copy that a test may break."
    shutil.copytree(smoke[0], tmp_path / "copy", ignore=shutil.ignore_patterns(".lock", "tb"))
    return tmp_path / "copy"


def call(*arguments: str):
    return CliRunner().invoke(app, list(map(str, arguments)))


def planned(out: Path, capsys, *arguments: str) -> set[str]:
    "Jobs of a dry run, without its last line (their number)."
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        sys.argv, before = ["far", "reproduce", "--preset", "smoke", "--out", str(out), "--dry-run", *arguments], sys.argv
        try: main()
        finally: sys.argv = before
    assert not left.value.code
    return set(capsys.readouterr().out.splitlines()[:-1])


def test_a_killed_call_goes_on(smoke):
    out, said, _, left = smoke
    assert left                                                      # the kill came after a checkpoint and before the end
    assert "done in" in said and f"/{len(TRAINED) + len(MEASURED) + len(TARGETS)}]" in said
    log = pd.read_csv(left[0].parent.parent / "log.csv")
    assert log["step"].is_monotonic_increasing and log["step"].is_unique       # resumed, not begun again on top


def test_everything_is_there(smoke):
    out = smoke[0]
    assert TARGETS == (*(f"table{number}" for number in range(1, 7)), *(f"figure{number}" for number in range(1, 10)))
    for target in TARGETS:
        for suffix in ("csv", "md", "tex") if "table" in target else (): assert (out / f"figures/smoke/{target}.{suffix}").stat().st_size > 200
        for suffix, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")) if "figure" in target else ():
            assert (out / f"figures/smoke/{target}.{suffix}").read_bytes().startswith(start)
    for name in TRAINED:
        run, kind = out / "runs/smoke" / name, PLAN["runs"][name]["kind"]
        expected = {"options.json", "train.ipynb", "train.json", "log.csv", "model/model.safetensors", "model/config.json"}
        if kind == "far": expected |= {"eval.csv", "discriminator.safetensors"}
        for file in expected: assert (run / file).exists(), f"{name} lacks {file}"
        assert list(run.glob("checkpoints/*.pt"))
    for name in MEASURED: assert list((out / "runs/smoke" / name).glob("[em]*e.ipynb")), name         # evaluate or measure
    assert not [path for path in out.rglob("*") if path.suffix in (".part", ".log") and path.name not in OURS and ".snakemake" not in path.parts]


def test_executed_notebooks_are_kept_with_pictures_and_without_errors(smoke):
    notebooks = [path for path in (smoke[0] / "runs/smoke").rglob("*.ipynb")]
    assert len(notebooks) == len(TRAINED) + len(MEASURED) + len(TARGETS)
    for path in notebooks:
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        assert outputs and not [output for output in outputs if output.output_type == "error"], path
        if path.name == "train.ipynb" or path.name.startswith("figure"):
            assert any("image/png" in output.get("data", {}) for output in outputs), path


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_table_cells_are_those_of_the_runs(smoke, number):
    out = smoke[0]
    path = out / f"figures/smoke/table{number}.csv"
    assert path.read_text().splitlines()[0] == COLUMNS
    frame = pd.read_csv(path)
    rows = {row: experiment for experiment in EXPERIMENTS.values() for table, row in experiment.rows if table == number}
    assert set(frame["row"]) == set(rows) and set(frame["table"]) == {number}
    for row, experiment in rows.items():
        lines, name = frame[frame["row"] == row], resolve(PRESETS["smoke"], experiment.name)
        if experiment.spec == "folder": assert lines["measured"].isna().all() and lines["run"].isna().all(); continue
        measured = {(entry["metric"], entry["protocol"]): entry for entry in read_json(out / f"runs/smoke/{name}-s0/metrics.json")["metrics"]}
        assert {(line.metric, line.protocol) for line in lines.itertuples()} >= set(measured)
        for line in lines.itertuples():
            entry = measured[line.metric, line.protocol]
            assert (line.preset, line.seed, line.run, line.images) == ("smoke", 0, f"{name}-s0", 8 if experiment.data == "hr" else 16)
            if entry["value"] is None: assert pd.isna(line.measured) and entry["reason"]
            else: assert line.measured == entry["value"]
        for metric in ("PSNR", "SSIM", "FID (lite0)", "LPIPS (lite0)"):
            assert lines[lines["metric"] == metric]["measured"].notna().all() and (lines["metric"] == metric).any(), (row, metric)
        for metric in ("PSNR", "SSIM", "LPIPS (lite0)"):
            ours = lines[lines["metric"] == metric]
            assert (ours["ci_low"] <= ours["measured"]).all() and (ours["measured"] <= ours["ci_high"]).all()
        if number < 5: assert lines[lines["metric"].isin(["PSNR", "SSIM", "FID", "LPIPS"]) & (lines["protocol"] == "paper")]["paper"].notna().all()


def test_the_seconds_of_table_6_are_those_of_its_run(smoke):
    frame, run = pd.read_csv(smoke[0] / "figures/smoke/table6.csv"), read_json(smoke[0] / "runs/smoke/speed-s0/metrics.json")
    for row, lines in run["rows"].items():
        for entry in lines:
            line, = frame[(frame["row"] == row) & (frame["metric"] == entry["metric"])].itertuples()
            assert line.measured == entry["value"] > 0 and line.ci_low <= line.measured <= line.ci_high and line.paper > 0
    ratios = frame[frame["metric"] == "Training (ratio)"].set_index("row")
    assert ratios["measured"].iloc[0] == 1 and ratios["paper"].round(3).tolist() == [1, 1.238, 1.248]


def test_metrics_say_where_they_come_from(smoke):
    metrics = {name: read_json(smoke[0] / "runs/smoke" / name / "metrics.json") for name in MEASURED}
    for name, entry in metrics.items():
        assert entry["run"] == name == f"{entry['experiment']}-s0" and entry["preset"] == "smoke"
        assert {"git_commit", "created", "versions"} <= set(entry["provenance"])
    for which, dataset in {"ablation": "sample-scenes", "scenes": "sample-scenes", "faces": "sample-faces", "hr": "sample-scenes at 96 px"}.items():
        entries = [entry for entry in metrics.values() if get_experiment(entry["experiment"]).data == which and entry["experiment"] != "speed"]
        assert {entry["dataset"] for entry in entries} == {dataset} and len({entry["data_hash"] for entry in entries}) == 1     # the same pictures and masks for all


def test_the_index_leads_to_everything_and_says_what_reproduced(smoke):
    folder = smoke[0] / "figures/smoke"
    index = (folder / "README.md").read_text()
    for target in TARGETS: assert f"{target}.{'md' if 'table' in target else 'png'}" in index
    for link in re.findall(r"\]\(([^)#]+)\)|(?:src|href)=\"([^\"]+)\"", index):
        link = "".join(link)
        assert link.startswith("http") or (folder / link).exists(), link
    assert str(smoke[0]) not in index and re.search(r"reproduced|undecided", index)


def test_a_second_call_does_nothing_and_says_so(smoke):
    out = smoke[0]
    before, began = modified(out), time.monotonic()
    again = call("reproduce", "--preset", "smoke", "--out", out)
    assert again.exit_code == 0 and "nothing to do" in again.stdout
    assert modified(out) == before
    assert time.monotonic() - began < 15                # Snakemake's start; seconds on a free machine


def test_a_changed_option_repeats_what_stands_on_it_and_nothing_else(copy, capsys, monkeypatch):
    def change(name: str, **options) -> None:
        experiment = EXPERIMENTS[name]
        monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, options={**experiment.options, **options}))

    assert planned(copy, capsys) == set()
    change("far-contextual", coordinates=False)
    assert planned(copy, capsys) == {"train_far far-contextual-s0", "evaluate far-contextual-s0", "table table4", "figure figure9"}
    change("far-contextual", coordinates=True)                   # back to what the run was made with
    assert planned(copy, capsys) == set()
    change("far-nocoord", masked_position=True)
    assert planned(copy, capsys) == {"train_far far-nocoord-s0", "finetune_hr hr-nocoord-s0", "evaluate hr-nocoord-s0", "table table2"}
    change("far-nocoord", masked_position=False)
    change("mae-random", norm_pix=True)
    assert planned(copy, capsys) == {"pretrain_mae mae-random-s0", "train_far far-random-s0", "evaluate far-random-s0", "table table4"}
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], face_images=8))          # no training, except that of mae-random
    jobs = planned(copy, capsys)
    measured = {f"evaluate {name}" for name in MEASURED if get_experiment(PLAN["runs"][name]["experiment"]).data == "faces"} | {"evaluate far-random-s0"}
    assert {job for job in jobs if job.startswith("evaluate")} == measured and {job for job in jobs if job.startswith("table")} == {"table table4", "table table5"}
    assert {job for job in jobs if job.startswith(("train_far", "pretrain_mae"))} == {"pretrain_mae mae-random-s0", "train_far far-random-s0"}


def test_a_deleted_run_is_repeated(copy, capsys):
    shutil.rmtree(copy / "runs/smoke/far-random-s0")
    assert planned(copy, capsys) == {"train_far far-random-s0", "evaluate far-random-s0", "table table4"}
    assert planned(copy, capsys, "--only", "table3,figure5") == set()


def test_only_runs_what_its_targets_need(tmp_path, capsys):
    assert planned(tmp_path, capsys, "--only", "figure3") == {"figure figure3"}
    jobs = planned(tmp_path, capsys, "--only", "table3")
    assert "table table3" in jobs and not {job for job in jobs if "random" in job or "contextual" in job or "far-s0" in job or "figure" in job}
    assert sum(job.startswith("pretrain_mae") for job in jobs) == 1 and sum(job.startswith("train_far") for job in jobs) == 4
    assert planned(tmp_path, capsys, "--only", "table2") == {
        "pretrain_mae mae-mixed-s0", "pretrain_mae mae-normpix-s0", "train_far far-s0", "train_far far-normpix-s0", "train_far far-nocoord-s0",
        "finetune_hr hr-s0", "finetune_hr hr-normpix-s0", "finetune_hr hr-nocoord-s0",
        "evaluate hr-s0", "evaluate hr-normpix-s0", "evaluate hr-nocoord-s0", "table table2"}
    assert planned(tmp_path, capsys, "--only", "table6") == {"measure_speed speed-s0", "table table6"}


def test_another_seed_adds_runs_and_renews_tables(copy, capsys):
    jobs = planned(copy, capsys, "--seeds", "0,1", "--only", "table1")
    assert jobs == {"pretrain_mae mae-mixed-s1", "pretrain_mae mae-partial-s1", "train_far far-s1", "train_far far-partial-s1",
                    "evaluate far-s1", "evaluate far-partial-s1", "table table1"}


def test_a_failed_run_fails_its_table_and_no_other(copy, capfd):
    (copy / "runs/smoke/mae-random-s0/model/model.safetensors").write_bytes(b"torn")
    (copy / "runs/smoke/far-random-s0/train.json").unlink()
    (copy / "figures/smoke/table3.csv").unlink()
    assert reproduce("smoke", copy, "table3,table4", jobs=2) == 1
    said = capfd.readouterr()
    failure = [line for line in said.err.splitlines() if "far-random-s0" in line][0]
    notebook = Path(re.search(r"\S+train\.ipynb", failure)[0])
    assert notebook == copy / "runs/smoke/far-random-s0/train.ipynb"
    assert any(output.output_type == "error" for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", []))
    assert (copy / "figures/smoke/table3.csv").exists() and "Traceback" not in said.err
    index = (copy / "figures/smoke/README.md").read_text()
    assert "Failed in the last call" in index and "far-random-s0: see runs/smoke/far-random-s0/train.ipynb" in index and str(copy) not in index


def test_two_seeds_make_a_table_with_a_spread(copy):
    assert reproduce("smoke", copy, "table1", jobs=2, seeds="0,1") == 0
    frame = pd.read_csv(copy / "figures/smoke/table1.csv")
    row = frame[(frame["row"] == "without partial fine-tuning") & (frame["metric"] == "PSNR") & (frame["protocol"] == "paper")].iloc[0]
    values = [next(entry["value"] for entry in read_json(copy / f"runs/smoke/far-s{seed}/metrics.json")["metrics"]
                   if (entry["metric"], entry["protocol"]) == ("PSNR", "paper")) for seed in (0, 1)]
    assert row["measured"] == pytest.approx(np.mean(values)) and row["spread"] == pytest.approx(np.std(values, ddof=1)) and row["seed"] == "0, 1"


@pytest.mark.parametrize("arguments, said", [
    (["--preset", "huge"], "smoke"),
    (["--only", "table4,figure33"], "figure33"),
    (["--preset", "small"], "--data"),
    (["--data", "/no/such/pictures"], "/no/such/pictures"),
    (["--jobs", "0"], "--jobs"),
])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["far", "reproduce", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as left: main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and said in error
    assert not list(tmp_path.rglob("*.json"))                    # before anything was written


def test_the_command_itself_reports_a_mistake_without_a_traceback(tmp_path):
    done = subprocess.run([*FAR, "reproduce", "--preset", "huge", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_two_calls_on_one_folder_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr("far_nb.cli.time.sleep", lambda seconds: None)
    with _alone(tmp_path / "runs/smoke"), pytest.raises(FarError, match=str(os.getpid())): reproduce("smoke", tmp_path)


def test_a_plain_folder_is_measured_whole(tmp_path):
    "Without train/val/test sub-folders nothing is held out from `far evaluate`."
    rng = np.random.default_rng(0)
    for index in range(6): Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    assert evaluate_method("mean", str(tmp_path), size=32, count=100)["images"] == 6
