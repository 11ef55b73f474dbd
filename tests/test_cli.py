"""The options of `far`: what they pass on, what they refuse, and `far data test`. What the jobs do is tested in test_pipeline.py."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import far_nb.cli as cli
from far_nb.cli import Progress, app, main, parse_seeds, write_test_set
from far_nb.core import FarError
from far_nb.experiments import build_test_set, get_preset
from far_nb.inpaint import get_method


def refused(capsys, monkeypatch, *arguments: str) -> str:
    "The one line that a mistake gets."
    monkeypatch.setattr(sys, "argv", ["far", *map(str, arguments)])
    with pytest.raises(SystemExit) as left: main()
    line, = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    return line


def test_seeds():
    assert parse_seeds("0") == [0] and parse_seeds(" 3, 1,2") == [3, 1, 2]
    for wrong in ("", "a", "-1", "1.5", "0,,1", "0,1,0", "0,00", "1" * 5000, "²"):
        with pytest.raises(FarError, match="--seeds"): parse_seeds(wrong)


@pytest.mark.parametrize("arguments, said", [(["--seeds", "0,1,1"], "twice"), (["--seeds", "one"], "--seeds"), (["--faces", "/no/faces"], "/no/faces"),
                                             (["--figure-data", "/no/scenes"], "/no/scenes"), (["--outputs", "/no/outputs"], "--outputs"),
                                             (["--test-masks", "/no/masks"], "--test-masks"), (["--jobs", "0"], "--jobs")])
def test_a_wrong_option_is_one_line_before_anything_is_written(tmp_path, capsys, monkeypatch, arguments, said):
    assert said in refused(capsys, monkeypatch, "reproduce", "--preset", "smoke", "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.rglob("*.json"))


def test_every_source_and_seed_reaches_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_planned", lambda command: [])
    pictures, outputs = tmp_path / "pictures", tmp_path / "outputs"
    for index in range(12):
        (pictures / "all").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(pictures / f"{index}.png")
    outputs.mkdir()
    given = ["--data", pictures, "--faces", "sample-faces", "--masks", "sample", "--figure-data", pictures, "--outputs", outputs]
    done = CliRunner().invoke(app, ["reproduce", "--preset", "smoke", "--out", str(tmp_path / "out"), "--dry-run", "--seeds", "4,2", *map(str, given)])
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "out/runs/smoke/plan.json").read_text())
    assert plan["seeds"] == [4, 2]
    assert plan["sources"] == {"data": str(pictures), "faces": "sample-faces", "masks": "sample", "figure_data": str(pictures), "outputs": str(outputs)}


@pytest.mark.parametrize("code", [0, 1])
def test_the_index_is_written_after_a_run_and_its_place_told(tmp_path, monkeypatch, capsys, code):
    calls = []
    def write_index(figures, runs, preset, seeds, failed):
        calls.append((figures, runs, preset, seeds, failed))
        figures.mkdir(parents=True, exist_ok=True)
        (figures / "README.md").write_text("index")
        return figures / "README.md"
    monkeypatch.setattr("far_nb.figures.write_index", write_index)
    progress = Progress(tmp_path, Console(width=300, force_jupyter=False), done=1)
    if code: progress.failed["far-s0"] = "runs/smoke/far-s0/train.ipynb"
    assert cli._conclude(progress, code, "smoke", ["table4"], [0, 1]) == code
    assert calls == [(tmp_path / "figures/smoke", tmp_path / "runs", "smoke", [0, 1], progress.failed)]
    assert f"index: {tmp_path}/figures/smoke/README.md" in capsys.readouterr().out
    cli._conclude(Progress(tmp_path, progress.console), 0, "smoke", ["table4"], [0, 1])          # nothing was to do: the index stays as it is
    assert len(calls) == 1


def test_every_rule_of_the_snakefile_has_its_word():
    rules = {line.split()[1].rstrip(":") for line in (cli.paper_notebooks() / "Snakefile").read_text().splitlines() if line.startswith("rule ")}
    assert rules - {"all"} == set(cli._DONE)


@pytest.mark.parametrize("which", ["scenes", "faces", "hr"])
def test_a_written_test_set_comes_back_through_a_folder(tmp_path, which):
    done = CliRunner().invoke(app, ["data", "test", "-o", str(tmp_path / "set"), "--preset", "smoke", "--set", which])
    assert done.exit_code == 0, done.output
    test, record = build_test_set(get_preset("smoke"), which), json.loads((tmp_path / "set/test.json").read_text())
    assert record["hash"] == test["hash"] and len(list((tmp_path / "set/images").iterdir())) == len(test["names"]) == record["images"]
    returned = get_method(f"folder:{tmp_path}/set/images")(test["images"], test["masks"], test["names"])
    assert torch.equal((returned * 255).round(), (test["images"] * 255).round())                 # png holds 8 bits
    for name, mask in zip(record["names"], test["masks"]):
        hole = np.asarray(Image.open(tmp_path / f"set/masks/{name}.png"))
        assert hole.ndim == 2 and set(np.unique(hole)) <= {0, 255} and np.array_equal(hole > 0, mask[0].numpy() > 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]                            # no leftovers beside it


def test_a_test_set_replaces_only_a_test_set(tmp_path, capsys, monkeypatch):
    write_test_set(tmp_path / "set", "smoke")
    assert "--overwrite" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "set", "--preset", "smoke")
    (tmp_path / "set/images/old.png").write_bytes(b"")
    write_test_set(tmp_path / "set", "smoke", "faces", overwrite=True)
    assert json.loads((tmp_path / "set/test.json").read_text())["set"] == "faces" and not (tmp_path / "set/images/old.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    assert "mine" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "mine", "--preset", "smoke", "--overwrite")
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    assert "faces, hr, scenes" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "new", "--preset", "smoke", "--set", "dogs")
    assert "--data" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "new", "--preset", "paper")


def test_pictures_of_one_name_are_refused(tmp_path, capsys, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / "pictures/test" / folder).mkdir(parents=True)
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / f"pictures/test/{folder}/same.png")
    assert "'same'" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "set", "--preset", "smoke", "--data", tmp_path / "pictures")
    assert not (tmp_path / "set").exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_write_pictures", lambda folder, *_: folder.mkdir(parents=True) or (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): write_test_set(tmp_path / "set", "smoke")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["reproduce"], ["inpaint"], ["evaluate"], ["data"], ["data", "test"]])
def test_help_fits_80_columns(command):
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0 and max(map(len, shown.stdout.splitlines())) <= 80 and "…" not in shown.stdout
