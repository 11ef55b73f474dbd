"Metrics in both protocols against naive computations, and results that are strict JSON."
import json
import math
import warnings

import lpips as lpips_package
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from far_nb import evaluation
from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError
from far_nb.evaluation import PSNR_CAP, bootstrap, composite_uint8, evaluate, fid, frechet_distance, lpips, psnr, quick_evaluate, ssim
from far_nb.far import FAR
from far_nb.inpaint import Method
from far_nb.perceptual import FeatureNet, MissingWeights

torch.set_num_threads(1)
ALEXNET, INCEPTION = "alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05-6726825d.pth"


pytestmark = pytest.mark.usefixtures("offline")


def pictures(count, size, seed=0):
    "Smooth uint8 pictures (count,3,size,size)."
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1) * 255).byte()


def noisy(images, amount=20, seed=1):
    noise = torch.randint(-amount, amount + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).byte()


def arrays(images): return images.movedim(1, -1).numpy()


@pytest.fixture(scope="module")
def test_pictures():
    images = pictures(5, 40).float() / 255
    masks = torch.zeros(5, 1, 40, 40)
    for k in range(5): masks[k, :, 5:15 + 4 * k, 10:30] = 1
    return images, masks


@pytest.fixture(scope="module")
def darker(): return Method("darker", lambda images, masks, names: images * 0.7)


# ---- eight bits

def test_standard_rounds_and_paper_truncates():
    image, raw, mask = torch.zeros(1, 3, 1, 2), torch.full((1, 3, 1, 2), 0.999), torch.tensor([[[[0.0, 1.0]]]])
    assert composite_uint8(image, mask, raw, "standard")[0, 0, 0].tolist() == [0, 255]
    assert composite_uint8(image, mask, raw, "paper")[0, 0, 0].tolist() == [0, 254]


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_known_pixels_keep_their_eight_bits(protocol):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(composite_uint8(levels / 255, torch.zeros(1, 1, 16, 16), torch.rand(1, 3, 16, 16), protocol), levels)


# ---- PSNR, SSIM

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 12), width=st.integers(1, 12), amount=st.integers(1, 255))
def test_psnr_formulas(seed, height, width, amount):
    true = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pred = (true.astype(int) + np.random.default_rng(seed + 1).integers(-amount, amount + 1, true.shape)).clip(0, 255).astype(np.uint8)
    mse = sum((int(a) / 255 - int(b) / 255) ** 2 for a, b in zip(pred.flat, true.flat)) / true.size
    assert psnr(pred, true) == pytest.approx(-10 * math.log10(mse) if mse else math.inf)
    assert psnr(pred, true, "paper") == pytest.approx(1 - 10 * math.log10(mse + 1e-7))


def naive_ssim(x, y, data_range):
    "One (H,W) channel, 7x7 windows one by one, variances over n - 1."
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    windows = [(x[i:i + 7, j:j + 7], y[i:i + 7, j:j + 7]) for i in range(x.shape[0] - 6) for j in range(x.shape[1] - 6)]
    scores = []
    for a, b in windows:
        covariance = ((a - a.mean()) * (b - b.mean())).sum() / 48
        scores.append((2 * a.mean() * b.mean() + c1) * (2 * covariance + c2) / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var(ddof=1) + b.var(ddof=1) + c2)))
    return np.mean(scores)


