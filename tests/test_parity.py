"""The released code's numbers, recorded: every piece of the model and every loss gives them again."""
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fixtures.seeded import seeded_state_dict

from far_nb.acr import ACR, ACRConfig
from far_nb.checkpoints import discriminator_from_released, from_released, load_released, to_released
from far_nb.core import FarError, normalise
from far_nb.discriminator import PatchDiscriminator
from far_nb.losses import discriminator_loss, generator_loss
from far_nb.mae import MAE, MAEConfig
from far_nb.masks import masked_position
from far_nb.priors import attend

pytestmark = pytest.mark.usefixtures("two_threads")

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["256_astronaut", "256_coffee", "512_rocket"]
STEP = {"256_astronaut": 2, "256_coffee": 2, "512_rocket": 4}          # how features and rows were thinned


def shapes(network: str) -> dict:
    return json.loads((FIXTURES / f"keys_{network}.json").read_text())


@cache
def _seeded(network: str, salt: str) -> dict:
    return seeded_state_dict(shapes(network), salt)


def seeded(network: str, salt: str, prefix: str = "") -> dict:
    return {prefix + key: value for key, value in _seeded(network, salt).items()}


@cache
def recorded(name: str) -> dict:
    return dict(np.load(FIXTURES / f"official_{name}.npz"))


