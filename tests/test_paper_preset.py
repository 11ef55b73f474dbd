"""The paper preset at full size: every number with its source, and one whole training step of each stage on a CPU."""
import shutil
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from far_nb.acr import ACR
from far_nb.core import read_json
from far_nb.data import InpaintingDataset, sample_objects, sample_scenes
from far_nb.experiments import (EXPERIMENTS, PAPER, build_discriminator, build_mae, disagreements, get_experiment, get_preset, model_config,
                                paper_values, train_config)
from far_nb.far import FAR
from far_nb.mae import MAE
from far_nb.masks import MaskSampler
from far_nb.perceptual import HRFLoss
from far_nb.training import finetune_hr, hr_sizes, lr_factor, pretrain_mae, train_far

pytestmark = pytest.mark.usefixtures("two_threads")

PAPER_PRESET = get_preset("paper")


def pictures(task: str) -> InpaintingDataset:
    return InpaintingDataset(sample_scenes("train"), PAPER_PRESET.image_size, MaskSampler(PAPER_PRESET.image_size, sample_objects(count=4)),
                             patch_size=PAPER_PRESET.mae.patch_size, task=task)


def one_step(experiment: str, batch_size: int = 1):
    "The paper's training settings, cut to one step; channels_last is another order in memory, of the same numbers, and twice as fast here."
    config = train_config(PAPER_PRESET, get_experiment(experiment))
    assert lr_factor(config, config.warmup_steps) == 1                # the step has the full rate, as after the warm-up
    return replace(config, steps=1, batch_size=batch_size, warmup_steps=0, schedule="milestones", workers=0, channels_last=True,
                   log_every=1, eval_every=0, sample_every=0)


def copies(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def moved(before: dict, after: dict) -> float:
    "Share of the trained tensors that changed."
    floats = [key for key in before if before[key].is_floating_point()]
    return sum(not torch.equal(before[key], after[key]) for key in floats) / len(floats)


def network_only(weights: dict) -> dict:
    "Without the pyramid, positions and attentions, which get no gradient while their alpha is 0."
    return {key: value for key, value in weights.items() if key.split(".")[0] not in ("pyramid", "position", "attention_before", "attention_after")}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    "One step of each stage, each on what the one before has made: folders, weights before and after, and the optimisers that were made."
    out, made, begin = tmp_path_factory.mktemp("paper"), [], torch.optim.Optimizer.__init__
    def watched(self, groups, defaults):
        begin(self, groups, defaults)
        made.append((type(self).__name__, self.param_groups))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "__init__", watched)
        mae = build_mae(PAPER_PRESET, get_experiment("mae-mixed"))
        weights = {"mae": [copies(mae)]}
        pretrain_mae(mae, pictures("mae"), one_step("mae-mixed", batch_size=2), out / "mae")
        shutil.rmtree(out / "mae" / "checkpoints")
        far, critic, hrf = FAR(MAE.from_pretrained(out / "mae" / "model"), ACR(PAPER_PRESET.acr)), build_discriminator(PAPER_PRESET), HRFLoss(pretrained=False)
        weights["mae"].append(far.mae.state_dict())
        weights["far"] = [copies(far.acr)]
        train_far(far, pictures("far"), one_step("far"), out / "far", discriminator=critic, perceptual=hrf)
        shutil.rmtree(out / "far" / "checkpoints")
        far, critic = FAR.from_pretrained(out / "far" / "model"), build_discriminator(PAPER_PRESET, start=out / "far")
        weights["far"].append(copies(far.acr))
        weights["hr"] = [weights["far"][1]]
        sizes = hr_sizes(PAPER_PRESET.image_size, PAPER_PRESET.hr_size, PAPER_PRESET.hr_step)
        finetune_hr(far, pictures("far"), one_step("hr"), out / "hr", sizes=sizes, discriminator=critic, perceptual=hrf)
        shutil.rmtree(out / "hr" / "checkpoints")
        weights["hr"].append(far.acr.state_dict())
    yield out, weights, made, far, critic
    shutil.rmtree(out)


def test_one_full_size_step_of_pretraining(stages):
    out, weights, *_ = stages
    assert moved(*weights["mae"]) > 0.9                               # all but the two frozen position tables
    assert read_json(out / "mae" / "train.json")["config"]["batch_size"] == 2