def test_ssim_is_rgb_with_range_255_or_grey_with_range_2():
    true = pictures(1, 20)
    x, y = arrays(noisy(true))[0], arrays(true)[0]
    assert ssim(x, y) == pytest.approx(np.mean([naive_ssim(x[..., c].astype(float), y[..., c].astype(float), 255) for c in range(3)]), abs=1e-9)
    weights = np.array([0.2125, 0.7154, 0.0721])      # ITU-R BT.709, as in skimage's rgb2gray
    assert ssim(x, y, "paper") == pytest.approx(naive_ssim(x / 255 @ weights, y / 255 @ weights, 2), abs=1e-9)
    assert ssim(x // 4, y // 4, "paper") > naive_ssim(x // 4 / 255 @ weights, y // 4 / 255 @ weights, 1) + 0.005      # flatters the dark


def test_tensors_and_arrays_give_the_same():
    true = pictures(1, 16)[0]
    pred = noisy(true)
    for metric in (psnr, ssim):
        for protocol in ("standard", "paper"):
            values = {metric(pred, true, protocol), metric(pred / 255, true / 255, protocol), metric(pred.movedim(0, -1).numpy(), true.movedim(0, -1).numpy(), protocol)}
            assert len(values) == 1


def test_wrong_protocol_and_too_small_pictures_are_errors():
    image = pictures(1, 6)[0]
    with pytest.raises(FarError, match="paper, standard"): psnr(image, image, "papre")
    with pytest.raises(FarError, match="7x7"): ssim(image, image)


# ---- LPIPS

def package_lpips(trunk, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips_package.LPIPS(net="alex", pnet_rand=True, verbose=False, **options)
    network.net = trunk
    return network


def test_lpips_lite0_is_the_packages_formula_with_one_fifth_per_stage():
    true = pictures(3, 48)
    reference = package_lpips(FeatureNet.load(), lpips=False)
    reference.scaling_layer = torch.nn.Identity()
    with torch.no_grad(): expected = reference(noisy(true) / 255, true / 255).flatten().numpy() / 5
    values = lpips(noisy(true), true, "lite0", batch_size=2)
    assert values.shape == (3,) and np.allclose(values, expected, rtol=1e-4)
    assert np.array_equal(lpips(true, true, "lite0"), np.zeros(3))


def test_lpips_alex_is_the_package_with_the_file_that_was_found(tmp_path, monkeypatch):
    torch.manual_seed(0)
    trunk = torchvision.models.AlexNet()
    torch.save({name: value for name, value in trunk.state_dict().items() if name.startswith("features.")}, tmp_path / ALEXNET)
    monkeypatch.setenv("FAR_NB_WEIGHTS", str(tmp_path))
    true = pictures(2, 64)

    def stages(x):
        maps = []
        for index, layer in enumerate(trunk.features):
            x = layer(x)
            if index in (1, 4, 7, 9, 11): maps.append(x.clone())
        return maps

    slices = torch.nn.Module(); slices.forward = stages
    with torch.no_grad(): expected = package_lpips(slices)(2 * (noisy(true) / 255) - 1, 2 * (true / 255) - 1).flatten().numpy()
    assert np.allclose(lpips(noisy(true), true, "alex"), expected, rtol=1e-4)
    with pytest.raises(FarError, match="32x32"): lpips(true[..., :20, :20], true[..., :20, :20])


# ---- FID

class Flat(torch.nn.Module):
    num_features = 12

    def forward(self, images): return F.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.mark.parametrize("count", [2, 5, 12, 13, 60])
def test_frechet_distance_is_torchmetrics(count):
    real, fake = pictures(count, 16, 1) / 255, pictures(count + 3, 16, 2) / 255 * 0.8
    metric = FrechetInceptionDistance(Flat(), normalize=True)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance(Flat()(fake).numpy(), Flat()(real).numpy())
    assert ours == pytest.approx(float(metric.compute()), rel=1e-3, abs=1e-5)      # theirs: float32 result, square roots of singular products
    assert ours == frechet_distance(Flat()(fake).numpy(), Flat()(real).numpy())


def test_frechet_distance_of_shifted_and_equal_sets():
    features = np.random.default_rng(0).standard_normal((50, 200))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features + 0.5, features) == pytest.approx(0.25 * 200)      # equal covariances: the means alone
    with pytest.raises(FarError, match="two pictures"): frechet_distance(features[:1], features)


def naive_fid(fake, real):
    "The formula with a symmetric square root of one covariance."
    covariances = [np.cov(features, rowvar=False) for features in (fake, real)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    return ((fake.mean(0) - real.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances) - 2 * shared


def test_fid_lite0_pools_pictures_of_128_pixels():
    real = pictures(6, 40)
    network = FeatureNet.load()
    features = [network.pooled(F.interpolate(images / 255, size=(128, 128), mode="bilinear", align_corners=False)).detach().double().numpy()
                for images in (noisy(real), real)]
    assert fid(noisy(real), real, "lite0") == pytest.approx(naive_fid(*features), rel=1e-3)
    assert fid(noisy(real), real, "lite0") == pytest.approx(fid(noisy(real), real, "lite0", "paper"), rel=1e-3)      # enlarging: no antialias


@pytest.mark.parametrize("protocol, antialias", [("standard", True), ("paper", False)])
def test_fid_protocols_differ_by_the_antialiasing_of_shrinking(protocol, antialias):
    real = pictures(3, 200)
    network = FeatureNet.load()
    features = [network.pooled(F.interpolate(images / 255, size=(128, 128), mode="bilinear", align_corners=False, antialias=antialias)).detach().numpy()
                for images in (noisy(real, 60), real)]
    assert fid(noisy(real, 60), real, "lite0", protocol) == pytest.approx(frechet_distance(*features), rel=1e-5)
    assert fid(noisy(real, 60), real, "lite0", "paper") != pytest.approx(fid(noisy(real, 60), real, "lite0", "standard"), rel=1e-3)


def test_fid_inception_is_torchmetrics_network_in_standard_and_plain_bilinear_in_paper(tmp_path, monkeypatch):
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        random = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(random.state_dict(), tmp_path / INCEPTION)
    monkeypatch.setenv("FAR_NB_WEIGHTS", str(tmp_path))
    real = pictures(2, 310)
    fake = noisy(real, 60)
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(tmp_path / INCEPTION))      # antialias by default
    features = [metric.inception(images).double().numpy() for images in (fake, real)]
    assert fid(fake, real) == pytest.approx(frechet_distance(*features), rel=1e-3)
    metric.inception.INPUT_IMAGE_SIZE = 299

    def plain(images):
        resized = F.interpolate(images.float(), size=(299, 299), mode="bilinear", align_corners=False)
        with monkeypatch.context() as patch:      # their network insists on resizing uint8 itself: hand it the resized floats
            patch.setattr("torchmetrics.image.fid.vassert", lambda *a: None)
            return metric.inception(resized).double().numpy()

    assert fid(fake, real, protocol="paper") == pytest.approx(frechet_distance(plain(fake), plain(real)), rel=1e-3)


def test_absent_weights_are_reported_not_fetched():
    images = pictures(2, 40)
    with pytest.raises(MissingWeights, match=f"AlexNet weights absent.*{ALEXNET}"): lpips(images, images, "alex")
    with pytest.raises(MissingWeights, match=f"Inception weights absent.*{INCEPTION}"): fid(images, images, "inception")
    with pytest.raises(FarError, match="alex, lite0"): lpips(images, images, "vgg")


def test_a_file_that_is_another_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FAR_NB_WEIGHTS", str(tmp_path))
    for name in (ALEXNET, INCEPTION): torch.save({"weight": torch.zeros(2)}, tmp_path / name)
    images = pictures(2, 40)
    with pytest.raises(FarError, match=ALEXNET): lpips(images, images, "alex")
    with pytest.raises(FarError, match=INCEPTION): fid(images, images, "inception")


# ---- bootstrap

def test_bootstrap_is_the_percentiles_of_resampled_means():
    values = np.random.default_rng(0).normal(20, 3, 30)
    low, high = bootstrap(values, seed=3)
    assert low < values.mean() < high and bootstrap(values, seed=3) == (low, high) != bootstrap(values, seed=4)
    half_width = 1.96 * values.std() / np.sqrt(30)
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.15)      # a thousand draws: the normal interval within sampling error
    with pytest.raises(FarError): bootstrap([])


# ---- evaluate

def test_evaluate_is_strict_json_with_every_metric_in_both_protocols(test_pictures, darker):
    result = evaluate(darker, *test_pictures, run="r", experiment="far", preset="tiny", dataset="d", data_hash="h", steps=7, seed=1)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["run"], result["experiment"], result["preset"], result["dataset"], result["data_hash"], result["steps"], result["seed"], result["images"]) \
        == ("r", "far", "tiny", "d", "h", 7, 1, 5)
    rows = {(row["metric"], row["protocol"]): row for row in result["metrics"]}
    names = ["PSNR", "SSIM", "FID", "LPIPS", "FID (lite0)", "LPIPS (lite0)"]
    assert len(result["metrics"]) == 12 and set(rows) == {(name, protocol) for name in names for protocol in ("standard", "paper")}
    for (name, protocol), row in rows.items():
        if name in ("FID", "LPIPS"): assert row["value"] is None and "absent" in row["reason"]
        else: assert row["reason"] is None and row["images"] == 5
        if name in ("PSNR", "SSIM", "LPIPS (lite0)"):
            values = result["per_image"][f"{name}/{protocol}"]
            assert row["value"] == pytest.approx(np.mean(values)) and len(values) == 5 and row["ci_low"] <= row["value"] <= row["ci_high"]
        else: assert row["ci_low"] is None and row["ci_high"] is None
    assert 0.9 < rows["PSNR", "paper"]["value"] - rows["PSNR", "standard"]["value"] < 1.1
    assert {"git_commit", "versions"} <= set(result["provenance"])


