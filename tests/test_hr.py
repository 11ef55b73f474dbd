"""Fine-tuning at changing sizes: each step has its size, whoever makes its samples, and however often the run was stopped."""
import json, os, signal, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError, rng
from far_nb.discriminator import PatchDiscriminator
from far_nb.far import FAR
from far_nb.losses import discriminator_loss, generator_loss
from far_nb.mae import MAE, MAEConfig
from far_nb.masks import MaskSampler
from far_nb.training import TrainConfig, TrainingStopped, finetune_hr, hr_sizes, train_far
from test_training import assert_same_run, dataset, newest, small_mae, tensors

SIZES = hr_sizes(32, 48, 8)                                             # 48, 40, 32, 40
CONFIG = TrainConfig(steps=10, batch_size=2, ema=0.9, log_every=1, save_every=5, sample_every=10)


def networks():
    "FAR and discriminator; the pictures and masks that FAR is trained on are noted in `far.seen`."
    far = FAR(small_mae(), ACR(ACRConfig(width=8, blocks=1, prior_width=16, prior_stride=8, grid=4)))
    far.seen = []
    far.register_forward_pre_hook(lambda far, inputs: far.training and far.seen.append([list(tensor.shape) for tensor in inputs]))
    return far, PatchDiscriminator(8)


def run_hr(out, config=CONFIG, sizes=SIZES, **options):
    far, discriminator = networks()
    finetune_hr(far, dataset("far", **options), config, out, sizes=sizes, discriminator=discriminator, perceptual=None)
    return far


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("hr") / "run"
    run_hr(out)
    return out


def test_sweep():
    sweep = hr_sizes(256, 512, 16)
    assert len(sweep) == 32 and sweep[:3] == (512, 496, 480) and sweep[15:18] == (272, 256, 272) and sweep[-1] == 496
    assert {abs(one - other) for one, other in zip(sweep, sweep[1:] + sweep[:1])} == {16}, "neighbours differ by one step, also from sweep to sweep"
    assert SIZES == (48, 40, 32, 40) and hr_sizes(64, 128, 64) == (128, 64)
    for wrong in ((512, 256, 16), (256, 256, 16), (256, 512, 0), (256, 512, -16), (256, 512, 24), (0, 512, 16)):
        with pytest.raises(FarError, match="no sweep of sizes"): hr_sizes(*wrong)


def test_each_step_has_its_size(tmp_path):
    "All micro-batches of a step have it, pictures and masks, and the log tells it."
    far = run_hr(tmp_path / "run", replace(CONFIG, steps=6, batch_size=4, gradient_accumulation=2))
    expected = [SIZES[step % 4] for step in range(6)]
    assert far.seen == [[[2, 3, size, size], [2, 1, size, size]] for size in expected for _ in range(2)]
    assert pd.read_csv(tmp_path / "run/log.csv")["size"].tolist() == expected


def test_one_size_is_plain_training(tmp_path):
    far, discriminator = networks()
    train_far(far, dataset("far"), CONFIG, tmp_path / "plain", discriminator=discriminator, perceptual=None)
    run_hr(tmp_path / "hr", sizes=(32,))
    plain, hr = (tensors(newest(tmp_path / name)["task"]) for name in ("plain", "hr"))
    assert plain.keys() == hr.keys() and [name for name in plain if not torch.equal(plain[name], hr[name])] == []
    assert "size" not in pd.read_csv(tmp_path / "plain/log.csv")
    with pytest.raises(FarError, match="another run .*sizes was None, is .32, 48."): run_hr(tmp_path / "plain", sizes=(32, 48))


@pytest.mark.parametrize("step", [3, 6])
def test_stopped_within_a_sweep_goes_on_bit_equal(step, whole, tmp_path):
    with pytest.raises(TrainingStopped, match=f"after step {step} of 10"): run_hr(tmp_path / "run", interrupt=(2 * step, signal.SIGTERM))
    with pytest.raises(FarError, match="another run .*sizes was"): run_hr(tmp_path / "run", sizes=SIZES[::-1])
    far = run_hr(tmp_path / "run")
    assert [picture[-1] for picture, _ in far.seen] == [SIZES[later % 4] for later in range(step, 10)]
    assert_same_run(whole, tmp_path / "run")


def test_workers_change_nothing(whole, tmp_path):
    run_hr(tmp_path / "run", replace(CONFIG, workers=2))
    assert_same_run(whole, tmp_path / "run")


def test_processes_agree_on_the_size(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], env=alike | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                 stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try: errors = [child.communicate(timeout=180)[1] for child in children]
    finally:
        for child in children: child.kill()
    assert [child.returncode for child in children] == [0, 0], errors
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == [[[1, 3, size, size], [1, 1, size, size]] for size in (48, 40, 32, 40, 48)]
    assert pd.read_csv(tmp_path / "run/log.csv")["size"].tolist() == [48, 40, 32, 40, 48]


@pytest.mark.parametrize("sizes", [(), (32, 36), (64, 0), (-32,)])
def test_wrong_sizes_are_refused_before_anything_runs(sizes, tmp_path):
    with pytest.raises(FarError, match="give multiples of 8 px"): run_hr(tmp_path / "run", sizes=sizes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("image_size, patch, sizes", [(64, 8, range(64, 129, 8)), (64, 8, (32, 48)), (256, 16, range(256, 513, 16))])
def test_every_size_of_a_sweep_trains(image_size, patch, sizes):
    "The MAE sees its own size; features, attention and masked positions are fitted to each size, and all weights get a gradient."
    torch.manual_seed(0)
    mae = MAE(MAEConfig(image_size=image_size, patch_size=patch, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2))
    far = FAR(mae, ACR(ACRConfig(width=4, blocks=1, prior_width=16, prior_stride=patch, grid=image_size // patch, alpha="one"))).train()
    discriminator = PatchDiscriminator(4)
    for size in sizes:
        image, mask = torch.rand(1, 3, size, size), torch.from_numpy(MaskSampler(64)(rng(size), size))[None, None].float()
        fake = far(image, mask)
        assert fake.shape == image.shape
        (generator_loss(fake, image, mask, discriminator, None)[0] + discriminator_loss(fake, image, mask, discriminator)[0]).backward()
        gradients = {name: weight.grad for name, weight in far.acr.named_parameters() if weight.requires_grad}
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values()), size
        assert gradients["attention_before.alpha.value"] != 0 and gradients["pyramid.alphas.0.value"] != 0
        far.zero_grad()


if __name__ == "__main__":                  # a child of the two-process test
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), sys.argv[2]
    (out / f"{rank}.json").write_text(json.dumps(run_hr(out / "run", replace(CONFIG, steps=5, sample_every=0)).seen))
