"""Presets, experiments and the graph between them; no training."""
import os
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from far_nb.core import FarError, read_json
from far_nb.experiments import (EXPERIMENTS, PRESETS, SETS, TARGETS, Sources, absent, begin_run, build_data, build_discriminator, build_far, build_mae,
                                build_test_set, check_sources, get_experiment, get_preset, make_plan, method_spec, needs, parse_targets, plan_files,
                                resolve, run_options, shown, source_of, test_pictures, train_config, write_plan)
from far_nb.tables import paper_value

SMOKE, TINY, PAPER = PRESETS["smoke"], PRESETS["tiny"], PRESETS["paper"]
TRAINED = [name for name, experiment in EXPERIMENTS.items() if experiment.kind in ("mae", "far")]


def test_every_row_of_the_paper_has_one_experiment():
    rows = [row for experiment in EXPERIMENTS.values() for row in experiment.rows]
    assert len(rows) == len(set(rows))
    assert [sum(number == table for table, _ in rows) for number in range(1, 7)] == [2, 3, 4, 4, 22, 3]
    for number in (1, 2, 3, 4):
        for row in (row for table, row in rows if table == number): assert paper_value(number, row, "PSNR") > 20      # the paper has this row under this name
    assert {name for name, experiment in EXPERIMENTS.items() if {3, 4} <= {number for number, _ in experiment.rows}} == {"far-alpha0"}     # one run, two places


def test_targets_need_just_their_runs():
    assert needs(TINY, "figure2") == needs(TINY, "figure3") == [] and needs(TINY, "table6") == ["speed"]
    assert needs(TINY, "table1") == ["mae-mixed", "far", "mae-partial", "far-partial"]
    assert set(needs(TINY, "table2")) == {"mae-mixed", "mae-normpix", "far", "far-normpix", "far-nocoord", "hr", "hr-normpix", "hr-nocoord"}
    assert set(needs(TINY, "table3")) == {"mae-mixed", "lama", "far-noalpha", "far-alpha0", "far-alpha1"}
    assert set(needs(TINY, "table4")) == {"mae-mixed", "mae-random", "far-alpha0", "far-contextual", "far-random", "far"}
    assert set(needs(TINY, "figure5")) == set(needs(TINY, "table3"))
    assert {"lama", "far", "mae-mixed"} == set(needs(TINY, "figure6"))
    assert {"lama-faces", "far-faces", "mae-faces", "hr", "hr-lama"} < set(needs(TINY, "figure7"))
    for preset in PRESETS.values():
        for target in TARGETS:                                # what a run stands on comes before it
            order = needs(preset, target)
            for name in order:
                experiment = get_experiment(name)
                assert all(order.index(resolve(preset, below)) < order.index(name) for below in (experiment.mae, experiment.start) if below)


def test_long_runs_are_their_own_only_where_ablations_are_shorter():
    assert resolve(TINY, "far-full") == "far" and resolve(PAPER, "far-full") == "far-full"
    assert shown(TINY, "figure6") == ["mae-mixed", "lama", "far"] and shown(PAPER, "figure6") == ["mae-mixed", "lama-full", "far-full"]
    for experiment in EXPERIMENTS.values():                   # an alias is the same network on the same kind of pictures
        if experiment.same_as:
            same = get_experiment(experiment.same_as)
            assert (same.options, same.mae, same.kind) == (experiment.options, experiment.mae, experiment.kind)
            assert train_config(TINY, same) == train_config(TINY, experiment)


