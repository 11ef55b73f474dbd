"""The paper preset at full size: sizes, schedule, and one whole training step of each stage on a CPU."""
from dataclasses import replace

import pytest
import torch

from far_nb.core import read_json
from far_nb.data import InpaintingDataset, sample_objects, sample_scenes
from far_nb.acr import ACR
from far_nb.experiments import build_discriminator, build_mae, get_experiment, get_preset, train_config
from far_nb.far import FAR
from far_nb.mae import MAE
from far_nb.masks import MaskSampler
from far_nb.perceptual import HRFLoss
from far_nb.training import pretrain_mae, train_far

pytestmark = pytest.mark.usefixtures("two_threads")

PAPER = get_preset("paper")


def pictures(task: str) -> InpaintingDataset:
    return InpaintingDataset(sample_scenes("train"), PAPER.image_size, MaskSampler(PAPER.image_size, sample_objects(count=4)),
                             patch_size=PAPER.mae.patch_size, task=task)


def one_step(experiment: str):
    "The paper's training settings, cut to one step of one picture."
    return replace(train_config(PAPER, get_experiment(experiment)), steps=1, batch_size=1, warmup_steps=0, schedule="milestones", workers=0,
                   log_every=1, eval_every=0, sample_every=0)


def moved(before: dict, after: dict) -> float:
    "Share of the trained tensors that changed."
    floats = [key for key in before if before[key].is_floating_point()]
    return sum(not torch.equal(before[key], after[key]) for key in floats) / len(floats)


def test_one_full_size_step_of_each_stage(tmp_path):
    mae = build_mae(PAPER, get_experiment("mae-mixed"))
    before = {key: value.clone() for key, value in mae.state_dict().items()}
    pretrain_mae(mae, pictures("mae"), one_step("mae-mixed"), tmp_path / "mae")
    trained = MAE.from_pretrained(tmp_path / "mae" / "model")
    assert sum(p.numel() for p in trained.parameters()) == 111_982_592
    assert moved(before, trained.state_dict()) > 0.9                  # all but the two frozen position tables
    for checkpoint in (tmp_path / "mae" / "checkpoints").iterdir(): checkpoint.unlink()

    far, discriminator = FAR(trained, ACR(PAPER.acr)), build_discriminator(PAPER)
    counts = [sum(p.numel() for p in module.parameters()) for module in (far.acr, discriminator)]
    assert counts == [27_049_795 + 13_938_696, 6_962_369]
    before = {key: value.clone() for key, value in far.acr.state_dict().items()}
    train_far(far, pictures("far"), one_step("far"), tmp_path / "far", discriminator=discriminator, perceptual=HRFLoss(pretrained=False))
    after = FAR.from_pretrained(tmp_path / "far" / "model").acr.state_dict()
    # With every alpha at 0 the pyramid's weights get no gradient in the first step, but the alphas do.
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("alpha.value") or "alphas." in key)
    network = {key: value for key, value in before.items() if key.split(".")[0] not in ("pyramid", "position", "attention_before", "attention_after")}
    assert moved(network, after) > 0.9
    record = read_json(tmp_path / "far" / "train.json")
    assert record["config"]["losses"] == {"adversarial": 10.0, "feature_matching": 100.0, "perceptual": 30.0, "l1": 10.0, "r1": 0.001}


def test_paper_hyper_parameters():
    "Paper Sec. 4 and the released MAE settings; sources stand beside the preset."
    mae, far = PAPER.mae_train, PAPER.far_train
    epoch = 1_803_460 // 512
    assert (mae.batch_size, mae.steps, mae.warmup_steps) == (512, 200 * epoch, 10 * epoch)
    assert (mae.lr, mae.betas, mae.weight_decay, mae.schedule) == (pytest.approx(1.5e-4 * 512 / 256), (0.9, 0.95), 0.05, "cosine")
    assert (far.steps, far.lr, far.lr_discriminator, far.betas, far.gamma) == (850_000, 1e-3, 1e-4, (0.9, 0.999), 0.5)
    assert far.milestones == (200_000, 400_000, 600_000, 800_000) and PAPER.ablation_steps == 150_000
    assert (PAPER.image_size, PAPER.mae.grid, PAPER.acr.blocks, PAPER.acr.global_ratio) == (256, 16, 9, 0.75)