def picture(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 255


def hole(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)[None, None].float() / 255


def inputs(name: str) -> dict:
    "Arguments of FAR.forward as the released code received them: at 512 its own 256 px reduction."
    arrays = recorded(name)
    given = {"image": picture(arrays["image"]), "mask": hole(arrays["mask"])}
    if "image_256" in arrays:
        given.update(mae_image=normalise(picture(arrays["image_256"])), mae_mask=hole(arrays["mask_256"]))
    return given


@cache
def model(salt: str):
    return from_released(seeded("mae", salt, "mae.") | seeded("acr", salt, "acr."))


@cache
def painted(name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(str(recorded(name)["salt"]))(**inputs(name))


def mae_inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    given = inputs(name)
    return given.get("mae_image", normalise(given["image"])), given.get("mae_mask", given["mask"])


def largest(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy() - theirs).max())


# Tolerances: 1e-4 on features of order 1 and 1e-5 on attention of order 1/256 are a few hundred float32 roundings deep in a
# network of 20 blocks; a wrong detail (an alpha, an order of channels) shows at 1e-2 and above.
@pytest.mark.parametrize("name", NAMES)
def test_mae_priors_and_reconstruction(name):
    mae, arrays = model(str(recorded(name)["salt"])).mae, recorded(name)
    with torch.no_grad():
        priors, reconstruction = mae.priors(*mae_inputs(name)), mae.reconstruct(*mae_inputs(name))
    assert largest(priors.features[:, ::STEP[name]], arrays["mae_features"]) < 1e-4
    assert largest(priors.attention[:, ::STEP[name]], arrays["mae_scores"]) < 1e-5
    assert largest(reconstruction[..., ::4, ::4], arrays["mae_image"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_partially_masked_variant(name):
    arrays = recorded(name)
    salt = str(arrays["salt"])
    extra = {key: shape for key, shape in shapes("mae_finetune").items() if key not in shapes("mae")}
    assert len(extra) == 3                                               # a tensor depends on its key, shape and salt alone
    with torch.device("meta"):
        mae = MAE(MAEConfig(partial=True)).eval()
    mae.load_state_dict(seeded("mae", salt) | seeded_state_dict(extra, salt), assign=True)
    with torch.no_grad():
        priors = mae.priors(*mae_inputs(name))
    assert largest(priors.features[:, ::4], arrays["mae_finetune_features"]) < 1e-4
    assert largest(priors.attention[:, ::4], arrays["mae_finetune_scores"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_are_equal(name):
    distance, direction = masked_position(hole(recorded(name)["mask"]))
    assert np.array_equal(distance[0].numpy(), recorded(name)["rel_pos"])
    assert np.array_equal(direction[0].numpy(), recorded(name)["direct"])


@pytest.mark.parametrize("name", NAMES)
def test_far_forward(name):
    thinned = painted(name)[..., ::2, ::2] if name.startswith("256") else painted(name)[..., ::4, ::4]
    assert largest(thinned, recorded(name)["generated"]) < 1e-4


@pytest.mark.parametrize("name", ["256_astronaut", "256_coffee"])
def test_far_makes_the_mae_view_itself(name):
    "Without mae_image and mae_mask the model resizes and normalises; at 256 px that is the identity."
    given = inputs(name)
    with torch.no_grad():
        priors = model(str(recorded(name)["salt"])).priors(given["image"], given["mask"])
    assert largest(priors.features[:, ::2], recorded(name)["mae_features"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_discriminator_and_losses(name):
    arrays, given = recorded(name), inputs(name)
    discriminator = discriminator_from_released(seeded("discriminator", str(arrays["salt"])))
    fake, real, mask = painted(name), given["image"], given["mask"]
    for image, theirs in ((fake, "disc_logits_fake"), (real, "disc_logits_real")):
        logits = discriminator(image)[0]
        assert largest(logits, arrays[theirs]) < 1e-5 * np.abs(arrays[theirs]).max()
    terms = generator_loss(fake, real, mask, discriminator, None)[1] | discriminator_loss(fake, real, mask, discriminator)[1]
    for ours, theirs in {"adversarial": "loss_gen_adv", "feature_matching": "loss_feature_matching", "l1": "loss_l1",
                         "d_real": "loss_disc_real", "d_fake": "loss_disc_fake", "d_r1": "loss_grad_penalty"}.items():
        assert terms[ours].item() == pytest.approx(float(arrays[theirs]), rel=1e-5), ours


def released_prior_attention(features: torch.Tensor, attention: torch.Tensor, grid: int) -> torch.Tensor:
    """Prior attention of one picture as the released code computes it: a transposed convolution whose filters are the patches.

    Odd rates: padding r//2 + 1, the first grid x grid patches, and the one missing row and column replicated (DESIGN: odd rate).
    """
    rate = features.shape[-1] // grid
    padding = rate // 2 + rate % 2
    padded = F.pad(features, [padding] * 4, mode="replicate")
    filters = torch.stack([padded[0, :, y * rate:y * rate + 2 * rate, x * rate:x * rate + 2 * rate] for y in range(grid) for x in range(grid)])
    scores = attention[0].T.reshape(1, grid * grid, grid, grid)
    result = F.conv_transpose2d(scores, filters, stride=rate, padding=padding) / 4
    missing = features.shape[-1] - result.shape[-1]
    return F.pad(result, (0, missing, 0, missing), mode="replicate")


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_prior_attention_is_the_transposed_convolution(size):
    generator = torch.Generator().manual_seed(size)
    features = torch.randn(1, 8, size, size, generator=generator)
    attention = torch.randn(1, 256, 256, generator=generator).mul(2).softmax(-1)
    assert torch.allclose(attend(features, attention, 16), released_prior_attention(features, attention, 16), atol=1e-5)


def test_far_forward_at_384(monkeypatch):
    "An odd rate (48/16 = 3) through the whole network: our bmm against the transposed convolution in its place."
    far, given = model(str(recorded("512_rocket")["salt"])), inputs("512_rocket")
    given["image"], given["mask"] = (given[key][..., 64:448, 64:448].contiguous() for key in ("image", "mask"))
    with torch.no_grad():
        ours = far(**given)
        monkeypatch.setattr("far_nb.priors.attend", released_prior_attention)
        theirs = far(**given)
    assert ours.shape[-2:] == (384, 384) and float((ours - theirs).abs().max()) < 1e-4


def test_paper_sizes():
    count = lambda parameters: sum(p.numel() for p in parameters)
    with torch.device("meta"):
        mae, acr, discriminator = MAE(), ACR(), PatchDiscriminator()
    prior = [p for name, p in acr.named_parameters() if name.split(".")[0] in ("pyramid", "position", "attention_before", "attention_after")]
    assert count(mae.parameters()) == 111_982_592
    assert count(acr.parameters()) - count(prior) == 27_049_795
    assert count(prior) == 13_938_696
    assert count(discriminator.parameters()) == 6_962_369


def test_names_go_both_ways():
    salt = str(recorded("256_astronaut")["salt"])
    state = seeded("mae", salt, "mae.") | seeded("acr", salt, "acr.")
    back = to_released(model(salt))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def small_released() -> dict:
    "A released-style state dict of a small FAR."
    from far_nb.far import FAR
    torch.manual_seed(0)
    mae = MAE(MAEConfig(image_size=64, patch_size=16, width=48, depth=1, heads=12, decoder_width=32, decoder_depth=1, decoder_heads=16))
    return to_released(FAR(mae, ACR(ACRConfig(width=8, blocks=1, prior_width=32, grid=4))))


def test_lightning_file_round_trip_and_refusals(tmp_path):
    state = small_released()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    far = load_released(tmp_path / "last.ckpt")
    assert all(torch.equal(value, state[key]) for key, value in to_released(far).items())
    torch.save({"state_dict": state, "hparams": Path}, tmp_path / "code.ckpt")          # a pickle that names something to import
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:5000])
    for bad in ("code.ckpt", "torn.ckpt", "absent.ckpt"):
        with pytest.raises(FarError, match=bad):
            load_released(tmp_path / bad)


def test_wrong_keys_are_named():
    state = small_released()
    del state["acr.G.bn2.bias"]
    state["acr.G.conv2.weight"] = torch.zeros(1, 2)
    with pytest.raises(FarError, match=r"1 missing: acr\.G\.bn2\.bias.*mis-shaped: acr\.G\.conv2\.weight \(1, 2\)"):
        from_released(state)
    with pytest.raises(FarError, match="head.bias"):
        from_released(state | {"head.bias": torch.zeros(1)})
    with pytest.raises(FarError, match="missing"):
        from_released({key: value for key, value in state.items() if not key.startswith("mae.")})
