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
from far_nb.inpaint import METHODS, Method, get_method, inpaint, mask_from_alpha, mask_from_color
from far_nb.mae import MAE, MAEConfig

torch.set_num_threads(1)
MODES = ["RGB", "L", "1", "P", "PA", "RGBA", "RGBa", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I"]


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
    if mode == "I;16B": return Image.frombytes(mode, size, generator.integers(0, 65536, (height, width)).astype(">u2").tobytes())
    if mode == "PA": return picture("P", size, seed).convert("PA")
    if mode == "RGBa": return picture("RGBA", size, seed).convert("RGBa")
    if mode in ("LA", "RGBA"): return Image.fromarray(generator.integers(0, 256, (height, width, len(mode)), dtype=np.uint8))
    if mode == "P": return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).quantize(int(generator.integers(2, 257)))
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
    assert result.mode == mode and pixels(result).dtype == pixels(image).dtype
    assert np.array_equal(pixels(result)[~mask], pixels(image)[~mask])
    if mode in ("P", "PA"): assert np.array_equal(pixels(result.convert("RGBA"))[~mask], pixels(image.convert("RGBA"))[~mask])      # and mean the same


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
    assert np.abs(filled - 40_000).max() <= 2.5 * 257      # OpenCV's own error on a constant: up to two of its eight-bit levels, and one rounding
    exact = Method("exact", lambda images, masks, names: images * 0 + 12_345 / 65535)
    for picture in (image, Image.fromarray(np.full((20, 20), 40_000, np.int32)), Image.frombytes("I;16B", (20, 20), np.full((20, 20), 40_000, ">u2").tobytes())):
        assert set(pixels(inpaint(picture, mask, exact))[mask]) == {12_345}


def test_transparency_stays_outside_and_the_hole_is_opaque(photograph):
    image, mask = photograph.copy(), square_mask(photograph.size)
    image.putalpha(Image.fromarray(np.where(mask, 0, 200).astype(np.uint8)))      # the user erased the hole
    alpha = pixels(inpaint(image, mask, "telea"))[..., 3]
    assert (alpha[mask] == 255).all() and (alpha[~mask] == 200).all()


def test_a_palette_gets_new_colours_where_it_has_room(photograph):
    mask, orange = square_mask(photograph.size), Method("orange", lambda images, masks, names: images * 0 + torch.tensor([1, 0.5, 0]).view(1, 3, 1, 1))
    for transparency in (None, 3, bytes([255, 0, 100])):
        palette = photograph.quantize(16)
        if transparency is not None: palette.info["transparency"] = transparency
        result = inpaint(palette, mask, orange)
        assert result.mode == "P" and (pixels(result.convert("RGBA"))[mask] == (255, 128, 0, 255)).all()
        assert np.array_equal(pixels(result)[~mask], pixels(palette)[~mask]) and result.info.get("transparency") == transparency
    full = photograph.quantize(256)
    if len(full.getpalette()) == 768:                                                    # no room: the nearest entry
        entries = np.reshape(full.getpalette(), (-1, 3))
        nearest = entries[((entries - (255, 128, 0)) ** 2).sum(1).argmin()]
        assert (pixels(inpaint(full, mask, orange).convert("RGB"))[mask] == nearest).all()


def test_one_transparent_colour_is_not_painted(photograph):
    mask, black = square_mask(photograph.size), Method("black", lambda images, masks, names: images * 0)
    for mode, key in (("RGB", (0, 0, 0)), ("L", 0), ("I;16", 0)):
        image = photograph.convert("L").convert(mode) if mode == "I;16" else photograph.convert(mode)
        image.info["transparency"] = key
        result = inpaint(image, mask, black)
        assert result.mode == mode and result.info["transparency"] == key
        assert (pixels(result)[mask].reshape(mask.sum(), -1) != key).any(1).all() and pixels(result)[mask].max() == 1


