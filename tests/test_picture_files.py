"What a picture's file says beside its pixels survives; what its format cannot hold is said."
import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from far_nb.data import read_image
from far_nb.inpaint import inpaint, lost_in_format, read_deep, save_picture

WORDS = {0x010E: "a yard", 0x013B: "somebody", 0x8298: "nobody's"}      # description, artist, copyright
DEEP = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
UPRIGHT = {1: DEEP, 2: DEEP[:, ::-1], 3: DEEP[::-1, ::-1], 4: DEEP[::-1], 5: DEEP.swapaxes(0, 1), 6: np.rot90(DEEP, -1), 7: np.rot90(DEEP, 2).swapaxes(0, 1), 8: np.rot90(DEEP)}


@pytest.fixture
def hole():
    hole = np.zeros((20, 30), bool)
    hole[5:9, 7:20] = True
    return hole


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("order", "<>")
def test_deep_pictures_are_turned_once(orientation, order, tmp_path, capfd):
    tifffile.imwrite(tmp_path / "deep.tif", DEEP, photometric="rgb", byteorder=order, extratags=[(274, "H", 1, orientation, True)])
    values = read_deep(tmp_path / "deep.tif")
    assert values.dtype == np.uint16 and np.array_equal(values, UPRIGHT[orientation])
    assert np.abs(np.asarray(read_image(tmp_path / "deep.tif")).astype(int) - values // 257).max() <= 1      # as Pillow turns it
    assert not capfd.readouterr().err


def exif():
    exif = Image.Exif()
    for tag, text in WORDS.items(): exif[tag] = text
    return exif


def words(path): return {tag: text for tag, text in Image.open(path).getexif().items() if tag in WORDS}


def test_words_stay_with_the_picture(tmp_path, hole):
    picture = Image.fromarray((DEEP // 257).astype(np.uint8))
    picture.save(tmp_path / "in.tif", tiffinfo=dict(exif())), picture.save(tmp_path / "in.jpg", exif=exif()), picture.save(tmp_path / "in.webp", exif=exif(), lossless=True)
    texts = PngInfo()
    texts.add_text("parameters", "a yard, 20 steps"), texts.add_itxt("Titel", "Hof – groß")
    picture.save(tmp_path / "in.png", pnginfo=texts, exif=exif())
    for source in ("tif", "jpg", "webp", "png"):
        result = inpaint(tmp_path / f"in.{source}", hole, "mean")
        for target in ("tif", "jpg", "webp", "png"):
            assert words(save_picture(result, tmp_path / f"out.{target}")) == WORDS, (source, target)
    result = Image.open(save_picture(inpaint(tmp_path / "in.png", hole, "mean"), tmp_path / "out.png"))
    assert result.text == {"parameters": "a yard, 20 steps", "Titel": "Hof – groß"}


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "eight.jpg"])
def test_words_of_deep_pictures(name, tmp_path):
    info = {"exif": exif().tobytes(), "parameters": "a yard", "compression": "raw"}
    file = save_picture(DEEP, tmp_path / name, info=info)
    assert words(file) == WORDS
    if name != "eight.jpg": assert np.array_equal(read_deep(file), DEEP)
    if name == "deep.png": assert Image.open(file).text == {"parameters": "a yard"}


def test_a_turned_picture_is_not_turned_again(tmp_path):
    turned = exif()
    turned[274] = 6
    for name in ("deep.png", "deep.tif", "eight.jpg"):
        file = save_picture(DEEP, tmp_path / name, info={"exif": turned.tobytes()})
        assert Image.open(file).getexif().get(274, 1) == 1 and words(file) == WORDS


@pytest.mark.parametrize("mode, lost", [("RGB", {}), ("L", {}), ("RGBA", {"jpg": "transparency", "bmp": "transparency"}), ("CMYK", {"png": "CMYK", "webp": "CMYK", "bmp": "CMYK", "tga": "CMYK"}),
                                        ("I;16", {"jpg": "16 bits", "webp": "16 bits", "bmp": "16 bits", "tga": "16 bits"}), ("deep", {"jpg": "16 bits", "webp": "16 bits", "bmp": "16 bits", "tga": "16 bits"})])
def test_what_a_format_cannot_hold_is_said_and_all_else_is_kept(mode, lost, tmp_path):
    grey = DEEP[..., 0]
    picture = DEEP if mode == "deep" else Image.fromarray(grey) if mode == "I;16" else Image.frombytes(mode, (30, 20), (np.concatenate([DEEP, DEEP], -1)[..., :len(Image.new(mode, (1, 1)).getbands())] // 257).astype(np.uint8).tobytes())
    for suffix in ("png", "tif", "jpg", "webp", "bmp", "tga"):
        said = lost_in_format(picture, f"x.{suffix}")
        assert (len(said) == 1 and lost[suffix] in said[0]) if suffix in lost else not said, (suffix, said)
        if said or suffix == "jpg" or mode == "L" and suffix == "webp": continue
        file = save_picture(picture, tmp_path / f"x.{suffix}")
        back = read_deep(file) if mode == "deep" else Image.open(file)
        assert np.array_equal(np.asarray(back), np.asarray(picture)), suffix