@pytest.mark.parametrize("call, said", [
    (lambda: get_preset("huge"), ["huge", "smoke", "tiny", "small", "paper"]),
    (lambda: get_experiment("far-9"), ["far-9", "lama", "mae-random"]),
    (lambda: parse_targets("table4,figure33"), ["figure33", "figure3", "table3"]),
    (lambda: parse_targets(" , "), ["--only", "table4"]),
    (lambda: check_sources(PRESETS["small"]), ["small", "--data"]),
    (lambda: check_sources(TINY, data="/no/such/folder"), ["/no/such/folder"]),
    (lambda: check_sources(TINY, masks="/no/such/folder"), ["/no/such/folder", "--masks"]),
    (lambda: check_sources(TINY, faces="/no/such/folder"), ["/no/such/folder"]),
    (lambda: check_sources(TINY, outputs="/no/such/folder"), ["/no/such/folder", "--outputs"]),
    (lambda: check_sources(TINY, ablation="sample-scenes"), ["tiny", "--ablation-data"]),
    (lambda: source_of(PRESETS["small"], "faces"), ["small", "--faces"]),
    (lambda: build_far(SMOKE, get_experiment("far"), None), ["far", "mae-mixed"]),
])
def test_a_mistake_is_one_line_with_the_valid_choices(call, said):
    with pytest.raises(FarError) as error: call()
    assert "\n" not in str(error.value)
    for word in said: assert word in str(error.value)


def test_only_accepts_spaces_and_repeats():
    assert parse_targets(" table4, figure3,table4") == ["table4", "figure3"]
    assert parse_targets(None) == list(TARGETS)


def test_a_preset_may_train_a_few_networks_only():
    photos = get_preset("tiny-photos")
    plan = make_plan(photos, data="sample-scenes")
    trained = {name.removesuffix("-s0") for name, run in plan["runs"].items() if run["kind"] in ("mae", "far", "hr")}
    assert trained == set(photos.trains) and set(plan["targets"]) == set(photos.targets) == set(parse_targets(None, photos))
    for run in plan["runs"].values(): assert set(run["needs"]) <= set(plan["runs"])                    # nothing stands on what is not trained
    assert plan["targets"]["table4"] == ["far-alpha0-s0/metrics.json", "far-s0/metrics.json"]
    assert plan["absent"]["far-contextual"] == "the preset tiny-photos does not train it" and "telea-scenes" not in plan["absent"]
    with pytest.raises(FarError, match="does not make table1: choose from table3"): parse_targets("table1", photos)