def test_metadata_stays_with_the_picture(photograph):
    mask = square_mask(photograph.size)
    for mode in ("RGB", "CMYK", "P"):
        image = photograph.convert(mode)
        image.info.update(icc_profile=b"profile", dpi=(300, 300), exif=b"exif")
        result = inpaint(image, mask, "mean")
        assert result.info == image.info and result.info is not image.info


# ---- arrays, tensors, lists

CONSTANT = Method("constant", lambda images, masks, names: images * 0 + torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float32", "float64", "float16"])
@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,), (4,)])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_arrays_and_tensors_come_back_as_they_came(dtype, channels, kind):
    values = np.random.default_rng(0).random((19, 23, *channels))
    values = values.astype(dtype) if "float" in dtype else values > 0.5 if dtype == "bool" else (values * np.iinfo(dtype).max).astype(dtype)
    image = values if kind == "array" else torch.from_numpy(np.moveaxis(values, -1, 0).copy() if channels else values)
    mask, before = square_mask((23, 19)), image.copy() if kind == "array" else image.clone()
    result = inpaint(image, mask, CONSTANT)
    assert type(result) is type(image) and result.dtype == image.dtype and result.shape == image.shape and (image == before).all()
    back = result if kind == "array" else result.numpy() if not channels else result.movedim(0, -1).numpy()
    assert np.array_equal(back[~mask], values[~mask])
    count, colour = channels[0] if channels else 1, np.array([0.2, 0.4, 0.6])
    expected = np.append(colour if count > 2 else colour @ [0.299, 0.587, 0.114], [1.0] * (count in (2, 4)))
    white = 1 if dtype == "bool" or "float" in dtype else np.iinfo(dtype).max
    assert np.allclose(back[mask] / white, expected > 0.5 if dtype == "bool" else expected, atol=0.51 / white if white > 1 else 1e-3)
    empty = inpaint(image, np.zeros((19, 23)), None)
    assert empty is not image and (empty == image).all()


def test_numbers_without_an_agreed_range_are_refused():
    mask = square_mask((23, 19))
    for wrong, said in ((np.zeros((19, 23, 3), np.int64), "int64"), (np.full((19, 23, 3), 200.0), "200"), (np.full((19, 23), np.nan), "nan"), (np.zeros((19, 23, 5)), "shape"),
                        (np.zeros((3, 19, 23)), "shape"), (torch.zeros(19, 23, 3), "shape"), (np.zeros((0, 5, 3)), "shape"), (np.zeros((19, 23), object), "object"), (5, "int"), (None, "NoneType")):
        with pytest.raises(FarError, match=said): inpaint(wrong, mask, CONSTANT)
    missing = np.where(mask[..., None], np.nan, 0.5) * np.ones(3)                          # what is missing may be missing
    assert np.allclose(inpaint(missing, mask, CONSTANT)[mask], (0.2, 0.4, 0.6))


def test_batches_come_back_stacked(far):
    images, mask = torch.rand(3, 3, 20, 30), torch.from_numpy(square_mask((30, 20)))
    result = inpaint(images, mask, far)
    assert result.shape == images.shape and torch.equal(result[..., ~mask], images[..., ~mask])
    for one, image in zip(result, images): assert torch.allclose(one, inpaint(image, mask, far), atol=1e-5)
    array = inpaint(images.movedim(1, -1).numpy(), mask[None].expand(3, -1, -1)[:, None].numpy(), far)
    assert np.allclose(array, result.movedim(1, -1), atol=1e-5)
    with pytest.raises(FarError, match="3 pictures need as many masks"): inpaint(images, mask.expand(2, 1, -1, -1), far)


