"Any picture and mask in, the same picture with its hole filled out; methods by name; errors in one line."
import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from torch.nn import functional as F

from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError, denormalise, normalise
from far_nb.far import FAR
from far_nb.inpaint import METHODS, Method, get_method, inpaint
from far_nb.mae import MAE, MAEConfig

torch.set_num_threads(1)
MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I"]
KEPT = {"RGB", "L", "1", "RGBA", "LA", "I;16", "I"}


def make_far(mae=True):
    torch.manual_seed(0)
    if not mae: return FAR(None, ACR(ACRConfig(width=4, blocks=1, prior_width=None, attention="none"))).eval()
    config = MAEConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, feature_layer=1)
    return FAR(MAE(config), ACR(ACRConfig(width=4, blocks=1, prior_width=16, grid=4))).eval()


@pytest.fixture(scope="module")
def far(): return make_far()


@pytest.fixture(scope="module")
def photograph(): return picture("RGB", (45, 33), 0)


def picture(mode, size, seed):
    "Random picture of a mode; random in all its bits."
    generator, (width, height) = np.random.default_rng(seed), size
    if mode in ("I;16", "I"): return Image.fromarray(generator.integers(0, 65536, (height, width)).astype(np.uint16 if mode == "I;16" else np.int32))
    if mode in ("LA", "RGBA"): return Image.fromarray(generator.integers(0, 256, (height, width, len(mode)), dtype=np.uint8))
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def square_mask(size, low=0.3, high=0.6):
    mask = np.zeros(size[::-1], bool)
    mask[int(low * size[1]):int(high * size[1]) + 1, int(low * size[0]):int(high * size[0]) + 1] = True
    return mask


def pixels(image): return np.array(image)


# ---- the promises

@settings(max_examples=60, deadline=None)
@example(mode="RGB", width=1, height=35, seed=0, share=0.95, name="far")          # every pixel of the MAE's small picture is touched
@given(mode=st.sampled_from(MODES), width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 10**6),
       share=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]), name=st.sampled_from(["mean", "far", "lama", "telea"]))
def test_size_mode_and_known_pixels_hold_for_any_input(networks, mode, width, height, seed, share, name):
    image = picture(mode, (width, height), seed)
    mask = np.random.default_rng(seed).random((height, width)) < share
    if mask.all():
        with pytest.raises(FarError, match="covers"): inpaint(image, mask, networks.get(name, name))
        return
    result = inpaint(image, mask, networks.get(name, name))
    assert result.size == image.size
    if not mask.any():
        assert result.mode == image.mode and np.array_equal(pixels(result), pixels(image))
        return
    assert result.mode == (mode if mode in KEPT else "RGB")
    before = pixels(image if mode in KEPT else image.convert("RGB"))
    assert result.mode in ("I", "I;16") or pixels(result).dtype == before.dtype
    assert np.array_equal(pixels(result)[~mask], before[~mask])


@pytest.fixture(scope="module")
def networks(far): return {"far": far, "lama": make_far(mae=False)}


def test_the_hole_is_what_the_method_predicted(photograph, far):
    image, mask = photograph.resize((48, 32)), square_mask((48, 32))      # sides that need no padding
    x, m = torch.from_numpy(pixels(image)).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask)[None, None].float()
    with torch.no_grad(): raw = far(x, m)[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels(inpaint(image, mask, far))[mask] / 255 - raw[mask]).max() <= 0.5 / 255 + 1e-6      # rounded


def test_no_hole_gives_the_picture_back_without_asking_the_model(photograph):
    for mode in ("RGB", "CMYK", "P"):
        image = photograph.convert(mode)
        result = inpaint(image, np.zeros((33, 45)), Method("broken", None))
        assert result.mode == mode and np.array_equal(pixels(result), pixels(image)) and result is not image


def test_all_hole_says_what_to_do(photograph, tmp_path):
    photograph.save(tmp_path / "me.png")
    with pytest.raises(FarError, match="me.png.*invert"): inpaint(tmp_path / "me.png", np.ones((33, 45)), "mean")
    with pytest.raises(FarError, match="b.png covers"): Method("m", None)(torch.rand(2, 3, 4, 4), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4), ["a.png", "b.png"])


# ---- masks

def as_png(mask):
    file = io.BytesIO()
    Image.fromarray((mask * 255).astype(np.uint8)).save(file, "PNG")
    return file


MASKS = {"bool": lambda m: m, "0/1 integers": lambda m: m.astype(np.uint8), "0/255": lambda m: (m * 255).astype(np.uint8), "float": lambda m: m.astype(np.float32),
         "soft": lambda m: np.where(m, 0.6, 0.4), "tensor": lambda m: torch.from_numpy(m)[None].float(), "(H,W,1)": lambda m: m[..., None],
         "PIL L": lambda m: Image.fromarray((m * 255).astype(np.uint8)), "PIL 1": lambda m: Image.fromarray(m), "PIL RGB": lambda m: Image.fromarray((m * 255).astype(np.uint8)).convert("RGB"),
         "PIL F": lambda m: Image.fromarray((m * 255).astype(np.float32)), "bytes": lambda m: as_png(m).getvalue(), "file": lambda m: io.BytesIO(as_png(m).getvalue()),
         "twice the size": lambda m: m.repeat(2, 0).repeat(2, 1)}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_mean_the_same_hole(photograph, kind):
    mask = square_mask(photograph.size)
    assert np.array_equal(pixels(inpaint(photograph, MASKS[kind](mask), "telea")), pixels(inpaint(photograph, mask, "telea")))


