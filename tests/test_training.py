"""Training: what a run computes does not depend on how often it was interrupted, and bad luck ends in one plain line."""
import errno, os, resource, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError, normalise, read_json, rng
from far_nb.data import InpaintingDataset, Photographs
from far_nb.discriminator import PatchDiscriminator
from far_nb.far import FAR
from far_nb.mae import MAE, MAEConfig
from far_nb.masks import MaskSampler
from far_nb.training import TrainConfig, TrainingStopped, lr_factor, pretrain_mae, train_far

SIZE = 32
FAR_CONFIG = TrainConfig(steps=9, batch_size=2, milestones=(4,), ema=0.9, log_every=2, save_every=3, eval_every=5, sample_every=9)
MAE_CONFIG = TrainConfig(steps=8, batch_size=8, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=2, schedule="cosine", log_every=3, save_every=4)


class Pictures(Photographs):
    "Twelve soft pictures; each takes `pause` seconds, and `interrupt` = (n, signal) signals this process when the n-th one is asked for."

    def __init__(self, pause=0.0, interrupt=None):
        super().__init__([Image.fromarray(rng(index).integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize((48, 48)) for index in range(12)])
        self.pause, self.interrupt, self.asked = pause, interrupt, 0

    def load(self, index, at_least=None):
        self.asked += 1
        if self.pause: time.sleep(self.pause)
        if self.interrupt and self.asked == self.interrupt[0]: os.kill(os.getpid(), self.interrupt[1])
        return super().load(index, at_least)


def dataset(task, **options):
    return InpaintingDataset(Pictures(**options), SIZE, MaskSampler(SIZE, area=(0.1, 0.3)), patch_size=8, task=task)


def small_mae():
    torch.manual_seed(0)
    return MAE(MAEConfig(image_size=SIZE, patch_size=8, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2))


def run_far(out, config=FAR_CONFIG, **options):
    mae = small_mae()
    far = FAR(mae, ACR(ACRConfig(width=8, blocks=1, prior_width=16, grid=4)))
    items = [dataset("far")[(9, index)] for index in range(4)]
    eval_set = {"images": torch.stack([item["image"] for item in items]), "masks": torch.stack([item["mask"] for item in items])}
    return train_far(far, dataset("far", **options), config, out, discriminator=PatchDiscriminator(8), perceptual=None, eval_set=eval_set)


def run_mae(out, config=MAE_CONFIG, mae=None, **options):
    return pretrain_mae(mae or small_mae(), dataset("mae", **options), config, out)


def tensors(value, prefix=""):
    "All tensors in nested containers, by path."
    if isinstance(value, torch.Tensor): return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, inner in items for name, tensor in tensors(inner, f"{prefix}/{key}").items()}