def test_a_list_is_filled_in_batches_and_a_bad_one_stands_for_itself(far, tmp_path, monkeypatch):
    sizes = [(40, 32), (33, 45), (40, 32), (40, 32), (20, 20)]
    pictures = [picture("RGB", size, seed) for seed, size in enumerate(sizes)]
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    seen, forward = [], FAR.forward
    monkeypatch.setattr(FAR, "forward", lambda self, image, mask: seen.append(tuple(image.shape)) or forward(self, image, mask))
    images, masks = [*pictures, tmp_path / "torn.png", pictures[0], pictures[1]], [square_mask(size) for size in sizes] + [np.ones((4, 4)), np.ones((4, 4)), np.zeros((4, 4))]
    results = inpaint(images, masks, far)
    assert sorted(shape[0] for shape in seen) == [1, 1, 3]
    for image, mask, result in zip(pictures, masks, results):
        assert result.size == image.size and np.array_equal(pixels(result)[~mask], pixels(image)[~mask])
        assert np.abs(pixels(result).astype(int) - pixels(inpaint(image, mask, far))).max() <= 1
    assert isinstance(results[5], FarError) and "torn.png" in str(results[5]) and isinstance(results[6], FarError) and "picture 7" in str(results[6])
    assert np.array_equal(pixels(results[7]), pixels(pictures[1])) and len(results) == 8
    assert inpaint([], [], far) == []
    one_for_all = inpaint(pictures, square_mask((64, 64)), "mean", batch_size=2)
    assert [result.size for result in one_for_all] == sizes


def test_a_batch_that_fails_is_tried_one_by_one(photograph, tmp_path):
    photograph.save(tmp_path / "a.png")
    method, mask = get_method(f"folder:{tmp_path}"), square_mask(photograph.size)
    (tmp_path / "in").mkdir()
    for name in "ab": photograph.save(tmp_path / "in" / f"{name}.png")
    good, bad = inpaint([tmp_path / "in/a.png", tmp_path / "in/b.png"], mask, method)
    assert np.array_equal(pixels(good), pixels(photograph)) and "no pictures called 'b'" in str(bad)


def test_everything_that_was_made_on_the_way(photograph, far):
    mask = square_mask(photograph.size)
    filled = inpaint(photograph, mask, far, return_all=True)
    assert np.array_equal(pixels(filled.picture), pixels(inpaint(photograph, mask, far))) and np.array_equal(filled.hole.numpy(), mask)
    assert filled.raw.shape == (3, 33, 45) and filled.mae.shape == (3, 32, 32) and filled.attention.shape == (16, 16)
    assert torch.allclose(filled.attention.sum(1), torch.ones(16), atol=1e-5) and 0 <= filled.mae.min() and filled.mae.max() <= 1
    assert np.abs(pixels(filled.picture)[mask] / 255 - filled.raw.permute(1, 2, 0).numpy()[mask]).max() <= 0.51 / 255
    assert set(filled.seconds) == {"read", "load", "fill", "write"} and min(filled.seconds.values()) >= 0
    assert inpaint(photograph, mask, "telea", return_all=True).mae is None
    assert inpaint(photograph, mask * 0, far, return_all=True).raw is None


# ---- large pictures

def plane(images, masks, names=None):
    "Stand-in that cannot fail on a ramp: each channel's plane of least squares through the known pixels."
    rows, columns = (torch.arange(n, dtype=torch.float64) / 512 for n in images.shape[-2:])
    basis = torch.stack([torch.ones(len(rows), len(columns), dtype=torch.float64), rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)], -1)
    return torch.stack([(basis @ torch.linalg.lstsq(basis[mask[0] == 0], image[:, mask[0] == 0].double().T).solution).permute(2, 0, 1).float()
                        for image, mask in zip(images, masks)])