def test_one_full_size_step_of_far(stages):
    out, (before, after) = stages[0], stages[1]["far"]
    # With every alpha at 0 the pyramid's weights get no gradient in the first step, but the alphas do.
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("alpha.value") or "alphas." in key)
    assert moved(network_only(before), after) > 0.9
    assert read_json(out / "far" / "train.json")["config"]["losses"] == asdict(PAPER_PRESET.far_train.losses)


def test_one_full_size_step_of_fine_tuning_at_512(stages):
    "It begins with the largest size, and with alphas that have left 0, so that everything is trained."
    out, weights, _, far, _ = stages
    before, after = weights["hr"]
    assert pd.read_csv(out / "hr" / "log.csv")["size"].tolist() == [512]
    assert moved(before, after) > 0.9 and all(value.isfinite().all() for value in after.values())
    assert all(not torch.equal(before[key], after[key]) for key in before if key.startswith("pyramid.deconvs") and key.endswith("conv.weight"))
    assert moved(weights["mae"][1], far.mae.state_dict()) == 0


def test_every_number_of_the_preset_has_its_source(stages):
    "Both ways: each value in the code is explained by one line of the table, and each line is true of the code."
    out, weights, made, far, critic = stages
    kinds = [kind for kind, _ in made]
    assert kinds == ["AdamW", "Adam", "Adam", "Adam", "Adam"]         # MAE; FAR's two; high resolution's two
    values = paper_values() | {"optimiser.mae": kinds[0], "optimiser.acr": kinds[1], "optimiser.discriminator": kinds[2]}
    with pd.option_context("display.max_rows", None, "display.max_colwidth", 60, "display.width", 220): print(pd.DataFrame(map(asdict, PAPER)))
    assert disagreements(values) == []
    # What the optimisers were given is what the table says of the rates.
    rates = {kind: [(group["initial_lr"], tuple(group["betas"]), group["weight_decay"]) for group in groups] for kind, groups in
             zip(("mae", "acr", "discriminator", "hr", "hr discriminator"), (groups for _, groups in made))}
    assert sorted(rates["mae"]) == [(3e-4, (0.9, 0.95), 0.0), (3e-4, (0.9, 0.95), 0.05)]
    assert rates["acr"] == [(1e-3, (0.9, 0.999), 0.0)] and rates["hr"] == [(3e-4, (0.9, 0.999), 0.0)]
    assert rates["discriminator"] == rates["hr discriminator"] == [(1e-4, (0.9, 0.999), 0.0)]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (far.mae, far.acr, critic)]
    assert counts == [values["parameters.mae"], values["parameters.lama"] + values["parameters.priors"], values["parameters.discriminator"]]


@pytest.mark.parametrize("change, complaint", [
    ({"far_train.lr": 2e-3}, "far_train.lr is 0.002, but FAR: rate is 0.001 (paper 4)"),
    ({"masks.weights": (0.5, 0.5, 0.0)}, "masks: brush, object, union"),
    ({"parameters.mae": 1}, "parameters of the MAE is 111982592"),
    ({"hr_train.new_field": 1}, "hr_train.new_field (1) has 0 lines in the table instead of one")])
def test_the_table_is_really_compared(change, complaint):
    found = disagreements(paper_values() | {"optimiser.mae": "AdamW", "optimiser.acr": "Adam", "optimiser.discriminator": "Adam"} | change)
    assert len(found) == 1 and complaint in found[0]


def test_a_line_without_a_value_and_two_lines_for_one_are_found():
    assert disagreements({"a.b": 1, "c": 2}, [replace(PAPER[0], where=where, value=value) for where, value in ((r"a\.b", 1), (r"a\..", 1), ("d", 0))]) == [
        "side of the pictures: nothing is called d", "a.b (1) has 2 lines in the table instead of one", "c (2) has 0 lines in the table instead of one"]


def test_no_experiment_has_the_masked_positions_that_the_paper_lacks():
    networks = [model_config(PAPER_PRESET, experiment) for experiment in EXPERIMENTS.values() if experiment.kind in ("far", "hr")]
    assert len(networks) > 10 and not any(network.masked_position for network in networks)