def test_inverted_and_bad_masks(photograph, tmp_path):
    mask = square_mask(photograph.size)
    assert np.array_equal(pixels(inpaint(photograph, ~mask, "telea", invert=True)), pixels(inpaint(photograph, mask, "telea")))
    with pytest.raises(FarError, match=r"\(33, 45, 3\)"): inpaint(photograph, np.zeros((33, 45, 3)), "telea")
    (tmp_path / "mask.png").write_bytes(as_png(mask).getvalue()[:60])
    with pytest.raises(FarError, match="mask.png"): inpaint(photograph, tmp_path / "mask.png", "telea")


# ---- pictures

def test_files_are_read_upright_and_bad_ones_named(photograph, tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photograph.save(tmp_path / "phone.png", exif=rotated)
    mask = square_mask((33, 45))
    result = inpaint(tmp_path / "phone.png", mask, "mean")
    assert result.size == (33, 45) and np.array_equal(pixels(result)[~mask], pixels(photograph.transpose(Image.Transpose.ROTATE_270))[~mask])
    (tmp_path / "cut.png").write_bytes((tmp_path / "phone.png").read_bytes()[:500])
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("cut.png", "text.jpg", "missing.png"):
        with pytest.raises(FarError, match=name): inpaint(tmp_path / name, mask, "mean")
    with pytest.raises(FarError, match="floating"): inpaint(Image.fromarray(np.random.rand(8, 8).astype(np.float32)), square_mask((8, 8)), "mean")


def test_sixteen_bits_are_filled_with_sixteen_bits():
    image, mask = Image.fromarray(np.full((20, 20), 40_000, np.uint16)), square_mask((20, 20))
    filled = pixels(inpaint(image, mask, "telea"))[mask].astype(int)
    assert np.abs(filled - 40_000).max() <= 2 * 257      # OpenCV's own error on a constant: up to two of its eight-bit levels


def test_transparency_stays_outside_and_the_hole_is_opaque(photograph):
    image, mask = photograph.copy(), square_mask(photograph.size)
    image.putalpha(Image.fromarray(np.where(mask, 0, 200).astype(np.uint8)))      # the user erased the hole
    alpha = pixels(inpaint(image, mask, "telea"))[..., 3]
    assert (alpha[mask] == 255).all() and (alpha[~mask] == 200).all()
    palette = photograph.quantize(16)
    palette.info["transparency"] = 3
    assert inpaint(palette, mask, "mean").mode == "RGBA"


def test_colour_profile_stays_with_the_mode(photograph):
    image, mask = photograph.copy(), square_mask(photograph.size)
    image.info["icc_profile"] = b"profile"
    assert inpaint(image, mask, "mean").info["icc_profile"] == b"profile"
    cmyk = image.convert("CMYK")
    cmyk.info["icc_profile"] = b"profile"
    assert "icc_profile" not in inpaint(cmyk, mask, "mean").info


# ---- methods

@pytest.fixture(scope="module")
def batch():
    images = F.interpolate(torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), size=(24, 40), mode="bicubic").clamp(0, 1)
    return images, torch.from_numpy(np.stack([square_mask((40, 24)), square_mask((40, 24), 0.5, 0.9)]))[:, None].float()


@pytest.mark.parametrize("name", ["telea", "biharmonic"])
def test_classical_methods_look_at_known_pixels_only(batch, name):
    images, masks = batch
    raw = get_method(name)(images, masks)
    assert raw.shape == images.shape and raw.min() >= 0 and raw.max() <= 1
    assert torch.equal(raw, get_method(name)(images * (1 - masks) + masks, masks))
    mean = get_method("mean")(images, masks)
    assert ((raw - images) ** 2 * masks).sum() < ((mean - images) ** 2 * masks).sum()      # smooth pictures: better than any one colour


def test_biharmonic_continues_a_ramp_exactly():
    ramp = torch.linspace(0, 1, 24).expand(1, 3, 24, 24)
    mask = torch.from_numpy(square_mask((24, 24)))[None, None].float()
    assert torch.allclose(get_method("biharmonic")(ramp, mask), ramp, atol=1.5 / 255)      # what is known has eight bits


def test_mean_is_the_best_single_colour(batch):
    images, masks = batch
    colours = get_method("mean")(images, masks)
    for index in range(2):
        inside = images[index][:, masks[index, 0].bool()]
        assert torch.allclose(colours[index, :, 0, 0], inside.mean(1)) and colours[index].std((1, 2)).max() == 0


