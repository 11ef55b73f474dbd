"""Whatever comes in, through Python or the shell: a right result, or one line that names the input; never a traceback, never a changed known pixel.

The suite takes a few dozen small random inputs; HYPOTHESIS_PROFILE=fuzz takes 500 with sides up to 3000, new ones on every call."""
import io
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from packaging.version import Version
from PIL import Image
from typer.testing import CliRunner

from far_nb.cli import app
from far_nb.core import FarError
from far_nb.data import read_image, read_mask
from far_nb.inpaint import Method, inpaint
from test_inpaint import make_far, picture, pixels

FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
EXAMPLES, LARGEST = (500, 3000) if FUZZ else (50, 300)
FORMATS = {"png": ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"], "jpg": ["RGB", "L", "CMYK"], "tif": ["RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "I;16B"],
           "webp": ["RGB", "RGBA"], "bmp": ["RGB", "L", "P"], "gif": ["P", "L"]}
if Version(PIL.__version__) >= Version("13"): FORMATS["tif"].append("YCbCr")      # Pillow 12 cannot read back the ones it writes
MASKS = ["rectangle", "noise", "soft", "scratch", "other size", "empty", "full", "inverted", "torn", "text", "wrong shape"]
BROKEN = {"torn", "text", "wrong shape"}


@pytest.fixture(scope="module")
def models():
    "A tiny network, and a stand-in with windows that costs nothing."
    known = lambda images, masks, names: ((images * (1 - masks)).sum((2, 3), keepdim=True) / (1 - masks).sum((2, 3), keepdim=True).clamp(min=1)).expand_as(images)
    return {"far": make_far(), "known": Method("known", known, side=128)}


def side(generator):
    "1 to LARGEST, as many small ones as large ones."
    return int(round(np.exp(generator.uniform(0, np.log(LARGEST)))))


def a_mask(kind, size, generator):
    "The hole (H,W) bool that is meant, and the mask that says so: an array, or bytes of a broken file."
    width, height = size
    hole = np.zeros((height, width), bool)
    if kind == "noise": hole = generator.random((height, width)) < generator.choice([0.02, 0.5, 0.98])
    elif kind == "full": hole[:] = True
    elif kind == "scratch": hole[height // 2] = True; hole[height // 2, -1] = False
    elif kind != "empty":
        (y0, y1), (x0, x1) = (sorted(generator.integers(0, n + 1, 2)) for n in (height, width))
        hole[y0:y1, x0:x1] = True
    if kind == "soft": return hole, np.where(hole, generator.uniform(0.55, 1), generator.uniform(0.05, 0.45)) * 255
    if kind == "other size": hole = hole.repeat(2, 0).repeat(3, 1)
    if kind == "inverted": return hole, ~hole * 255
    if kind in ("torn", "text"): return hole, as_file(Image.fromarray(hole), "png")[:45] if kind == "torn" else b"not a mask"
    if kind == "wrong shape": return hole, np.zeros((height + 1, width, 7))          # (1,H,W) would be a mask
    return hole, hole * 255


def as_file(image, form):
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(form, form.upper()), **({"lossless": True, "exact": True} if form == "webp" else {}))
    return file.getvalue()