def test_the_paper_preset_is_the_papers():
    of = lambda name: train_config(PAPER, get_experiment(name))
    mae, far, faces = of("mae-mixed"), PAPER.far_train, of("far-faces")
    assert (mae.batch_size, mae.lr, mae.betas, mae.weight_decay, mae.schedule) == (512, 3e-4, (0.9, 0.95), 0.05, "cosine")
    assert mae.steps == 200 * (1_803_460 // 512) and mae.warmup_steps == mae.steps // 20
    assert of("mae-partial").steps == mae.steps // 4 and of("mae-faces").steps == 450 * (68_000 // 512)
    assert (far.steps, far.lr, far.lr_discriminator, far.betas, far.gamma) == (850_000, 1e-3, 1e-4, (0.9, 0.999), 0.5)
    assert far.milestones == (200_000, 400_000, 600_000, 800_000) and of("far-full") == far
    assert (faces.steps, faces.milestones, faces.lr) == (150_000, (100_000,), 1e-3)
    assert (of("hr").steps, of("hr").lr, of("hr").batch_size) == (150_000, 3e-4, 16) == (of("hr-lama").steps, of("hr-lama").lr, of("hr-lama").batch_size)
    assert all(of(name).steps == 150_000 for name, experiment in EXPERIMENTS.items() if experiment.kind == "far" and experiment.data == "ablation")
    assert {which: test_pictures(PAPER, which) for which in SETS} == {"scenes": (36_500, 256), "ablation": (500, 256), "faces": (2_000, 256), "hr": (1_000, 512)}
    weights = asdict(far.losses)
    assert weights == {"adversarial": 10.0, "feature_matching": 100.0, "perceptual": 30.0, "l1": 10.0, "r1": 0.001}


def test_experiments_differ_only_where_they_say():
    full = run_options(TINY, get_experiment("far"))
    for name, experiment in EXPERIMENTS.items():
        if experiment.kind != "far": continue
        options = run_options(TINY, experiment)
        differing = {key for key in options["model"] if options["model"][key] != full["model"][key]}
        assert differing <= set(experiment.options) and {key: options["model"][key] for key in experiment.options} == experiment.options
        others = {key for key in options if options[key] != full[key]} - {"model", "below"}
        assert others == ({"experiment"} if name != "far" else set()) | ({"data"} if experiment.data == "faces" else set())


def test_fine_tuning_keeps_its_starts_network():
    for name in ("hr", "hr-lama", "hr-normpix", "hr-nocoord"):
        options, start = run_options(TINY, get_experiment(name)), run_options(TINY, get_experiment(resolve(TINY, get_experiment(name).start)))
        assert options["model"] == start["model"] and options["below"] == [start]
        assert options["sizes"] == [128, 112, 96, 80, 64, 80, 96, 112]


@pytest.mark.parametrize("name", TRAINED)
def test_every_network_builds_and_runs_forward(name):
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


def test_a_fine_tuned_autoencoder_begins_as_its_start():
    plain, image, mask = build_mae(SMOKE, get_experiment("mae-mixed"), seed=3), torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    mask[:, :, 20:41, 15:50] = 1
    partial = build_mae(SMOKE, get_experiment("mae-partial"), start=plain)
    assert partial.config.partial and torch.equal(partial.reconstruct(image, mask), plain.reconstruct(image, mask))


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
    below = {name: plan["runs"][name]["needs"] for name in plan["runs"]}
    stands_on_mae = lambda name: "mae" in plan["runs"][name]["kind"] or any(map(stands_on_mae, below[name]))
    assert touched == {name for name in plan["runs"] if stands_on_mae(name)} and not touched & {"lama-s0", "hr-lama-s0", "telea-faces-s0", "speed-s0"}
    for path in files: os.utime(path, (1, 1))
    write_plan(tmp_path, replace(SMOKE, mae_train=replace(SMOKE.mae_train, lr=1e-5), test_images=8))     # evaluation only
    assert {path.relative_to(tmp_path).as_posix() for path in files if path.stat().st_mtime != 1} == {"test-scenes.json", "test-ablation.json"}


def test_seeds_are_runs_of_their_own():
    plan = make_plan(SMOKE, seeds=(0, 3))
    assert plan["runs"]["far-s3"]["needs"] == ["mae-mixed-s3"] and plan["runs"]["hr-s3"]["needs"] == ["far-s3"]
    assert "far-s3/metrics.json" in plan["targets"]["table4"] and "lama-s3/train.json" not in plan["targets"]["figure5"]
    once = {run["experiment"] for name, run in plan["runs"].items()} - {run["experiment"] for run in plan["runs"].values() if run["seed"] == 3}
    assert once == {"speed", *(f"{method}-{which}" for method in ("telea", "biharmonic") for which in ("scenes", "faces", "hr"))}      # no seed changes these


def test_a_target_stands_on_all_files_below_it():
    plan = make_plan(SMOKE)
    assert set(plan_files(plan, ["table1"])) == {"far-s0/metrics.json", "far-partial-s0/metrics.json", "mae-mixed-s0/train.json", "far-s0/train.json",
                                                 "mae-partial-s0/train.json", "far-partial-s0/train.json"}
    assert plan_files(plan, ["figure3"]) == [] and plan_files(plan, ["table6"]) == ["speed-s0/metrics.json"]


def test_methods_of_others_take_part_when_their_pictures_are_there(tmp_path):
    (tmp_path / "scenes" / "co-mod-gan").mkdir(parents=True)
    (tmp_path / "scenes" / "co-mod-gan" / "a.png").write_bytes(b"1")
    sources, named = Sources(outputs=str(tmp_path)), {"outputs": str(tmp_path)}
    experiment = get_experiment("co-mod-gan-scenes")
    assert method_spec(TINY, experiment, "runs", sources=sources) == f"folder:{tmp_path}/scenes/co-mod-gan"
    assert "co-mod-gan-scenes-s0" in make_plan(TINY, **named)["runs"] and "co-mod-gan-scenes-s0" not in make_plan(TINY)["runs"]
    missing = absent(TINY, sources)
    assert "co-mod-gan-scenes" not in missing and "scenes/ict" in missing["ict-scenes"] and "far-faces" not in missing
    before = run_options(TINY, experiment, sources=sources)
    (tmp_path / "scenes" / "co-mod-gan" / "b.png").write_bytes(b"2")
    assert run_options(TINY, experiment, sources=sources) != before                # other pictures: measured again


def test_without_faces_everything_else_is_planned():
    missing = absent(PRESETS["small"], Sources(data="sample-scenes"))
    assert {name for name, experiment in EXPERIMENTS.items() if experiment.data == "faces"} <= set(missing) and "--faces" in missing["far-faces"]
    plan = make_plan(PRESETS["small"], data="sample-scenes")
    assert not [name for name in plan["runs"] if "faces" in name] and "hr-s0/train.json" in plan["targets"]["figure7"]


def test_a_run_keeps_its_checkpoints_and_drops_anothers(tmp_path):
    options, model = {"lr": 1.0}, tmp_path / "mae" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    out = begin_run(tmp_path / "far", options, stands_on=[model])
    checkpoint = out / "checkpoints" / "step-00000005.pt"

    def train():
        checkpoint.write_bytes(b"state"); (out / "train.json").write_text("{}")

    train(); begin_run(out, options, stands_on=[model])
    assert checkpoint.exists() and (out / "train.json").exists()
    begin_run(out, {"lr": 2.0}, stands_on=[model])
    assert not checkpoint.exists() and not (out / "train.json").exists()
    assert (out / "replaced" / "checkpoints" / checkpoint.name).read_bytes() == b"state"       # nobody asked to delete it
    train(); (model / "model.safetensors").write_bytes(b"other weights")
    begin_run(out, {"lr": 2.0}, stands_on=[model])              # the same options on a retrained MAE
    assert not checkpoint.exists()


def test_how_often_a_run_saves_does_not_make_it_another(tmp_path):
    options = run_options(PRESETS["smoke"], EXPERIMENTS["far"])
    out = begin_run(tmp_path / "far", options)
    (out / "checkpoints" / "step-00000001.pt").write_bytes(b"state")
    for where, changes, kept in ((options, {"save_every": 7, "workers": 3, "keep": 9}, True), (options["below"][0], {"log_every": 3}, True), (options["below"][0], {"lr": 0.5}, False)):
        where["train"] |= changes
        begin_run(out, options)
        assert (out / "checkpoints" / "step-00000001.pt").exists() == kept


def test_high_resolution_has_pictures_of_its_own_where_there_are_any(tmp_path):
    for part, count in (("train", 3), ("val", 3), ("test", 5)):
        for index in range(count): Image.new("RGB", (70, 70), (index, 0, 0)).save((tmp_path / part).mkdir(exist_ok=True) or tmp_path / part / f"{part}{index}.png")
    preset, sources = replace(PRESETS["smoke"], test_images=9, hr_images=2), Sources(data=str(tmp_path))
    assert {name[:4] for name in build_test_set(preset, "hr", sources)["names"]} == {"test"}
    for index in range(2): Image.new("RGB", (90, 90), (index, 9, 0)).save((tmp_path / "hr").mkdir(exist_ok=True) or tmp_path / "hr" / f"hr{index}.png")
    assert build_test_set(preset, "hr", sources)["names"] == ["hr0.png", "hr1.png"]
    assert len(build_test_set(preset, "scenes", sources)["names"]) == 5 and build_test_set(preset, "hr", sources, "val")["names"][0].startswith("val")


def test_the_paper_is_measured_with_masks_that_were_named(tmp_path, monkeypatch):
    monkeypatch.setattr("far_nb.experiments.find_weights", lambda *given: None)
    named = {"data": "sample-scenes", "faces": "sample-faces", "masks": "sample"}
    with pytest.raises(FarError, match="--test-masks"): check_sources(PRESETS["paper"], **named)
    assert check_sources(PRESETS["paper"], **named, test_masks="sample")["test_masks"] == "sample"
    first, second = (build_test_set(PRESETS["smoke"], "scenes", Sources(test_masks=masks)) for masks in (None, "sample"))
    assert first["hash"] == second["hash"]
