"""Presets, experiments and the graph between them; no training."""
import os
from dataclasses import asdict, replace

import pytest
import torch

from far_nb.core import FarError, read_json
from far_nb.experiments import (EXPERIMENTS, PRESETS, TARGETS, begin_run, build_data, build_discriminator, build_far, build_mae, build_test_set,
                                check_sources, get_experiment, get_preset, make_plan, needs, parse_targets, run_options, train_config, write_plan)
from far_nb.tables import paper_value

SMOKE, TINY = PRESETS["smoke"], PRESETS["tiny"]


def test_every_row_of_tables_3_and_4_has_one_experiment():
    rows = [row for experiment in EXPERIMENTS.values() for row in experiment.rows]
    assert len(rows) == len(set(rows)) == 8
    for number, row in rows:
        assert paper_value(number, row, "PSNR") > 20          # the paper has this row under this name
    shared = [experiment.name for experiment in EXPERIMENTS.values() if len(experiment.rows) == 2]
    assert shared == ["far-alpha0"]                           # Table 4's first row is Table 3's third


def test_targets_need_just_their_runs():
    assert needs("figure3") == []
    assert set(needs("table3")) == {"mae-mixed", "lama", "far-noalpha", "far-alpha0", "far-alpha1"}
    assert set(needs("table4")) == {"mae-mixed", "mae-random", "far-alpha0", "far-contextual", "far-random", "far"}
    assert set(needs("figure5")) == set(needs("table3"))
    assert {"lama", "far", "mae-mixed"} == set(needs("figure6"))
    for target in TARGETS:                                    # what a run stands on comes before it
        order = needs(target)
        assert all(order.index(EXPERIMENTS[name].mae) < order.index(name) for name in order if EXPERIMENTS[name].mae)


@pytest.mark.parametrize("call, said", [
    (lambda: get_preset("huge"), ["huge", "smoke", "tiny", "small", "paper"]),
    (lambda: get_experiment("far-9"), ["far-9", "lama", "mae-random"]),
    (lambda: parse_targets("table4,figure33"), ["figure33", "figure3", "table3"]),
    (lambda: parse_targets(" , "), ["--only", "table4"]),
    (lambda: check_sources(PRESETS["small"]), ["small", "--data"]),
    (lambda: check_sources(TINY, data="/no/such/folder"), ["/no/such/folder"]),
    (lambda: check_sources(TINY, masks="/no/such/folder"), ["/no/such/folder", "--masks"]),
    (lambda: build_far(SMOKE, get_experiment("far"), None), ["far", "mae-mixed"]),
])
def test_a_mistake_is_one_line_with_the_valid_choices(call, said):
    with pytest.raises(FarError) as error: call()
    assert "\n" not in str(error.value)
    for word in said: assert word in str(error.value)


def test_only_accepts_spaces_and_repeats():
    assert parse_targets(" table4, figure3,table4") == ["table4", "figure3"]
    assert parse_targets(None) == list(TARGETS)