def torn(content, generator):
    "A file's first bytes; a whole picture can have as few as 34."
    return content[:int(generator.integers(1, min(40, len(content) // 2)))]


def same_known(before, after, hole):
    "Whether mode, size, numbers and colours outside the hole are the same."
    if (before.mode, before.size) != (after.mode, after.size): return False
    if before.mode == "P": before, after = before.convert("RGBA"), after.convert("RGBA")
    return np.array_equal(pixels(before)[~hole], pixels(after)[~hole])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), form=st.sampled_from([*FORMATS, "pil", "array", "tensor"]), kind=st.sampled_from(MASKS), damage=st.sampled_from([None] * 6 + ["torn", "text", "nothing"]),
       model=st.sampled_from(["far", "known", "known"]), max_side=st.sampled_from([None, None, 64, 200]), detail=st.booleans())
def test_python_gives_a_right_result_or_one_clear_error(models, seed, form, kind, damage, model, max_side, detail):
    generator = np.random.default_rng(seed)
    size = side(generator), side(generator)
    if max_side == 64 and size[0] * size[1] > 400_000: max_side = None                      # thousands of windows
    image = picture(str(generator.choice(FORMATS.get(form, ["RGB", "CMYK", "LA", "PA", "HSV", "I", "I;16B"]))), size, seed)
    if form in FORMATS:
        given_image = as_file(image, form)
        image = Image.open(io.BytesIO(given_image))
        if damage == "torn": given_image = torn(given_image, generator)
        if damage in ("text", "nothing"): given_image = b"hello" if damage == "text" else b""
    else:
        damage, array = None, generator.random((*size[::-1], int(generator.integers(1, 5)))).astype(str(generator.choice(["float32", "float64", "float16"])))
        given_image = {"pil": image, "array": array, "tensor": torch.from_numpy(array).movedim(-1, 0)}[form]
    hole, mask = a_mask(kind, size, generator)
    file = io.BytesIO(given_image) if isinstance(given_image, bytes) else given_image
    if isinstance(given_image, bytes): file.name = "holiday.jpg"
    wrong = damage or kind in BROKEN or hole.all()
    try: result = inpaint(file, mask, models[model], invert=kind == "inverted", max_side=max_side, detail=detail)
    except FarError as error:
        assert wrong, f"refused: {error}"
        assert "\n" not in str(error) and any(word in str(error) for word in ("holiday.jpg", "picture", "mask"))
        return
    assert not wrong
    if hole.shape != size[::-1]: hole = hole[::2, 1::3]
    if isinstance(result, Image.Image) and kind != "noise" and hole.sum() > 50:                   # random pixels, which no fill leaves as they are
        before, after = (pixels(each.convert("RGBA") if each.mode == "P" else each)[hole].reshape(hole.sum(), -1) for each in (image, result))
        assert (before != after).any(-1).mean() > 0.2
    if form == "array": assert result.dtype == array.dtype and np.array_equal(result[~hole], array[~hole])
    elif form == "tensor": assert result.dtype == given_image.dtype and torch.equal(result[:, torch.from_numpy(~hole)], given_image[:, torch.from_numpy(~hole)])
    else: assert same_known(image, result, hole)


@dataclass
class File:
    name: str
    form: str
    content: bytes
    mask: bytes
    good: bool


def files(count, seed):
    "Random pictures with masks as files, some of either broken."
    generator, made = np.random.default_rng(seed), []
    for number in range(count):
        form = str(generator.choice([*FORMATS]))
        size = side(generator), side(generator)
        image = picture(str(generator.choice(FORMATS[form])), size, number)
        kind, damage = str(generator.choice(MASKS[:7] + MASKS[8:10])), str(generator.choice(["sound"] * 8 + ["torn", "text", "nothing"]))
        hole, mask = a_mask(kind, size, generator)
        content = as_file(image, form)
        content = {"sound": content, "torn": torn(content, generator), "text": b"hello", "nothing": b""}[damage]
        mask = mask if isinstance(mask, bytes) else as_file(Image.fromarray(np.asarray(mask).astype(np.uint8)), "png")
        made.append(File(f"{number:03d} bild", form, content, mask, damage == "sound" and kind not in BROKEN and not hole.all()))
    return made


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, models):
    return models["far"].save_pretrained(tmp_path_factory.mktemp("model"))


def test_the_shell_fills_a_folder_of_anything_and_names_what_it_cannot(tmp_path, model_folder):
    for folder in ("in", "masks"): (tmp_path / folder).mkdir()
    made = files(EXAMPLES, int.from_bytes(os.urandom(4)) if FUZZ else 1)
    for file in made:
        (tmp_path / "in" / f"{file.name}.{file.form}").write_bytes(file.content)
        (tmp_path / "masks" / f"{file.name}.png").write_bytes(file.mask)
    done = CliRunner().invoke(app, ["inpaint", *(str(tmp_path / name) for name in ("in", "masks")), "-o", str(tmp_path / "out"), "--model", str(model_folder)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    bad = [file for file in made if not file.good]
    assert done.exit_code == 1 and bad and f"{len(made) - len(bad)} filled, {len(bad)} failed" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == len(bad) and "Traceback" not in done.stderr
    for file, line in zip(bad, lines): assert line.startswith("far: ") and f"{file.name}.{file.form}" in line, line
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == [file.name for file in made if file.good]      # nothing half-written, no leftovers
    for file in made:
        source, result = tmp_path / "in" / f"{file.name}.{file.form}", tmp_path / "out" / f"{file.name}.{file.form}"
        assert source.read_bytes() == file.content
        if not file.good: continue
        before, after = Image.open(source), Image.open(result)
        if file.form == "jpg": assert (before.mode, before.size) == (after.mode, after.size)
        else: assert same_known(before, after, read_mask(tmp_path / "masks" / f"{file.name}.png", before.size)), file.name


# ---- a fixed corpus of what people have lying about

def corpus():
    "name -> (bytes, sound or not)."
    colour = picture("RGB", (37, 29), 0)
    rotated, frames = Image.Exif(), [picture("P", (20, 16), seed) for seed in range(3)]
    rotated[0x0112] = 6
    def saved(image, form, **options):
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()
    good = {"one.png": saved(picture("RGB", (1, 1), 0), "PNG"), "tall.png": saved(picture("L", (1, 3000), 0), "PNG"), "wide.png": saved(picture("RGB", (3000, 1), 0), "PNG"),
            "phone.jpg": saved(colour, "JPEG", exif=rotated), "press.jpg": saved(colour.convert("CMYK"), "JPEG"), "progressive.jpg": saved(colour, "JPEG", progressive=True),
            "deep.png": saved(picture("I;16", (30, 20), 0), "PNG"), "key.png": saved(colour, "PNG", transparency=(1, 2, 3)), "palette.png": saved(colour.quantize(7), "PNG", transparency=b"\0\xff\x80"),
            "moving.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "pages.tif": saved(colour, "TIFF", save_all=True, append_images=[colour]),
            "lzw.tif": saved(colour, "TIFF", compression="tiff_lzw"), "big-endian.tif": saved(picture("I;16B", (30, 20), 0), "TIFF"), "photo.webp": saved(colour, "WEBP"),
            "fax.tif": saved(colour.convert("1"), "TIFF", compression="group4"), "really a png.jpg": saved(colour, "PNG"), "LOUD.PNG": saved(colour, "PNG"),
            "ünïcode – ‘quoted’ $HOME;.png": saved(colour, "PNG"), "-o.png": saved(colour, "PNG")}
    header = saved(colour, "PNG")
    bomb = header[:16] + (100_000).to_bytes(4) * 2 + header[24:29] + zlib.crc32(header[12:16] + (100_000).to_bytes(4) * 2 + header[24:29]).to_bytes(4) + header[33:]
    bad = {"empty.png": b"", "text.jpg": b"hello", "torn.png": header[:200], "torn.jpg": good["phone.jpg"][:300], "torn.webp": good["photo.webp"][:60], "torn.tif": good["lzw.tif"][:50],
           "flipped.png": header[:60] + bytes(value ^ 255 for value in header[60:160]) + header[160:], "bomb.png": bomb, "nothing.gif": b"GIF89a"}
    return {name: (content, True) for name, content in good.items()} | {name: (content, False) for name, content in bad.items()}


def test_the_corpus_through_python(tmp_path, models):
    for name, (content, sound) in corpus().items():
        path = tmp_path / name
        path.write_bytes(content)
        half = np.zeros((8, 8)); half[1:4, 1:7] = 1
        if not sound:
            with pytest.raises(FarError) as error: inpaint(path, half, models["far"])
            assert name in str(error.value) and "\n" not in str(error.value)
            with pytest.raises(FarError): inpaint(content, half, models["far"])
            continue
        if name == "one.png":                                                              # one pixel is all hole, or no hole
            with pytest.raises(FarError, match="one.png"): inpaint(path, np.ones((1, 1)), models["far"])
            assert inpaint(path, np.zeros((1, 1)), models["far"]).size == (1, 1)
            continue
        upright, result = read_image(path), inpaint(path, half, models["far"])
        assert result.size == upright.size and result.mode == Image.open(path).mode, name
        hole = np.asarray(Image.fromarray(half > 0).resize(upright.size, Image.Resampling.NEAREST))
        assert np.array_equal(pixels(read_image(as_file(result, "png") if result.mode not in ("CMYK",) else as_file(result, "tif")))[~hole], pixels(upright)[~hole]), name


def test_the_corpus_through_a_real_shell(tmp_path, model_folder):
    (tmp_path / "in").mkdir()
    made = corpus()
    for name, (content, _) in made.items(): (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "folder.png").mkdir()                                               # a folder with a picture's name is none
    half = np.zeros((8, 8), np.uint8); half[1:4, 1:7] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    far = lambda *arguments: subprocess.run([sys.executable, "-c", "from far_nb.cli import main; main()", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
    done = far("inpaint", "in", "mask.png", "-o", "out", "--model", model_folder)
    bad = sorted(name for name, (_, sound) in made.items() if not sound)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    named = [line for line in done.stderr.splitlines() if line.startswith("far: ")]
    assert len(named) == len(bad) and all(any(name in line for line in named) for name in bad)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(made) - set(bad)
    wrong = far("inpaint", "in/phone.jpg", "mask.png", "-o", "phone.png", "--model", "no/model/here")
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1 and "no/model/here" in wrong.stderr and not (tmp_path / "phone.png").exists()
