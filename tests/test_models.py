"""Networks at small sizes: every option of the ablations builds, trains and keeps its promises."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError
from far_nb.far import FAR, composite, mae_view
from far_nb.mae import MAE, MAEConfig, gather_visible, patchify, pretraining_pixels, scatter_visible, unpatchify
from far_nb.masks import patch_mask
from far_nb.priors import PriorAttention, PriorPyramid, attend

SMALL = MAEConfig(image_size=64, patch_size=8, width=48, depth=1, heads=4, decoder_width=32, decoder_depth=3, decoder_heads=4)
PAINTER = ACRConfig(width=8, blocks=1, prior_width=32, prior_stride=8, grid=8)


def hole(box: tuple[int, int, int, int], batch: int = 1, size: int = 64) -> torch.Tensor:
    top, left, bottom, right = box
    mask = torch.zeros(batch, 1, size, size)
    mask[..., top:bottom, left:right] = 1
    return mask


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 16), min_size=1, max_size=4))
def test_gather_and_scatter_are_inverse(seed, visible):
    torch.manual_seed(seed)
    token_mask = torch.stack([torch.randperm(16) >= count for count in visible])
    tokens = torch.randn(len(visible), 16, 5)
    packed, keys = gather_visible(tokens, token_mask)
    assert packed.shape[1] == max(max(visible), 1) and (keys is None) == (len(set(visible)) == 1 and visible[0] > 0)
    assert torch.equal(scatter_visible(packed, token_mask, torch.full((1, 1, 5), 7.0)), torch.where(token_mask[..., None], 7.0, tokens))


def test_a_picture_of_a_batch_does_not_depend_on_the_others():
    "Padding to the batch's longest row must not leak."
    torch.manual_seed(0)
    mae, images = MAE(SMALL).eval(), torch.randn(3, 3, 64, 64)
    masks = torch.cat([hole((0, 0, 8, 8)), hole((0, 0, 60, 30)), hole((8, 8, 64, 64))])
    with torch.no_grad():
        together = mae.priors(images, masks)
        for index in range(3):
            alone = mae.priors(images[index:index + 1], masks[index:index + 1])
            assert torch.allclose(together.features[index], alone.features[0], atol=1e-5)
            assert torch.allclose(together.attention[index], alone.attention[0], atol=1e-6)


def test_every_patch_touched_but_known_pixels_left():
    "No visible token, yet partly known patches: the decoder still has keys. A mask over everything is an error."
    mae, image = MAE(SMALL).eval(), torch.randn(1, 3, 64, 64)
    touched = torch.zeros(1, 1, 64, 64)
    touched[..., ::8, :] = 1
    assert patch_mask(touched, 8).all()
    with torch.no_grad():
        priors = mae.priors(image, touched)
    assert priors.features.isfinite().all() and torch.allclose(priors.attention.sum(-1), torch.ones(1, 64), atol=1e-5)
    with pytest.raises(FarError, match="nothing is known"):
        mae.priors(image, torch.ones(1, 1, 64, 64))
    with pytest.raises(FarError, match="resize"):
        mae.priors(image[..., :32], touched)


def test_attention_excludes_wholly_masked_patches_only():
    mae = MAE(SMALL).eval()
    mask = hole((8, 8, 28, 32))                                          # rows 1-2 whole, row 3 half
    with torch.no_grad():
        attention = mae.priors(torch.randn(1, 3, 64, 64), mask).attention[0].view(64, 8, 8)
    assert attention[:, 1:3, 1:4].abs().max() == 0 and attention[:, 3, 1:4].min() > 0


def test_features_can_come_from_an_earlier_layer():
    torch.manual_seed(0)
    last, middle = MAE(SMALL).eval(), MAE(replace(SMALL, feature_layer=2)).eval()
    middle.load_state_dict(last.state_dict())
    image, mask = torch.randn(1, 3, 64, 64), hole((8, 8, 40, 40))
    with torch.no_grad():
        a, b = last.priors(image, mask), middle.priors(image, mask)
    assert torch.equal(a.attention, b.attention) and not torch.allclose(a.features, b.features, atol=1e-3)
    with pytest.raises(FarError, match="feature_layer 4"):
        replace(SMALL, feature_layer=4)


def test_partial_variant_leaves_its_start():
    "Alpha starts on the border of [0,1]; it and the re-encoding must learn all the same."
    torch.manual_seed(0)
    mae = MAE(replace(SMALL, partial=True))
    image, mask = torch.randn(2, 3, 64, 64), hole((10, 10, 40, 44), batch=2)
    token_mask = patch_mask(mask, 8).flatten(1)
    before = mae.decoder_patch_embed.proj.weight.detach().clone()
    optimiser = torch.optim.Adam(mae.parameters(), 1e-2)
    for _ in range(4):
        optimiser.zero_grad()
        mae.loss(image, token_mask, mask).backward()
        optimiser.step()
    assert mae.alpha.item() != 1 and not torch.equal(before, mae.decoder_patch_embed.proj.weight)
    with pytest.raises(FarError, match="pixel mask"):
        mae.loss(image, token_mask)


def test_losses_count_masked_places_only():
    torch.manual_seed(0)
    image, mask = torch.randn(2, 3, 64, 64), hole((10, 10, 40, 44), batch=2)
    token_mask = patch_mask(mask, 8).flatten(1)
    token_mask[:, -3:] = True
    mae = MAE(SMALL)
    error = (mae(image, token_mask) - patchify(image, 8)).square()
    assert mae.loss(image, token_mask).item() == pytest.approx(error[token_mask].mean().item(), rel=1e-5)
    normalised = MAE(replace(SMALL, norm_pix=True))
    normalised.load_state_dict(mae.state_dict())
    target = patchify(image, 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert normalised.loss(image, token_mask).item() == pytest.approx((mae(image, token_mask) - target).square()[token_mask].mean().item(), rel=1e-5)
    pixels = pretraining_pixels(mask, token_mask, 8)
    assert torch.equal(pixels[..., 10:40, 10:44], mask[..., 10:40, 10:44]) and pixels[..., 56:, 40:].min() == 1 and pixels[..., :8, :].max() == 0
    assert torch.equal(unpatchify(patchify(image, 8), 8), image)


@pytest.mark.parametrize("options", [{}, {"alpha": "one"}, {"alpha": "none"}, {"attention": "none"}, {"attention": "contextual"}, {"coordinates": False},
                                     {"masked_position": False}, {"prior_stride": 16}, {"prior_width": None, "attention": "none"}], ids=str)
def test_every_option_trains(options):
    torch.manual_seed(0)
    config = replace(PAINTER, **options)
    far = FAR(MAE(SMALL) if config.prior_width else None, ACR(config)).train()
    image, mask = torch.rand(2, 3, 64, 96), torch.zeros(2, 1, 64, 96)
    mask[..., 16:48, 24:72] = 1
    raw = far(image, mask)
    assert raw.shape == image.shape and 0 <= raw.min() and raw.max() <= 1
    raw.square().mean().backward()
    learned = {name for name, parameter in far.acr.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 0}
    assert {"stem.weight", "head.weight"} <= learned
    assert {name for name in dict(far.acr.named_parameters()) if name.endswith("alpha.value") or ".alphas." in name} <= learned
    expected = {"none": None, "zero": 0.0, "one": 1.0}[config.alpha]
    alphas = far.acr.alphas()
    if config.prior_width and expected is not None: assert [alphas[f"alpha{j}"] for j in (1, 2, 3, 4)] == [expected] * 4
    else: assert "alpha1" not in alphas
    assert ("attention1" in alphas) == (config.attention != "none") and ("distance" in alphas) == config.masked_position
    if far.mae: assert all(parameter.grad is None for parameter in far.mae.parameters())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_prior_attention_takes_any_size(height, width):
    "Uniform features stay uniform under any attention: the average of equal patches is that patch."
    module = PriorAttention(4)
    with torch.no_grad():
        module.alpha.value.fill_(1)
        attention = torch.rand(1, 16, 16).softmax(-1)
        result = module(torch.ones(1, 2, height, width), attention)
    assert result.shape == (1, 2, height, width)
    inner = attend(torch.ones(1, 1, 16, 16), attention, 4)
    assert torch.allclose(inner[..., 2:-2, 2:-2], torch.ones(()), atol=1e-5)


def test_pyramid_follows_the_picture():
    for stride, size in ((16, (64, 96)), (8, (40, 72))):
        maps = PriorPyramid(32, 8, stride)(torch.randn(2, 32, 8, 8), size)
        assert [tuple(level.shape) for level in maps] == [(2, 64 // 2 ** j, size[0] * 2 ** j // 8, size[1] * 2 ** j // 8) for j in range(4)]


def test_the_mae_never_sees_the_hole():
    "Whatever is painted into the hole, at any size, the priors and the picture are the same."
    torch.manual_seed(0)
    far = FAR(MAE(SMALL), ACR(replace(PAINTER, alpha="one"))).eval()
    image, mask = torch.rand(1, 3, 104, 152), torch.zeros(1, 1, 104, 152)
    mask[..., 21:77, 33:101] = 1
    scribbled = torch.where(mask.bool(), torch.rand_like(image), image)
    with torch.no_grad():
        assert torch.equal(far.priors(image, mask).features, far.priors(scribbled, mask).features)
        raw = far(image, mask)
        assert torch.equal(raw, far(scribbled, mask))
    painted = composite(image, mask, raw)
    known = (mask == 0).expand_as(image)
    assert torch.equal(painted[known], image[known]) and torch.equal(painted[~known], raw[~known])
    assert mae_view(image, mask, 64)[1].mean() >= mask.mean()


def test_fine_lines_over_the_whole_picture():
    "A hole that touches every pixel of the MAE's small picture leaves it the averages of known pixels."
    torch.manual_seed(0)
    far = FAR(MAE(SMALL), ACR(PAINTER)).eval()
    image, mask = torch.rand(2, 3, 256, 256), torch.zeros(2, 1, 256, 256)
    mask[0, :, ::4] = 1                                                     # touches every one of the 64 x 64
    mask[1, :, :128] = 1
    scribbled = torch.where(mask.bool(), torch.rand_like(image), image)
    view, small = mae_view(image, mask, 64)
    assert torch.equal(view, mae_view(scribbled, mask, 64)[0]) and small[0].max() == 0 and small[1].mean() == 0.5
    with torch.no_grad():
        assert far(image, mask).isfinite().all()


@pytest.mark.parametrize("make, message", [
    (lambda: FAR(None, ACR(PAINTER)), "needs an MAE"),
    (lambda: FAR(MAE(SMALL), ACR(replace(PAINTER, grid=4))), "grid of 8"),
    (lambda: ACR(replace(PAINTER, prior_width=None)), "prior attention needs an MAE"),
    (lambda: ACR(PAINTER)(torch.rand(1, 3, 60, 64), torch.zeros(1, 1, 60, 64)), "does not divide by 8"),
    (lambda: ACR(PAINTER)(torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 32, 64)), r"got \(1, 3, 64, 64\) and \(1, 1, 32, 64\)"),
    (lambda: ACR(PAINTER)(torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)), "got none"),
    (lambda: replace(PAINTER, alpha="two"), "unknown alpha 'two': choose one of none, one, zero"),
    (lambda: MAEConfig(image_size=60), "not a multiple of patch_size"),
])
def test_mistakes_are_named(make, message):
    with pytest.raises(FarError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    for model in (FAR(MAE(SMALL), ACR(PAINTER)), FAR(None, ACR(replace(PAINTER, prior_width=None, attention="none"))), MAE(SMALL)):
        again = type(model).from_pretrained(model.save_pretrained(tmp_path / "model"))
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(FarError, match="holds no FAR"):
        FAR.from_pretrained(tmp_path / "model")
    with pytest.raises(FarError, match="does not exist"):
        FAR.from_pretrained(tmp_path / "nothing")


def test_a_far_folder_is_no_mae(tmp_path):
    folder = FAR(MAE(SMALL), ACR(PAINTER)).save_pretrained(tmp_path / "far")
    with pytest.raises(FarError, match="holds no MAE alone"):
        MAE.from_pretrained(folder)
