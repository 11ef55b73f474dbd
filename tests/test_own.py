"""`far train`: a folder as strangers leave it becomes a model; what it will cost is known before; and one stage described by a file."""
import base64, io, json, os, re, signal, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from far_nb import own
from far_nb.acr import ACR
from far_nb.cli import app
from far_nb.core import FarError, read_json, rng
from far_nb.data import InpaintingDataset
from far_nb.experiments import PRESETS
from far_nb.far import FAR
from far_nb.inpaint import inpaint
from far_nb.mae import MAE
from far_nb.own import (Asked, Fit, Trial, Workshop, find_pictures, fit, fit_batch, fit_steps, memory_line, parse_stage, stage_of_preset,
                        stage_yaml, train_own, with_batch, with_steps)
from far_nb.perceptual import perceptual_loss
from far_nb.training import TrainConfig, TrainingStopped, pretrain_mae, train_far

ASKED = {"preset": "smoke", "steps_mae": 4, "batch_mae": 4, "steps": 3, "batch": 2, "seed": 5}


def picture(index, width=80, height=72):
    return Image.fromarray(rng(index).integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Twenty-two sound pictures of many kinds in two folders, two broken ones, a copy, an icon, and a text."
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub" / "day 2").mkdir(parents=True)
    for index in range(16): picture(index, 70 + 3 * index).save(folder / f"plain {index}.jpg")
    picture(16).convert("L").save(folder / "grey.png")
    picture(17).convert("RGBA").save(folder / "sub" / "see-through.png")
    picture(18).convert("CMYK").save(folder / "sub" / "print.jpg")
    Image.fromarray(np.asarray(picture(19).convert("L")).astype(np.uint16) * 257).save(folder / "sub" / "day 2" / "deep.tif")
    picture(20).convert("P").save(folder / "sub" / "day 2" / "palette.png")
    picture(21, 40, 60).save(folder / "smallish.png")
    (folder / "cut off.jpg").write_bytes((folder / "plain 1.jpg").read_bytes()[:700])
    (folder / "no picture.png").write_text("<html>404</html>")
    (folder / "plain 3 (copy).jpg").write_bytes((folder / "plain 3.jpg").read_bytes())
    picture(22, 20, 20).save(folder / "icon.png")
    (folder / "notes.txt").write_text("remember the milk")
    return folder


def silent(*arguments): pass


def weights(folder): return load_file(str(Path(folder) / "model.safetensors"))


def equal(first, second): return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "A model folder whose training was stopped in the middle of FAR and then asked for again; and what was said each time."
    out, said = tmp_path_factory.mktemp("own") / "model", []
    patch, read = pytest.MonkeyPatch(), InpaintingDataset.__getitem__
    seen = []
    def interrupted(self, address):
        if self.task == "far" and (out / "training" / "mae" / "train.json").exists(): seen.append(address)
        if len(seen) == 3: os.kill(os.getpid(), signal.SIGTERM)          # in the second step
        return read(self, address)
    patch.setattr(InpaintingDataset, "__getitem__", interrupted)
    with pytest.raises(TrainingStopped): train_own(photos, out, say=said.append, **ASKED)
    patch.undo()
    assert not (out / "model.safetensors").exists()
    patch.setattr(own, "make_plan", lambda *_: pytest.fail("planned again"))
    train_own(photos, out, say=said.append, **ASKED)
    patch.undo()
    return out, said


# the folder

def test_what_is_in_a_stranger_s_folder(photos):
    found = find_pictures(photos, 64)
    assert (found.total, found.looked_at, len(found.train) + len(found.held_out)) == (26, 26, 22)
    assert set(found.unreadable) == {"cut off.jpg", "no picture.png"} and all(name in reason for name, reason in found.unreadable.items())
    assert found.copies in ({"plain 3.jpg": "plain 3 (copy).jpg"}, {"plain 3 (copy).jpg": "plain 3.jpg"})
    assert found.small == ("icon.png",) and found.enlarged == 1 and found.sides[0] == 40
    assert found.formats == {"RGB": 17, "L": 1, "RGBA": 1, "CMYK": 1, "I;16": 1, "P": 1}
    assert len(found.held_out) >= 2 and not set(found.train.names) & set(found.held_out.names)
    assert not {"cut off.jpg", "icon.png"} & {*found.train.names, *found.held_out.names}
    again = find_pictures(str(photos), 64)
    assert again.hash == found.hash and again.held_out.names == found.held_out.names


def test_a_folder_with_its_own_test_part_keeps_it(photos, tmp_path):
    for part, numbers in (("train", range(8)), ("test", range(8, 11))):
        (tmp_path / part).mkdir()
        for number in numbers: picture(number).save(tmp_path / part / f"{number}.png")
    found = find_pictures(tmp_path, 64)
    assert (len(found.train), sorted(found.held_out.names)) == (8, ["10.png", "8.png", "9.png"])


def test_a_folder_of_trains_is_no_training_part(photos, tmp_path):
    for index in range(10):
        place = tmp_path / ("train" if index < 3 else "ships")
        place.mkdir(exist_ok=True)
        picture(index).save(place / f"{index}.png")
    assert find_pictures(tmp_path, 64).total == 10


def test_a_list_does_as_well(photos):
    (photos / "some.txt").write_text("\n".join(f"plain {number}.jpg" for number in range(10)))
    found = find_pictures(photos / "some.txt", 64)
    (photos / "some.txt").unlink()
    assert found.total == len(found.train) + len(found.held_out) == 10


# what fits and what it costs

@given(st.integers(1, 64), st.floats(0, 1e6), st.floats(1, 1e4), st.floats(0, 2e6))
def test_the_largest_part_of_the_batch_that_fits(batch, constant, slope, room):
    patch = pytest.MonkeyPatch()
    patch.setattr("accelerate.utils.memory.clear_device_cache", lambda **how: None)      # a garbage collection each time
    patch.setattr(own, "memory_line", lambda trial: (constant, slope))
    parts = [part for part in range(1, batch + 1) if batch % part == 0 and int(constant + slope * part) <= room]
    trial = type("Trial", (), {"preset": PRESETS["smoke"]})
    try:
        if parts: assert fit_batch(trial, batch, torch.device("cpu"), room) == (max(parts), int(constant + slope * max(parts)))
        else:
            with pytest.raises(FarError, match="not even one picture of 64 px fits"): fit_batch(trial, batch, torch.device("cpu"), room)
    finally: patch.undo()


@given(st.floats(0.1, 100), st.floats(1e-3, 2), st.floats(1e-3, 2), st.integers(20, 10_000), st.integers(20, 10_000), st.sampled_from([None, 15]))
def test_steps_fill_the_hours(hours, mae_seconds, far_seconds, mae, far, fixed):
    seconds = {"mae": mae_seconds, "far": far_seconds}
    try: steps = fit_steps(hours, seconds, {"mae": mae, "far": far}, {"mae": fixed, "far": None})
    except FarError as error:
        least = float(re.search(r"give ([\d.e+-]+) or more", str(error))[1])
        assert least > hours * 0.9
        return
    took = sum(steps[stage] * seconds[stage] for stage in steps)
    assert 0.9 * 3600 * hours - mae_seconds - far_seconds <= took <= 0.9 * 3600 * hours + 1e-6
    assert steps["mae"] == fixed if fixed else abs(steps["mae"] / mae - steps["far"] / far) <= max(1 / mae, 1 / far)


@pytest.fixture(scope="module")
def shop(photos): return Workshop(Asked(str(photos), "smoke"), "smoke")


def test_memory_grows_as_the_line_says(shop):
    trial = Trial("far", shop.preset, shop.preset.far_train, shop.data("far"), samples=2)
    constant, slope = memory_line(trial)
    step, task = trial.step(12)
    step()
    measured = own._held(task) + own.peak_memory(step)
    assert measured == pytest.approx((constant + slope * 12) / own._SLACK, rel=0.1)      # extrapolated from batches of 2 and 4
    assert fit_batch(trial, 12, torch.device("cpu"), int(constant + 5 * slope))[0] == 4


def test_steps_and_batches_keep_the_schedule():
    config = TrainConfig(1000, 32, lr=1e-3, lr_discriminator=1e-4, warmup_steps=50, milestones=(500, 900))
    short = with_steps(config, 100)
    assert (short.steps, short.warmup_steps, short.milestones) == (100, 5, (50, 90))
    assert with_batch(config, 8, 1).lr == pytest.approx(2.5e-4) and with_batch(config, 8, 0.5).lr_discriminator == pytest.approx(5e-5)


def test_a_batch_that_does_not_fit_is_split_and_stays_whole(shop, monkeypatch):
    monkeypatch.setattr(own, "fit", lambda trial, batch, device: Fit(2, 10 ** 6, 0.5))
    monkeypatch.setattr(own, "_looking", lambda *_: 1.0)
    plan = own.make_plan(shop, torch.device("cpu"))
    assert (plan.mae.batch_size, plan.mae.gradient_accumulation, plan.mae.lr) == (8, 4, shop.preset.mae_train.lr)
    assert plan.seconds == 0.5 * (20 + 10) + 20
    text = own.describe_plan(plan, shop, 10 ** 10)
    assert "8 in 4 parts of 2" in text and "2 unreadable" in text and "about 35 seconds" in text


# the whole

def test_it_ends_with_a_model_that_inpaint_takes(trained):
    out, _ = trained
    assert {"config.json", "model.safetensors", "README.md", "samples.html", "samples.png", "metrics.json", "training"} <= {path.name for path in out.iterdir()}
    mask = np.zeros((72, 80), bool)
    mask[20:40, 30:50] = True
    filled = np.asarray(inpaint(picture(30), mask, str(out)))
    assert (filled[~mask] == np.asarray(picture(30))[~mask]).all() and filled[mask].std() > 0


def test_neither_measuring_nor_a_stop_changes_the_result(trained, photos, tmp_path):
    "The same two trainings without plan, measuring and interruption end with the same bits."
    plan = own._read_plan(trained[0] / "training" / "plan.json")
    shop = Workshop(Asked(**plan.asked), "smoke")
    mae = MAE.from_pretrained(pretrain_mae(shop.mae(), shop.data("mae"), plan.mae, tmp_path / "mae"))
    folder = train_far(shop.far(mae), shop.data("far"), plan.far, tmp_path / "far", discriminator=shop.discriminator(), perceptual=perceptual_loss("lite0"))
    assert equal(weights(folder), weights(trained[0]))
    other = Workshop(replace(Asked(**plan.asked), seed=6), "smoke").mae()
    assert not torch.equal(other.mask_token, shop.mae().mask_token)


def test_measuring_leaves_random_numbers_alone(shop):
    torch.manual_seed(3); np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fitted = fit(Trial("mae", shop.preset, shop.preset.mae_train, shop.data("mae"), samples=2), 4, torch.device("cpu"))
    assert fitted.micro_batch == 4 and fitted.seconds > 0
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_the_same_command_returns_at_once_and_another_one_is_told(trained, photos, tmp_path):
    out, said = trained
    assert "about" in said[0] and any("going on" in line for line in said)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    lines = []
    train_own(photos, out, say=lines.append, **ASKED)
    assert "trained already" in lines[0]
    with pytest.raises(FarError, match=r"another training \(--steps was 3, is 7\)"): train_own(photos, out, say=silent, **ASKED | {"steps": 7})
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_other_pictures_are_told(trained, photos, tmp_path):
    done = trained[0] / "training" / "done.json"
    content = done.read_text()
    done.unlink()
    picture(50).save(photos / "new.png")
    try:
        with pytest.raises(FarError, match="are not those that .* began with"): train_own(photos, trained[0], say=silent, **ASKED)
    finally:
        (photos / "new.png").unlink()
        done.write_text(content)


def test_the_page_needs_nothing_beside_it(trained):
    page = (trained[0] / "samples.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    held_out = read_json(trained[0] / "metrics.json")["FAR"]["images"]
    assert len(sources) == 4 * held_out and all(source.startswith("data:image/") for source in sources) and not re.search("https?:", page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in sources}
    assert sizes == {(64, 64)}


def test_names_are_escaped():
    page = own.samples_page("a<b", "&", [["method"], ["<script>"]], {"one": [picture(0)]}, ["<img src=x>.png"])
    assert "<script>" not in page and "<img src=x>" not in page and "a&lt;b" in page


def test_the_card_has_the_measured_numbers(trained):
    card = (trained[0] / "README.md").read_text()
    metrics = read_json(trained[0] / "metrics.json")
    assert set(metrics) == {"FAR", "MAE alone", "Telea"}
    for method, result in metrics.items():
        value = next(entry["value"] for entry in result["metrics"] if (entry["metric"], entry["protocol"]) == ("PSNR", "standard"))
        assert f"| {method} | {value:.2f} [" in card
    assert "26 found" in card and "| FAR | 3 | 2 |" in card and "Seed 5" in card


def test_it_starts_from_a_model(trained, photos, tmp_path):
    out = train_own(photos, tmp_path / "second", init=str(trained[0]), steps_mae=0, say=silent, **{name: value for name, value in ASKED.items() if "mae" not in name})
    before, after = weights(trained[0]), weights(out)
    assert equal({name: value for name, value in before.items() if name.startswith("mae.")}, {name: value for name, value in after.items() if name.startswith("mae.")})
    assert not equal(before, after)
    plan = own._read_plan(out / "training" / "plan.json")
    assert equal(Workshop(Asked(**plan.asked), "smoke").discriminator().state_dict(), load_file(str(trained[0] / "training" / "far" / "discriminator.safetensors")))


# mistakes

def mistake(photos, out, match, **options):
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(FarError, match=match) as error: train_own(photos, out, say=silent, **{"preset": "smoke"} | options)
    assert "\n" not in str(error.value)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before


def test_mistakes_are_one_line_and_cost_nothing(photos, tmp_path):
    for name, files in {"empty": {}, "broken": {f"{index}.png": b"x" for index in range(9)}, "few": {}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items(): (tmp_path / name / file).write_bytes(content)
    for index in range(7): picture(index).save(tmp_path / "few" / f"{index}.png")
    mistake(tmp_path / "empty", tmp_path / "m", "no pictures there")
    mistake(tmp_path / "broken", tmp_path / "m", "0 of 9 pictures can be used .9 unreadable.*needs 8")
    mistake(tmp_path / "few", tmp_path / "m", "7 of 7 pictures can be used, a training needs 8")
    mistake(tmp_path / "nowhere", tmp_path / "m", "nowhere")
    mistake(photos, photos, "lies in the folder of the pictures")
    mistake(photos, photos / "sub" / "model", "lies in the folder of the pictures")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("x")
    mistake(photos, tmp_path / "diary", "far train did not make it")
    mistake(photos, tmp_path / "diary" / "monday.txt", "is a file")
    mistake(photos, tmp_path / "m", "unknown preset 'huge'", preset="huge")
    mistake(photos, tmp_path / "m", "give cpu, cuda", device="toaster")
    mistake(photos, tmp_path / "m", "--steps 0: give at least 1", steps=0)
    mistake(photos, tmp_path / "m", "--steps-mae 0", steps_mae=0)
    mistake(photos, tmp_path / "m", "no such folder|none of|no pictures|unknown", masks=str(tmp_path / "none"))
    mistake(photos, tmp_path / "m", "is no model folder", init=str(tmp_path / "diary"))


def test_a_lama_and_an_mae_alone_are_no_beginning(photos, tmp_path):
    FAR(None, ACR(replace(PRESETS["smoke"].acr, prior_width=None, attention="none"))).save_pretrained(tmp_path / "lama")
    MAE(PRESETS["smoke"].mae).save_pretrained(tmp_path / "mae")
    mistake(photos, tmp_path / "m", "holds a LaMa", init=str(tmp_path / "lama"))
    mistake(photos, tmp_path / "m", "holds no FAR", init=str(tmp_path / "mae"))
    mistake(photos, tmp_path / "lama", "is the --init model", init=str(tmp_path / "lama"))


def test_no_room_no_agreement_nothing_written(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "fit", lambda trial, batch, device: Fit(batch, 10 ** 6, 0.5))
    monkeypatch.setattr(own, "_looking", lambda *_: 1.0)
    assert train_own(photos, tmp_path / "m", preset="smoke", agree=lambda: False, say=silent) is None
    assert train_own(photos, tmp_path / "m", preset="smoke", dry_run=True, say=silent) is None
    free = own.shutil.disk_usage(tmp_path)._replace(free=10 ** 6)
    monkeypatch.setattr(own.shutil, "disk_usage", lambda path: free)
    mistake(photos, tmp_path / "m", r"will take \d+ MB and 1 MB are free")
    assert not (tmp_path / "m").exists()


# the command and the file

def call(*arguments): return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_the_command_asks_for_what_it_needs(photos, tmp_path):
    for arguments, match in (((), "needs pictures and a folder"), ((photos, "-o", tmp_path / "m", "--stage", "mae"), "--stage belongs to"),
                             (("--config", tmp_path / "x.yaml"), "cannot be read"), (("--config", tmp_path / "x.yaml", photos, "--steps", 3), "leave PHOTOS, --steps out")):
        result = call(*arguments)
        assert isinstance(result.exception, FarError) and re.search(match, str(result.exception)), result.output
    assert not (tmp_path / "m").exists()


def test_a_refused_training_leaves_no_folder(photos, tmp_path):
    assert isinstance(call(photos, "-o", tmp_path / "m", "--preset", "huge").exception, FarError)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_stage_is_read_back(preset, tmp_path):
    for stage in ("mae", "far", "hr"):
        config = stage_of_preset(PRESETS[preset], stage, "PHOTOS", "sample")
        text = stage_yaml(config)
        assert parse_stage(yaml.safe_load(text)) == config
        assert all(re.search(r"# \S", line) for line in text.splitlines()), "every line says what it is"
        assert parse_stage(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("path, value, match", [
    (("stage",), "pretrain", "unknown stage 'pretrain': choose one of far, hr, mae"), (("out",), None, "out: .*string"),
    (("data", "foto"), 1, "unknown key 'data.foto': choose from pictures, size"), (("train", "losses", "l2"), 1, "unknown key 'train.losses.l2': choose from adversarial"),
    (("train", "steps"), "many", "train.steps: .*integer.*'many'"), (("train", "batch_size"), 2.5, "train.batch_size: .*2.5"), (("train", "betas"), [0.9], r"train.betas.1: field required"),
    (("train", "schedule"), "linear", "train: unknown schedule 'linear'"), (("mae", "heads"), 5, "mae: width 32 does not divide by 5 heads"), (("data", "crop"), "left", "unknown crop 'left'"),
    (("perceptual",), "vgg", "unknown perceptual loss 'vgg'"), (("train",), 3, "train: .*not 3")])
def test_each_wrong_field_is_named(path, value, match):
    values = json.loads(json.dumps(asdict(stage_of_preset(PRESETS["smoke"], "mae", "PHOTOS"))))
    place = values
    for key in path[:-1]: place = place[key]
    place[path[-1]] = value
    with pytest.raises(FarError, match=match) as error: parse_stage(values, "mae.yaml")
    assert str(error.value).startswith("mae.yaml: ") and "\n" not in str(error.value)


def launch(*arguments):
    "`far` in two processes, as a cluster would."
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
                "--mixed_precision", "no", "--dynamo_backend", "no"]         # --cpu would start one process whatever it is told
    environment = {"PYTHONPATH": str(Path(own.__file__).parent.parent), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*launcher, "-m", "far_nb.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_stages_train_one_after_the_other(photos, tmp_path, monkeypatch):
    "mae.yaml on two processes, as a cluster would; far.yaml and hr.yaml on what came out, in this one."
    short = {"log_every": 1, "eval_every": 0, "sample_every": 0}
    monkeypatch.chdir(tmp_path)
    assert call("--write-config", "mae.yaml", "--stage", "mae", "--preset", "smoke", photos, "-o", "training/mae").exit_code == 0
    values = yaml.safe_load(Path("mae.yaml").read_text())
    values["train"] |= short | {"steps": 2, "batch_size": 4}
    Path("mae.yaml").write_text(yaml.safe_dump(values))
    launched = launch("train", "--config", "mae.yaml")
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stdout.count("model: training/mae/model") == 1
    MAE.from_pretrained("training/mae/model")
    state = torch.load(next(Path("training/mae/checkpoints").glob("*.pt")), weights_only=True)
    assert len(state["random"]) == 2, "two processes took part"
    for stage, changes in (("far", {"steps": 1, "batch_size": 2}), ("hr", {"steps": 1, "batch_size": 2})):
        config = stage_of_preset(PRESETS["smoke"], stage, str(photos))
        Path(f"{stage}.json").write_text(json.dumps(asdict(replace(config, train=replace(config.train, **short, **changes)))))
        assert f"model: training/{stage}/model" in call("--config", f"{stage}.json").stdout
    assert FAR.from_pretrained("training/hr/model").mae is not None


def test_a_launched_evaluation_is_shared_and_told_once(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(33):                                # 32 for the first process, 1 for the second
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "pictures" / f"{number:02d}.png")
    options = ["evaluate", "telea", "--data", str(tmp_path / "pictures"), "--size", "32", "--count", "33", "--json"]
    launched, alone = launch(*options, "-o", tmp_path / "metrics.json"), CliRunner().invoke(app, options)
    assert launched.returncode == 0, launched.stderr[-3000:]
    shared, single = json.loads(launched.stdout), json.loads(alone.stdout)
    assert shared["images"] == 33 and json.loads((tmp_path / "metrics.json").read_text()) == shared
    values = [[entry["value"] or entry["reason"] for entry in found["metrics"]] for found in (shared, single)]
    for one, other in zip(*values, strict=True): assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-9))        # threads change the last bit
    for name, each in single["per_image"].items(): assert shared["per_image"][name] == pytest.approx(each, rel=1e-6), name
    refused = launch("evaluate", tmp_path, tmp_path)
    told = [line for line in refused.stderr.splitlines() if "far: " in line]
    assert refused.returncode and len(told) == 1 and "leave the launcher out" in told[0], refused.stderr[-3000:]
