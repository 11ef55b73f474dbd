"The perceptual networks and losses: right weights, right gradients, honest errors."
import os
import pickle

import pytest
import timm
import torch
from skimage import data
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from far_nb.core import FarError
from far_nb.perceptual import FeatureNet, HRFLoss, MissingWeights, PerceptualLoss, find_weights, load_weights, perceptual_loss

torch.set_num_threads(1)


def square(picture, size):
    tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    return TF.resize(TF.center_crop(tensor, [min(tensor.shape[-2:])] * 2), [size, size], antialias=True).clamp(0, 1)


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def segmentation_encoder():
    "A random state dict under the names of the ADE20K release."
    torch.manual_seed(1)
    names = {"conv1.0": "conv1", "conv1.1": "bn1", "conv1.3": "conv2", "conv1.4": "bn2", "conv1.6": "conv3", "bn1": "bn3"}
    network = timm.create_model("resnet50", stem_type="deep", stem_width=64, output_stride=8, num_classes=0, zero_init_last=False)
    state = {}
    for key, value in network.state_dict().items():
        stem = next((old for old in names if key.startswith(old + ".")), None)
        state[key if stem is None else names[stem] + key[len(stem):]] = value
    return network.eval(), state


@pytest.mark.parametrize("picture, label", [("chelsea", 285), ("coffee", 967), ("rocket", 657)])
def test_the_weights_name_pictures(picture, label):
    network = FeatureNet.load()
    assert int(network.network.classifier(network.pooled(square(getattr(data, picture)(), 224))).argmax()) == label


def test_stages_have_the_documented_shapes_and_can_be_chosen():
    network, image = FeatureNet.load(), torch.rand(2, 3, 64, 96)
    maps = network(image)
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip(network.channels, (2, 4, 8, 16, 32))]
    assert network.pooled(image).shape == (2, network.num_features)
    for chosen, expected in zip(network(image, (1, 3)), (maps[1], maps[3])): assert torch.equal(chosen, expected)


def test_frozen_even_when_told_to_train():
    network = FeatureNet()
    network.train()
    assert not any(module.training for module in network.modules()) and not any(p.requires_grad for p in network.parameters())
    assert FeatureNet.load() is FeatureNet.load()


def test_loss_is_the_scaled_sum_of_stage_errors():
    fake, real = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss, network = PerceptualLoss((0, 2, 4)), FeatureNet.load()
    naive = sum(((a - b) ** 2).mean() / e for a, b, e in list(zip(network(fake), network(real), (50, 95, 80, 60, 15)))[::2])
    assert torch.allclose(loss(fake, real), naive / 6, rtol=1e-5)
    assert loss(real, real) == 0


def test_gradient_reaches_the_fake_only_and_matches_finite_differences():
    loss = PerceptualLoss((0, 1)).double()
    fake, real = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fake.requires_grad_(), real.requires_grad_()
    gradient, = torch.autograd.grad(loss(fake, real), fake)
    direction = torch.randn(fake.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad(): slope = (loss(fake + step * direction, real) - loss(fake - step * direction, real)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-4)      # ReLU6 kinks crossed by 1e-6 are rare
    loss(fake, real).backward()
    assert real.grad is None


def test_magnitude_is_that_of_the_loss_it_stands_for():
    images = torch.cat([square(getattr(data, name)(), 64) for name in ("chelsea", "coffee", "rocket", "astronaut")])
    filled = images.clone()
    filled[..., 14:50, 14:50] = images.mean((2, 3), keepdim=True)
    for stages in ((0, 1, 2), (0, 1, 2, 3)): assert 0.1 < PerceptualLoss(stages)(filled, images) < 0.35


def test_blur_costs_more_than_an_equal_pixel_error_of_brightness():
    cup = square(data.coffee(), 128)
    blurred = TF.gaussian_blur(cup, 11, 3.0)
    darker = cup * (1 - (F.mse_loss(blurred, cup) / cup.square().mean()).sqrt())
    assert torch.isclose(F.mse_loss(darker, cup), F.mse_loss(blurred, cup), rtol=1e-3)
    loss = PerceptualLoss()
    assert loss(blurred, cup) > 2 * loss(darker, cup)


def test_hrf_equals_the_segmentation_encoder_it_is_loaded_from(segmentation_encoder, tmp_path):
    network, state = segmentation_encoder
    torch.save(state, tmp_path / "encoder_epoch_20.pth")
    fake, real = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def stages(x):
        x = network.maxpool(network.act1(network.bn1(network.conv1((x - mean) / std))))
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
            yield x

    naive = sum(((a - b) ** 2).mean() for a, b in zip(stages(fake), stages(real)))
    for weights in (state, tmp_path / "encoder_epoch_20.pth"): assert torch.allclose(HRFLoss(weights)(fake, real), naive, rtol=1e-5)


def test_hrf_maps_keep_an_eighth_of_the_resolution():
    loss = HRFLoss(pretrained=False).train()
    assert [tuple(m.shape[1:]) for m in loss.network(torch.rand(1, 3, 64, 64))] == [(256, 16, 16), (512, 8, 8), (1024, 8, 8), (2048, 8, 8)]
    assert not any(module.training for module in loss.modules())
    fake = torch.rand(1, 3, 64, 64, requires_grad=True)
    loss(fake, torch.rand(1, 3, 64, 64)).backward()
    assert fake.grad.abs().sum() > 0


def test_absent_weights_say_where_they_were_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FAR_NB_WEIGHTS", str(tmp_path / "mine"))
    with pytest.raises(MissingWeights) as error: HRFLoss()
    message = str(error.value)
    assert "\n" not in message and "encoder_epoch_20.pth" in message and str(tmp_path / "mine") in message and "checkpoints" in message
    assert issubclass(MissingWeights, FarError)


def test_weights_are_found_in_both_places(monkeypatch, tmp_path):
    cache = tmp_path / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "net.pth").write_bytes(b"")
    assert find_weights("net.pth", "a network's") == cache / "net.pth"
    monkeypatch.setenv("FAR_NB_WEIGHTS", str(tmp_path))
    (tmp_path / "net.pth").write_bytes(b"")
    assert find_weights("net.pth", "a network's") == tmp_path / "net.pth"


class Malicious:
    def __reduce__(self): return os.system, ("touch owned",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"conv1.weight": Malicious()}, protocol=2), b"PK\x03\x04torn"])
def test_torn_and_malicious_weight_files_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(FarError, match="weights.pth"): load_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "owned").exists()


def test_another_networks_state_dict_is_refused(segmentation_encoder):
    state = dict(segmentation_encoder[1])
    del state["layer4.2.conv3.weight"]
    with pytest.raises(FarError, match="layer4.2.conv3.weight"): HRFLoss(state)


def test_names():
    assert isinstance(perceptual_loss("lite0", stages=(0, 1)), PerceptualLoss) and perceptual_loss("none") is None
    assert isinstance(perceptual_loss("hrf", pretrained=False), HRFLoss)
    with pytest.raises(FarError, match="hrf, lite0, none"): perceptual_loss("vgg")
    with pytest.raises(FarError, match="stages"): PerceptualLoss((7,))