def test_evaluate_judges_the_hole_only(test_pictures, darker):
    images, masks = test_pictures
    elsewhere = Method("same in the hole", lambda images, masks, names: images * 0.7 * masks + (1 - images) * (1 - masks))
    assert evaluate(darker, images, masks)["metrics"] == evaluate(elsewhere, images, masks)["metrics"]


def test_evaluate_does_not_depend_on_the_batch_size(test_pictures, darker):
    assert evaluate(darker, *test_pictures, batch_size=2)["metrics"] == evaluate(darker, *test_pictures, batch_size=5)["metrics"]


def test_a_perfect_method_has_a_finite_psnr(test_pictures):
    result = evaluate(Method("truth", lambda images, masks, names: images), *test_pictures)
    values = {(row["metric"], row["protocol"]): row["value"] for row in result["metrics"]}
    assert values["PSNR", "standard"] == PSNR_CAP and values["PSNR", "paper"] == pytest.approx(71)
    assert values["SSIM", "standard"] == values["SSIM", "paper"] == 1 and values["LPIPS (lite0)", "standard"] == values["FID (lite0)", "standard"] == 0


def test_one_picture_has_no_fid(test_pictures, darker):
    images, masks = test_pictures
    rows = {(row["metric"], row["protocol"]): row for row in evaluate(darker, images[:1], masks[:1])["metrics"]}
    assert rows["FID (lite0)", "standard"]["value"] is None and "two pictures" in rows["FID (lite0)", "standard"]["reason"]
    assert rows["PSNR", "standard"]["ci_low"] == rows["PSNR", "standard"]["ci_high"]
    with pytest.raises(FarError, match="empty"): evaluate(darker, images[:0], masks[:0])