def a_hole(height, width, seed, pieces=6):
    "Random rectangles, from specks to deep holes and long scratches."
    generator, hole = np.random.default_rng(seed), np.zeros((height, width), bool)
    for _ in range(pieces):
        h, w = (max(1, int(generator.integers(1, 3 + side // int(generator.choice([2, 3, 20]))))) for side in (height, width))
        y, x = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
        hole[y:y + h, x:x + w] = True
    return hole


@pytest.mark.parametrize("detail", [True, False])
@pytest.mark.parametrize("shape, seed", [((300, 400), 0), ((257, 700), 1), ((700, 90), 2), ((40, 900), 3), ((500, 500), 4)])
def test_windows_leave_no_seam(shape, seed, detail):
    slope = (torch.linspace(0.1, 0.6, shape[0])[:, None] + torch.linspace(0, 0.3, shape[1])).expand(3, *shape)
    hole = torch.from_numpy(a_hole(*shape, seed))
    filled = inpaint(slope, hole, Method("plane", plane, side=96), detail=detail)
    assert torch.equal(filled[:, ~hole], slope[:, ~hole])
    assert (filled - slope).abs().max() < (2 / 255 if detail else 10 / 255)                  # a cell of the reduced picture covers up to ten pixels
    if detail:                                                                             # reduced once, a step at the border of the hole is the price
        steps = [(filled.diff(dim=axis) - slope.diff(dim=axis)).abs().max() for axis in (1, 2)]
        assert max(steps) < 0.5 / 255


@pytest.mark.parametrize("detail", [True, False])
def test_a_constant_stays_constant(detail):
    image, hole = np.full((333, 444, 3), 77, np.uint8), a_hole(333, 444, 5)
    mean_of_known = Method("known", lambda images, masks, names: ((images * (1 - masks)).sum((2, 3), keepdim=True) / (1 - masks).sum((2, 3), keepdim=True)).expand_as(images), side=96)
    assert np.array_equal(inpaint(image, hole, mean_of_known, detail=detail), image)


def test_windows_agree_with_one_large_view_where_the_surroundings_suffice():
    image = F.interpolate(torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)), (384, 512), mode="bicubic")[0].clamp(0, 1)
    hole = torch.zeros(384, 512, dtype=torch.bool)
    for x, y in ((20, 30), (300, 100), (350, 120), (480, 360)): hole[y:y + 14, x:x + 18] = True
    hole[200:206, 30:400] = True                                                            # longer than a window
    one, windows = inpaint(image, hole, "biharmonic"), inpaint(image, hole, Method("local", get_method("biharmonic").predict, side=128))
    assert (one - windows).abs().max() < 0.06 and ((one - windows)[:, hole].abs().mean() < 0.003)
    with_own_window = hole.clone(); with_own_window[200:206] = False
    assert (one - windows)[:, with_own_window].abs().max() < 0.004


def test_the_model_never_sees_more_than_max_side_nor_a_window_without_known_pixels(far, monkeypatch):
    seen, forward = [], FAR.forward
    monkeypatch.setattr(FAR, "forward", lambda self, image, mask: seen.append((image.shape[-2:], float(mask.flatten(1).mean(1).max()))) or forward(self, image, mask))
    generator = np.random.default_rng(0)
    for shape, hole in (((200, 260), a_hole(200, 260, 7)), ((40, 500), np.arange(500)[None].repeat(40, 0) > 9), ((150, 150), generator.random((150, 150)) < 0.97)):
        for detail in (True, False):
            seen.clear()
            image = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
            result = inpaint(image, hole, far, max_side=64, detail=detail)
            assert np.array_equal(result[~hole], image[~hole]) and result.shape == image.shape
            assert seen and max(max(size) for size, _ in seen) <= 64 and max(share for _, share in seen) < 1
    filled = inpaint(image, hole, far, max_side=64, return_all=True)
    assert filled.raw.shape == (3, 150, 150) and filled.mae.shape == (3, 32, 32)
    for wrong in (0, -5, 63, 1.5):
        with pytest.raises(FarError, match="max_side"): inpaint(image, hole, far, max_side=wrong)


def test_a_hole_that_fits_is_seen_at_full_size_in_one_window(monkeypatch):
    seen = []
    spy = Method("spy", lambda images, masks, names: seen.append((images.clone(), masks.clone())) or images * 0, side=128)
    image, hole = torch.rand(3, 300, 300), torch.zeros(300, 300)
    hole[96:160, 176:240] = 1
    inpaint(image, hole, spy)
    (images, masks), = seen
    assert images.shape == (1, 3, 128, 128) and torch.equal(masks[0, 0], hole[64:192, 144:272])      # the hole in its middle
    known = masks[0] == 0
    assert torch.equal(images[0][:, known[0]], image[:, 64:192, 144:272][:, known[0]])
    assert images[0][:, ~known[0]].max() == 0                                               # and nothing of what it hides


# ---- models

def test_a_loaded_model_is_kept_until_its_file_changes(tmp_path, photograph, monkeypatch):
    make_far().save_pretrained(tmp_path / "far")
    mask, loads, load = square_mask(photograph.size), [], FAR.from_pretrained.__func__
    monkeypatch.setattr(FAR, "from_pretrained", classmethod(lambda cls, *arguments: loads.append(arguments) or load(cls, *arguments)))
    first = inpaint(photograph, mask, tmp_path / "far", device="cpu")
    assert np.array_equal(pixels(inpaint(photograph, mask, str(tmp_path / "far"), device="auto" if not torch.cuda.is_available() else "cpu")), pixels(first)) and len(loads) == 1
    other = make_far()
    with torch.no_grad(): other.acr.head.bias += 1
    other.save_pretrained(tmp_path / "far")
    assert not np.array_equal(pixels(inpaint(photograph, mask, tmp_path / "far")), pixels(first)) and len(loads) == 2


def test_the_package_s_model_is_the_default_and_its_absence_says_what_to_do(photograph, monkeypatch):
    mask, far = square_mask(photograph.size), make_far()
    monkeypatch.setattr("far_nb.inpaint._READY", {})
    monkeypatch.setattr(FAR, "from_pretrained", classmethod(lambda cls: far))
    assert np.array_equal(pixels(inpaint(photograph, mask)), pixels(inpaint(photograph, mask, far)))
    def absent(cls): raise FarError("no weights in the package: give the folder of a trained model")
    monkeypatch.setattr("far_nb.inpaint._READY", {})
    monkeypatch.setattr(FAR, "from_pretrained", classmethod(absent))
    with pytest.raises(FarError, match="give the folder of a trained model"): inpaint(photograph, mask)


def test_devices_that_are_not_there_are_named(photograph, far, tmp_path):
    far.save_pretrained(tmp_path)
    for wrong in ("banana", "cuda:77", 3.5):
        with pytest.raises(FarError, match=f"device '{wrong}'"): inpaint(photograph, square_mask(photograph.size), tmp_path, device=wrong)
    with pytest.raises(FarError, match="got int"): inpaint(photograph, square_mask(photograph.size), 5)


def test_too_little_memory_is_one_line(photograph):
    def greedy(images, masks, names): raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(FarError, match="max_side"): inpaint(photograph, square_mask(photograph.size), Method("greedy", greedy))
    def real(images, masks, names): return torch.empty(10 ** 14)
    with pytest.raises(FarError, match="max_side"): inpaint(photograph, square_mask(photograph.size), Method("real", real))
    def broken(images, masks, names): raise RuntimeError("a bug of ours")
    with pytest.raises(RuntimeError, match="a bug of ours"): inpaint(photograph, square_mask(photograph.size), Method("broken", broken))


def test_masks_of_sixteen_bits_and_of_few_values(photograph, tmp_path):
    hole = square_mask(photograph.size)
    for white in (1, 255, 65535):
        Image.fromarray((hole * white).astype(np.uint16)).save(tmp_path / "mask.png")
        for mask in (tmp_path / "mask.png", Image.fromarray((hole * white).astype(np.int32)), (hole * white).astype(np.int32)):
            assert np.array_equal(pixels(inpaint(photograph, mask, "mean")), pixels(inpaint(photograph, hole, "mean")))


@pytest.mark.parametrize("colour", ["white", "red", "#333333"])
def test_strokes_on_transparency_are_the_hole(colour, photograph, tmp_path):
    hole = square_mask(photograph.size)
    strokes = Image.new("RGBA", photograph.size, colour)
    strokes.putalpha(Image.fromarray((hole * 255).astype(np.uint8)))
    strokes.save(tmp_path / "strokes.png")
    for mask in (strokes, tmp_path / "strokes.png"):
        assert np.array_equal(pixels(inpaint(photograph, mask, "mean")), pixels(inpaint(photograph, hole, "mean")))
    black = Image.new("RGBA", photograph.size)
    black.putalpha(strokes.getchannel("A"))
    with pytest.raises(FarError, match="paint the hole in white"): inpaint(photograph, black, "mean")
    both = Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)).convert("RGBA")           # black and white, with a transparent edge
    both.putpixel((0, 0), (255, 255, 255, 0))
    assert np.array_equal(pixels(inpaint(photograph, both, "mean")), pixels(inpaint(photograph, hole, "mean")))