def test_networks_are_padded_by_reflection_and_cut_back(far, monkeypatch):
    seen = {}
    forward = FAR.forward

    def spy(self, image, mask):
        seen.update(image=image, mask=mask)
        return forward(self, image, mask)

    monkeypatch.setattr(FAR, "forward", spy)
    images, masks = torch.rand(1, 3, 21, 40), torch.zeros(1, 1, 21, 40)
    masks[..., 18:21, 30:40] = 1                                           # a hole at the corner goes on in the mirror
    assert get_method(far)(images, masks).shape == images.shape
    assert torch.equal(seen["image"], F.pad(images, (0, 8, 0, 11), mode="reflect")) and torch.equal(seen["mask"], F.pad(masks, (0, 8, 0, 11), mode="reflect"))
    get_method(far)(images[..., :1, :7], masks[..., :1, :7])
    assert seen["image"].shape == (1, 3, 16, 16) and torch.equal(seen["image"][..., 5, 7:], images[..., 0, 6:7].expand(-1, -1, 9))


def test_a_network_predicts_in_evaluation_mode_and_is_left_as_it_was(batch):
    far = make_far().train()
    statistics = {name: value.clone() for name, value in far.state_dict().items()}
    raw = get_method(far)(*batch)
    assert far.acr.training and all(torch.equal(value, statistics[name]) for name, value in far.state_dict().items())
    assert torch.equal(raw, get_method(far.eval())(*batch)) and not far.training


def test_saved_networks_are_methods(batch, far, tmp_path):
    lama = make_far(mae=False)
    far.save_pretrained(tmp_path / "far"), lama.save_pretrained(tmp_path / "lama"), far.mae.save_pretrained(tmp_path / "mae")
    for spec, same, name in ((f"far:{tmp_path}/far", far, "far"), (tmp_path / "far", far, "far"), (f"lama:{tmp_path}/lama", lama, "lama"), (f"mae:{tmp_path}/mae", far.mae, "mae")):
        method = get_method(spec, device="cpu")
        assert method.name == name and torch.equal(method(*batch), get_method(same)(*batch))
    for wrong in (f"lama:{tmp_path}/far", f"mae:{tmp_path}/far", f"far:{tmp_path}/mae", f"far:{tmp_path}/nothing"):
        with pytest.raises(FarError): get_method(wrong)
    weights = tmp_path / "far" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FarError, match="no sound FAR"): get_method(f"far:{tmp_path}/far")


def test_mae_reconstruction_is_resized_to_the_picture(far):
    images, masks = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    masks[..., 8:20, 8:20] = 1
    with torch.no_grad(): expected = denormalise(far.mae.reconstruct(normalise(images), masks)).clamp(0, 1)
    assert torch.allclose(get_method(far.mae)(images, masks), expected)
    assert get_method(far.mae)(torch.rand(2, 3, 50, 20), F.interpolate(masks, (50, 20)).repeat(2, 1, 1, 1)).shape == (2, 3, 50, 20)


def test_folder_finds_pictures_by_name(batch, tmp_path):
    images, masks = (batch[0] * 255).round() / 255, batch[1]
    for name, image in zip("ab", images): Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    method = get_method(f"folder:{tmp_path}")
    assert torch.equal(method(images.flip(0), masks, ["deep/b.jpg", "a.jpg"]), images.flip(0)) and method.name == tmp_path.name
    with pytest.raises(FarError, match="no pictures called 'c'"): method(images, masks, ["a", "c"])
    with pytest.raises(FarError, match="40x24.*20x24"): method(images[..., :20], masks[..., :20], ["a", "b"])
    with pytest.raises(FarError, match="names"): method(images, masks)
    Image.new("RGB", (40, 24)).save(tmp_path / "a.jpg")
    with pytest.raises(FarError, match="2 pictures called 'a'"): get_method(f"folder:{tmp_path}")(images, masks, ["a", "b"])
    with pytest.raises(FarError, match="no such folder"): get_method(f"folder:{tmp_path}/x")


def test_folder_inpaints_a_file_of_the_same_name(tmp_path, photograph):
    (tmp_path / "theirs").mkdir()
    photograph.save(tmp_path / "street.png")
    Image.new("RGB", photograph.size, (1, 2, 3)).save(tmp_path / "theirs" / "street.png")
    mask = square_mask(photograph.size)
    assert (pixels(inpaint(tmp_path / "street.png", mask, f"folder:{tmp_path / 'theirs'}"))[mask] == (1, 2, 3)).all()


def test_unknown_methods_list_the_valid_ones():
    with pytest.raises(FarError) as error: get_method("criminisi")
    assert all(name in str(error.value) for name in METHODS) and "\n" not in str(error.value)
    with pytest.raises(FarError, match="far:DIR"): get_method("far")
    with pytest.raises(FarError, match="no folder"): get_method("telea:somewhere")


def test_telea_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(FarError, match="opencv-python-headless"): get_method("telea")


def test_shapes_are_checked_where_they_enter():
    with pytest.raises(FarError, match=r"\(1, 3, 8, 8\)"): get_method("mean")(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 9))