def test_evaluate_reads_a_folder_of_results_by_name(test_pictures, tmp_path):
    images, masks = test_pictures
    for name, image in zip("abcde", images):
        torchvision.io.write_png((image * 255).byte(), str(tmp_path / f"{name}.png"))
    result = evaluate(f"folder:{tmp_path}", images, masks, names=[f"{name}.jpg" for name in "abcde"], batch_size=2)
    assert result["per_image"]["PSNR/standard"] == [PSNR_CAP] * 5


def test_quick_evaluate_is_evaluates_standard_and_leaves_the_network_in_training(test_pictures):
    torch.manual_seed(0)
    lama = FAR(None, ACR(ACRConfig(width=4, blocks=1, prior_width=None, attention="none"))).train()
    quick = quick_evaluate(lama, *test_pictures)
    assert lama.training and lama.acr.training
    full = {(row["metric"], row["protocol"]): row["value"] for row in evaluate(lama, *test_pictures)["metrics"]}
    assert quick == {"psnr": full["PSNR", "standard"], "ssim": full["SSIM", "standard"], "lpips_lite0": full["LPIPS (lite0)", "standard"],
                     "fid_lite0": full["FID (lite0)", "standard"]}
    assert math.isnan(quick_evaluate(lama, *(each[:1] for each in test_pictures))["fid_lite0"])


def test_large_sets_are_judged_a_part_at_a_time(monkeypatch):
    "Predictions of 36,500 pictures need not fit the memory; the numbers are those of all at once."
    images = torch.rand(70, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masks, seen = (images[:, :1] > 0.6).float(), []
    def half(images, masks, names):
        seen.append(names)
        return images * 0 + 0.5
    judged = lambda: evaluate(Method("half", half), images, masks, names=[f"{k}" for k in range(70)], batch_size=16)
    whole, counts = judged(), []
    seen.clear()
    monkeypatch.setattr(evaluation, "_AT_ONCE", 32)
    composite = evaluation.composite_uint8
    monkeypatch.setattr(evaluation, "composite_uint8", lambda images, *rest: counts.append(len(images)) or composite(images, *rest))
    parts = judged()
    assert counts[::2] == [32, 32, 6] and [name for names in seen for name in names] == [f"{k}" for k in range(70)]
    assert parts["metrics"] == whole["metrics"] and parts["per_image"] == whole["per_image"]