def test_stacks_of_masks(photograph):
    hole = torch.from_numpy(square_mask(photograph.size))
    images, masks = torch.rand(2, 3, *hole.shape), torch.stack([hole, hole.flip(0)])
    one_by_one = torch.stack([inpaint(image, mask, "mean") for image, mask in zip(images, masks)])
    for stack in (masks, masks[:, None], list(masks), masks.numpy(), masks[:, None].float()): assert torch.equal(inpaint(images, stack, "mean"), one_by_one)
    for mask in (hole, hole[None], hole[None, None], hole[..., None]): assert torch.equal(inpaint(images, mask, "mean")[0], one_by_one[0])
    assert torch.equal(inpaint(images[0], hole[None, None], "mean"), one_by_one[0])
    colour = np.repeat(hole.numpy()[..., None] * np.uint8(255), 3, -1)
    assert torch.equal(inpaint(images[0], colour, "mean"), one_by_one[0])
    assert inpaint(images[:0], hole, "mean").shape == images[:0].shape and inpaint(images[:0].numpy(), hole, "mean").shape == images[:0].shape
    grey = inpaint(images[0, 0].bfloat16(), hole, "mean", max_side=np.int64(64))
    assert grey.dtype == torch.bfloat16 and torch.equal(grey[~hole], images[0, 0].bfloat16()[~hole])