def test_the_paper_preset_is_the_papers():
    paper = PRESETS["paper"]
    mae, far = train_config(paper, get_experiment("mae-mixed")), paper.far_train
    assert (mae.batch_size, mae.lr, mae.betas, mae.weight_decay, mae.schedule) == (512, 3e-4, (0.9, 0.95), 0.05, "cosine")
    assert mae.steps == 200 * (1_803_460 // 512) and mae.warmup_steps == mae.steps // 20
    assert (far.steps, far.lr, far.lr_discriminator, far.betas, far.gamma) == (850_000, 1e-3, 1e-4, (0.9, 0.999), 0.5)
    assert far.milestones == (200_000, 400_000, 600_000, 800_000)
    assert all(train_config(paper, experiment).steps == 150_000 for experiment in EXPERIMENTS.values() if experiment.kind == "far")
    weights = asdict(far.losses)
    assert weights == {"adversarial": 10.0, "feature_matching": 100.0, "perceptual": 30.0, "l1": 10.0, "r1": 0.001}


def test_experiments_differ_only_where_they_say():
    full = run_options(TINY, get_experiment("far"))
    for name, experiment in EXPERIMENTS.items():
        if experiment.kind != "far": continue
        options = run_options(TINY, experiment)
        differing = {key for key in options["model"] if options["model"][key] != full["model"][key]}
        assert differing <= set(experiment.options) and {key: options["model"][key] for key in experiment.options} == experiment.options
        assert {key for key in options if options[key] != full[key]} - {"model", "mae"} == ({"experiment"} if name != "far" else set())


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_builds_and_runs_forward(name):
    experiment = get_experiment(name)
    mae = build_mae(SMOKE, get_experiment(experiment.mae or name if experiment.kind == "mae" else experiment.mae or "mae-mixed"))
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    mask[:, :, 20:40, 16:50] = 1
    if experiment.kind == "mae":
        assert mae.reconstruct(image, mask).shape == image.shape
        return
    far = build_far(SMOKE, experiment, mae if experiment.mae else None).eval()
    with torch.no_grad(): raw = far(image, mask)
    assert raw.shape == image.shape and raw.min() >= 0 and raw.max() <= 1
    assert far.acr.config.alpha == experiment.options.get("alpha", "zero")


def test_building_is_repeatable_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (build_discriminator(SMOKE, seed=3).state_dict() for _ in range(2))
    other = build_discriminator(SMOKE, seed=4).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_masks_of_the_two_autoencoders_differ_and_hide_the_same_share():
    mixed, random = (build_data(SMOKE, get_experiment(name)) for name in ("mae-mixed", "mae-random"))
    tokens = [(mixed[index]["token_mask"], random[index]["token_mask"]) for index in range(4)]
    assert all(a.sum() == b.sum() == 48 for a, b in tokens)                       # 75 % of 8×8
    assert any(not torch.equal(a, b) for a, b in tokens)


def test_test_pictures_are_fixed_and_not_those_of_the_curves():
    first, again, curves = build_test_set(SMOKE), build_test_set(SMOKE), build_test_set(SMOKE, split="val")
    assert first["hash"] == again["hash"] and len(first["images"]) == SMOKE.test_images
    assert len(curves["images"]) == SMOKE.eval_images
    photographs = [{name.split("#")[0] for name in part["names"]} for part in (first, curves)]
    assert not photographs[0] & photographs[1]


def test_the_plan_writes_only_what_changed(tmp_path):
    plan = read_json(write_plan(tmp_path, SMOKE))
    assert plan == make_plan(SMOKE)
    files = [path for path in tmp_path.rglob("*.json")]
    for path in files: os.utime(path, (1, 1))
    write_plan(tmp_path, SMOKE)
    assert all(path.stat().st_mtime == 1 for path in files)
    write_plan(tmp_path, replace(SMOKE, mae_train=replace(SMOKE.mae_train, lr=1e-5)))        # MAEs and what stands on them, not LaMa
    touched = {path.parent.name for path in files if path.stat().st_mtime != 1}
    assert touched == {name for name in plan["runs"] if name != "lama-s0"}
    for path in files: os.utime(path, (1, 1))
    write_plan(tmp_path, replace(SMOKE, mae_train=replace(SMOKE.mae_train, lr=1e-5), test_images=8))     # evaluation only
    assert {path.relative_to(tmp_path).as_posix() for path in files if path.stat().st_mtime != 1} == {"test.json", "figures/options.json"}


def test_seeds_are_runs_of_their_own():
    plan = make_plan(SMOKE, seeds=(0, 3))
    assert len(plan["runs"]) == 2 * len(EXPERIMENTS) and plan["runs"]["far-s3"]["mae"] == "mae-mixed-s3"
    assert "far-s3/metrics.json" in plan["targets"]["table4"]


def test_a_run_keeps_its_checkpoints_and_drops_anothers(tmp_path):
    options, model = {"lr": 1.0}, tmp_path / "mae" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    out = begin_run(tmp_path / "far", options, stands_on=model)
    checkpoint = out / "checkpoints" / "step-00000005.pt"

    def train():
        checkpoint.write_bytes(b"state"); (out / "train.json").write_text("{}")

    train(); begin_run(out, options, stands_on=model)
    assert checkpoint.exists() and (out / "train.json").exists()
    begin_run(out, {"lr": 2.0}, stands_on=model)
    assert not checkpoint.exists() and not (out / "train.json").exists()
    train(); (model / "model.safetensors").write_bytes(b"other weights")
    begin_run(out, {"lr": 2.0}, stands_on=model)              # the same options on a retrained MAE
    assert not checkpoint.exists()
