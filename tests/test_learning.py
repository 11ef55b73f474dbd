"""FAR learns to inpaint: on held-out photographs the tiny preset beats the best single colour and its own beginning."""
from dataclasses import replace

import pytest
import torch

from far_nb.evaluation import bootstrap
from far_nb.experiments import build_data, build_discriminator, build_far, build_mae, build_test_set, get_experiment, get_preset, train_config
from far_nb.far import FAR
from far_nb.inpaint import get_method
from far_nb.mae import MAE
from far_nb.perceptual import perceptual_loss
from far_nb.training import pretrain_mae, train_far

pytestmark = pytest.mark.usefixtures("two_threads")

TINY = get_preset("tiny")
STEPS = {"mae": 150, "far": 200}          # enough for a clear margin; the preset itself trains longer


def shortened(experiment: str):
    kind = get_experiment(experiment).kind
    config = train_config(TINY, get_experiment(experiment))
    return replace(config, steps=STEPS[kind], milestones=(round(0.8 * STEPS[kind]),) if kind == "far" else (), warmup_steps=min(config.warmup_steps, 15),
                   eval_every=0, sample_every=0, save_every=10_000)


def hole_psnr(method, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    "PSNR (dB) over the hole's pixels, one number per picture."
    with torch.no_grad():
        raw = torch.cat([method(image, mask) for image, mask in zip(images.split(16), masks.split(16))])
    error = ((raw - images).square() * masks).sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3)))
    return -10 * error.log10()


def test_far_beats_the_mean_colour_and_its_own_beginning(tmp_path):
    mae = MAE.from_pretrained(pretrain_mae(build_mae(TINY, get_experiment("mae-mixed")), build_data(TINY, get_experiment("mae-mixed")),
                                           shortened("mae-mixed"), tmp_path / "mae"))
    experiment = get_experiment("far")
    untrained = build_far(TINY, experiment, mae).eval()
    trained = FAR.from_pretrained(train_far(build_far(TINY, experiment, mae), build_data(TINY, experiment), shortened("far"), tmp_path / "far",
                                            discriminator=build_discriminator(TINY), perceptual=perceptual_loss(TINY.perceptual)))
    held_out = build_test_set(TINY)                                              # photographs and masks never trained on
    score = {name: hole_psnr(method, held_out["images"], held_out["masks"])
             for name, method in {"far": trained, "untrained": untrained, "mean": get_method("mean")}.items()}
    print({name: round(values.mean().item(), 2) for name, values in score.items()})
    for rival, margin in (("mean", 0.3), ("untrained", 1.0)):                    # "mean" is an oracle: the true hole's own mean colour
        gain = score["far"] - score[rival]
        low, high = bootstrap(gain.numpy())
        assert low > margin, f"FAR {score['far'].mean():.2f} dB, {rival} {score[rival].mean():.2f} dB, gain in [{low:.2f}, {high:.2f}]"