def newest(out):
    return torch.load(sorted((Path(out) / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)


def assert_same_run(one, other):
    "Networks, optimisers, average, random numbers, logs and pictures: all equal, bit for bit."
    left, right = tensors(newest(one)), tensors(newest(other))
    assert left.keys() == right.keys() and len(left) > 20
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for file in ("model/model.safetensors", "eval.csv", *(f"samples/{path.name}" for path in (one / "samples").glob("*"))):
        if (one / file).exists(): assert (one / file).read_bytes() == (other / file).read_bytes(), file
    untimed = lambda out: pd.read_csv(out / "log.csv").drop(columns=["seconds", "images_per_s"])
    pd.testing.assert_frame_equal(untimed(one), untimed(other), check_exact=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "These networks are too small to share among threads; the child of the kill test must count as its parent does."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_far(tmp_path_factory):
    out = tmp_path_factory.mktemp("training") / "far"
    run_far(out)
    return out


@pytest.fixture(scope="module")
def whole_mae(tmp_path_factory):
    out = tmp_path_factory.mktemp("training") / "mae"
    run_mae(out)
    return out


def test_same_seed_same_weights(whole_mae, whole_far, tmp_path):
    run_mae(tmp_path / "mae")
    assert_same_run(whole_mae, tmp_path / "mae")
    run_far(tmp_path / "far", replace(FAR_CONFIG, workers=1))           # a data worker changes nothing either
    assert_same_run(whole_far, tmp_path / "far")
    other = run_mae(tmp_path / "other", replace(MAE_CONFIG, seed=1))
    assert (other / "model.safetensors").read_bytes() != (whole_mae / "model/model.safetensors").read_bytes()


def test_killed_run_goes_on_bit_equal(whole_far, tmp_path):
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, __file__, str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "step-00000006.pt").exists():      # a checkpoint within a window of the log (rows every 2, files every 3)
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)                                                     # into the next steps, which must be done again
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (out / "train.json").exists() and newest(out)["step"] == 6
    (out / "checkpoints" / ".step-00000009.pt.x1.pt").write_bytes(b"half")      # what a kill while writing leaves
    with open(out / "log.csv", "a") as file: file.write("8,0.1,")
    run_far(out)
    assert_same_run(whole_far, out)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_with_a_checkpoint(number, whole_mae, tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(TrainingStopped, match=f"{number.name} after step 3 of 8") as stopped:
        run_mae(tmp_path / "run", interrupt=(8 * 2 + 3, number))        # while the third batch is made
    assert stopped.value.checkpoint == tmp_path / "run/checkpoints/step-00000003.pt" and stopped.value.checkpoint.exists()
    assert stopped.value.signal == number and not (tmp_path / "run/train.json").exists()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run_mae(tmp_path / "run")
    assert_same_run(whole_mae, tmp_path / "run")


@pytest.mark.parametrize("damage", ["torn", "flipped bit", "pickle with code"])
def test_unsound_checkpoint_is_passed_over(damage, whole_mae, tmp_path):
    out = tmp_path / "run"
    run_mae(out, interrupt=None)
    (out / "train.json").unlink()
    last = sorted((out / "checkpoints").glob("*.pt"))[-1]
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "torn": last.write_bytes(content[: len(content) // 2])
    elif damage == "flipped bit": last.write_bytes(content)
    else: torch.save({"step": 8, "evil": pytest.fail}, last)
    with pytest.warns(UserWarning, match="step-00000008.pt is not usable .*using the one before"):
        run_mae(out)
    assert_same_run(whole_mae, out)


def test_finished_run_returns_at_once(whole_far):
    before = {path: path.stat().st_mtime_ns for path in whole_far.rglob("*") if path.is_file()}
    assert run_far(whole_far, pause=60) == whole_far / "model"
    assert before == {path: path.stat().st_mtime_ns for path in whole_far.rglob("*") if path.is_file()}


def test_longer_run_goes_on(whole_far, tmp_path):
    run_far(tmp_path / "run", replace(FAR_CONFIG, steps=6))
    run_far(tmp_path / "run")
    left, right = tensors(newest(whole_far)["task"]), tensors(newest(tmp_path / "run")["task"])
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    with pytest.raises(FarError, match="beyond the 3 asked for"): run_far(tmp_path / "run", replace(FAR_CONFIG, steps=3))


def test_other_run_in_the_folder_is_refused(whole_mae, whole_far, tmp_path):
    with pytest.raises(FarError, match=r"holds another run \(lr was 0.001, is 0.002\)"): run_mae(whole_mae, replace(MAE_CONFIG, lr=2e-3))
    with pytest.raises(FarError, match="losses.l1 was 10.0, is 5.0"):
        run_far(whole_far, replace(FAR_CONFIG, losses=replace(FAR_CONFIG.losses, l1=5.0)))
    with pytest.raises(TrainingStopped): run_mae(tmp_path / "run", interrupt=(10, signal.SIGTERM))
    with pytest.raises(FarError, match="seed was 0, is 3"): run_mae(tmp_path / "run", replace(MAE_CONFIG, seed=3))      # not finished either
    run_mae(tmp_path / "run", replace(MAE_CONFIG, log_every=1, save_every=1, keep=5))        # how often to look is free


def test_accumulated_batch_is_the_whole_batch(tmp_path):
    "The MAE has no batch norm, and each picture the same number of masked tokens, so the mean of means is the mean."
    whole = run_mae(tmp_path / "one", replace(MAE_CONFIG, steps=3))
    parts = run_mae(tmp_path / "two", replace(MAE_CONFIG, steps=3, gradient_accumulation=2))
    left, right = MAE.from_pretrained(whole).state_dict(), MAE.from_pretrained(parts).state_dict()
    start = small_mae().state_dict()
    for name in left:
        moved = (left[name] - start[name]).abs().max().item()
        # Adam divides a gradient by its size, so rounding shows in weights whose gradient is about zero: compare on the scale of the movement
        assert (left[name] - right[name]).abs().mean().item() <= 1e-2 * moved + 1e-8, name
    logs = [pd.read_csv(tmp_path / name / "log.csv").loss for name in ("one", "two")]
    np.testing.assert_allclose(*logs, rtol=1e-4)


def test_divergence_stops_before_the_checkpoint(tmp_path):
    with pytest.raises(TrainingStopped): run_mae(tmp_path / "run", interrupt=(8 * 4, signal.SIGTERM))
    mae = small_mae()
    mae.loss = lambda *inputs: MAE.loss(mae, *inputs) * float("nan")
    with pytest.raises(FarError, match=r"diverged at step 5 \(loss nan\): .*step-00000004.pt is from before"): run_mae(tmp_path / "run", mae=mae)
    assert newest(tmp_path / "run")["step"] == 4 and all(tensor.isfinite().all() for tensor in tensors(newest(tmp_path / "run")).values())
    with pytest.raises(FarError, match="diverged at step"):             # finite losses, but a step to infinity just before a checkpoint
        run_mae(tmp_path / "other", replace(MAE_CONFIG, lr=float("inf"), save_every=1, log_every=8, warmup_steps=0))
    assert not list((tmp_path / "other/checkpoints").glob("*"))


def test_full_disk_is_one_line_and_keeps_the_old_checkpoint(tmp_path, monkeypatch, whole_mae):
    out = tmp_path / "run"
    with pytest.raises(TrainingStopped): run_mae(out, interrupt=(8 * 4, signal.SIGTERM))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))          # the kernel cuts the next checkpoint short
    try:
        with pytest.raises(FarError, match="step-00000008.pt could not be written .* MB free.*goes on from .*step-00000004.pt") as raised: run_mae(out)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004.pt"]

    def full(table, row): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr("far_nb.training._Table.append", full)
        with pytest.raises(FarError, match="No space left on device: make room and run again, it goes on from .*step-00000004.pt"): run_mae(out)
    run_mae(out)
    assert_same_run(whole_mae, out)


def test_what_a_run_leaves_behind(whole_far, whole_mae):
    record = read_json(whole_far / "train.json")
    assert record["steps"] == 9 and record["config"]["batch_size"] == 2 and record["data_hash"] == Pictures().hash() and record["images_per_s"] > 0
    assert {"git_commit", "versions"} <= record["provenance"].keys() and record["skipped"] == {}
    log, scores = pd.read_csv(whole_far / "log.csv"), pd.read_csv(whole_far / "eval.csv")
    assert list(log)[:4] == ["step", "seconds", "images_per_s", "lr"] and log.step.tolist() == [2, 4, 6, 8, 9]
    assert {"alpha1", "alpha2", "alpha3", "alpha4", "attention1", "attention2"} <= set(log) and log.alpha1.abs().max() > 0
    assert log.lr.tolist() == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4] and log.notna().all(axis=None)
    assert list(scores) == ["step", "psnr", "ssim", "lpips_lite0", "fid_lite0"] and scores.step.tolist() == [5, 9]
    assert [path.name for path in sorted((whole_far / "checkpoints").iterdir())] == ["step-00000006.pt", "step-00000009.pt"]
    assert Image.open(whole_far / "samples/step-00000009.png").size[0] == 4 * (SIZE + 2) + 2 and list((whole_far / "tb").glob("events*"))
    average = {name.removeprefix("module."): tensor for name, tensor in newest(whole_far)["task"]["ema"].items()}
    kept = FAR.from_pretrained(whole_far / "model").acr.state_dict()
    assert all(torch.equal(kept[name], average[name]) for name in kept)             # the averaged weights are the ones kept
    assert pd.read_csv(whole_mae / "log.csv").step.tolist() == [3, 6, 8] and MAE.from_pretrained(whole_mae / "model").config.width == 16


def test_model_leaves_as_it_came(tmp_path):
    mae = small_mae()
    run_mae(tmp_path / "run", replace(MAE_CONFIG, steps=1, mixed_precision="bf16"), mae=mae)
    assert "forward" not in vars(mae) and not mae.training and all(weight.dtype == torch.float32 for weight in mae.parameters())


@pytest.mark.parametrize("helpful", [True, False])
def test_partial_variant_is_fine_tuned_from_a_trained_mae(helpful, whole_mae, tmp_path):
    "Also when the new layer's random start makes things worse, so that alpha is first pushed beyond 1, where the layer has no say."
    trained, data = MAE.from_pretrained(whole_mae / "model"), dataset("mae")
    torch.manual_seed(5)
    mae = MAE(replace(trained.config, partial=True)).start_from(trained)
    batch = {name: torch.stack([data[0, index][name] for index in range(12)]) for name in ("image", "mask", "token_mask")}
    loss = lambda: mae.loss(normalise(batch["image"]), batch["token_mask"], batch["mask"])
    loss().backward()
    layer = mae.decoder_patch_embed.proj
    assert mae.alpha.grad != 0 and layer.weight.grad.abs().max() == 0
    if (mae.alpha.grad > 0) != helpful:                     # mirror the layer's output at the mask token: the gradient changes its sign
        with torch.no_grad(): layer.weight.neg_(), layer.bias.copy_(2 * mae.mask_token.flatten() - layer.bias)
    before, start = loss().item(), layer.weight.detach().clone()
    run_mae(tmp_path / "partial", replace(MAE_CONFIG, steps=80, log_every=20), mae=mae)
    log = pd.read_csv(tmp_path / "partial/log.csv")
    assert 0.5 < log.alpha.iloc[-1] < 0.999 and log.alpha.iloc[-1] == pytest.approx(mae.effective_alpha().item(), abs=1e-5)
    assert loss().item() < 0.9 * before and (layer.weight - start).abs().mean() > 1e-3
    again = MAE.from_pretrained(tmp_path / "partial/model")
    assert again.config.partial and again.effective_alpha() == mae.effective_alpha()


def test_partial_variant_starts_as_the_mae_it_comes_from(whole_mae):
    trained, data = MAE.from_pretrained(whole_mae / "model"), dataset("mae")
    mae = MAE(replace(trained.config, partial=True, norm_pix=True)).start_from(trained).eval()
    assert mae.effective_alpha() == 1 and mae.config.norm_pix
    image, mask = normalise(data[3]["image"][None]), data[3]["mask"][None]
    with torch.no_grad():
        for one, other in zip(mae.priors(image, mask), trained.priors(image, mask)): assert torch.equal(one, other)
    for wrong, message in (({"depth": 2}, "depth 1 against 2"), ({"width": 32}, "width 16 against 32")):
        with pytest.raises(FarError, match=f"cannot start.*{message}"): mae.start_from(MAE(replace(trained.config, **wrong)))


def test_wrong_settings_are_one_line():
    for options, message in (({"schedule": "step"}, "unknown schedule 'step'"), ({"mixed_precision": "fp8"}, "unknown mixed_precision"),
                             ({"batch_size": 0}, "batch_size is 0"), ({"gradient_accumulation": 3}, "does not split into 3")):
        with pytest.raises(FarError, match=message): TrainConfig(**({"steps": 1, "batch_size": 4} | options))


def test_schedules():
    config = TrainConfig(steps=100, batch_size=1, milestones=(50, 80), warmup_steps=10)
    assert [lr_factor(config, step) for step in (0, 4, 9, 10, 49, 50, 79, 80, 99)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    cosine = replace(config, schedule="cosine")
    assert lr_factor(cosine, 10) == 1 and lr_factor(cosine, 55) == pytest.approx(0.5) and 0 < lr_factor(cosine, 99) < 1e-3


if __name__ == "__main__":                  # the child of the kill test
    run_far(Path(sys.argv[1]), pause=0.05)