def test_lists_are_read_a_few_at_a_time(monkeypatch):
    "Sixteen large pictures do not lie in memory at once: what is read is filled before the next is read."
    read = []
    def fill(images, masks, names): read.append("fill"); return images * 0
    from far_nb import inpaint as module
    begin = module._Task.__init__
    monkeypatch.setattr(module._Task, "__init__", lambda task, *given: read.append("read") or begin(task, *given))
    large, mask = np.zeros((4096, 4096), np.uint8), np.zeros((4096, 4096), np.uint8)
    mask[:9, :9] = 1
    inpaint([large, large], mask, Method("spy", fill))
    assert read == ["read", "fill"] * 2
    read.clear()
    inpaint([large[:64, :64]] * 3, mask[:64, :64], Method("spy", fill))
    assert read == ["read"] * 3 + ["fill"]


def test_masks_from_the_picture_itself(photograph, tmp_path):
    hole = square_mask(photograph.size)
    erased, painted = photograph.copy(), pixels(photograph)
    erased.putalpha(Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    painted[hole] = (250, 3, 255)
    erased.save(tmp_path / "erased.png"), Image.fromarray(painted).save(tmp_path / "painted.png")
    assert np.array_equal(mask_from_alpha(erased), hole) and np.array_equal(mask_from_alpha(tmp_path / "erased.png"), hole)
    for color in ("#ff00ff", "magenta", "#f0f"): assert np.array_equal(mask_from_color(tmp_path / "painted.png", color), hole)
    with pytest.raises(FarError, match="painted.png: no pixel has the colour #ff00ff"): mask_from_color(tmp_path / "painted.png", "#ff00ff", tolerance=2)
    with pytest.raises(FarError, match="painted.png: has no transparency"): mask_from_alpha(tmp_path / "painted.png")
    with pytest.raises(FarError, match="'pinkish' is no colour"): mask_from_color(tmp_path / "painted.png", "pinkish")


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
