"The page to paint on: strokes become a mask, the uploaded file is what is filled, every limit has a sentence; and all of it once in a real browser."
import io
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from typer.testing import CliRunner

import far_nb.app as app
from far_nb.acr import ACR, ACRConfig
from far_nb.app import Limits, Painter, app_method, launch_options, mask_from_layers, paint, read_upload
from far_nb.cli import app as far
from far_nb.core import FarError
from far_nb.far import FAR
from far_nb.inpaint import Method, read_deep, save_picture
from far_nb.mae import MAE, MAEConfig

torch.set_num_threads(1)
PAINT = round(255 * 0.6)


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return Painter(app_method("mean"), tmp_path_factory.mktemp("painter"), Limits(megapixels=1, megabytes=2, canvas=96))


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'far_nb[app]'")


def strokes(size, *boxes, alpha=PAINT):
    "Layer (h,w,4) of the canvas' size with painted boxes (left, top, right, bottom)."
    layer = np.zeros((*size[::-1], 4), np.uint8)
    for left, top, right, bottom in boxes: layer[top:bottom, left:right] = (230, 60, 140, alpha)
    return layer


def says(pattern): return pytest.raises(FarError, match=pattern)


# ---- strokes to a mask

@given(width=st.integers(2, 40), height=st.integers(2, 40), factor=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_an_enlarged_mask_is_the_painted_box_up_to_half_a_canvas_pixel(width, height, factor, seed):
    random = np.random.default_rng(seed)
    (left, right), (top, bottom) = (np.sort(random.choice(side + 1, 2, replace=False)) for side in (width, height))
    mask = mask_from_layers([strokes((width, height), (left, top, right, bottom))], (width * factor, height * factor))
    truth = np.zeros((height * factor, width * factor), bool)
    truth[top * factor:bottom * factor, left * factor:right * factor] = True
    ys, xs = np.nonzero(mask ^ truth)                                           # only rounded corners differ
    near = np.minimum(abs(xs + 0.5 - left * factor), abs(xs + 0.5 - right * factor)) + np.minimum(abs(ys + 0.5 - top * factor), abs(ys + 0.5 - bottom * factor))
    assert mask.shape == truth.shape and (factor > 1 or len(xs) == 0)
    assert len(xs) == 0 or near.max() <= factor


def test_layers_add_up_and_traces_do_not_count():
    first, second = strokes((10, 8), (0, 0, 3, 3)), strokes((10, 8), (5, 5, 9, 8))
    assert mask_from_layers([first, second], (10, 8)).sum() == 9 + 12
    traces = strokes((10, 8), (0, 0, 10, 8), alpha=20)                          # what an eraser leaves behind
    assert not mask_from_layers([traces], (10, 8)).any() and not mask_from_layers([], (10, 8)).any()
    assert mask_from_layers([strokes((10, 8), (2, 2, 4, 4), alpha=255)], (10, 8)).sum() == 4      # opaque paint counts as well


# ---- the file is what is filled

def photograph(mode, size, seed=0):
    random, shape = np.random.default_rng(seed), (size[1], size[0])
    if mode == "I;16": return Image.fromarray(random.integers(0, 65536, shape).astype(np.uint16))
    if mode in ("LA", "RGBA"): return Image.fromarray(random.integers(0, 256, (*shape, len(mode)), dtype=np.uint8))
    return Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("mode,kind", [("RGB", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("L", "png"), ("LA", "png"), ("I;16", "tif"), ("CMYK", "jpg"), ("P", "gif"), ("RGB", "webp")])
@pytest.mark.parametrize("size", [(60, 40), (301, 207)])                        # the second is above the canvas' 96 pixels
def test_known_pixels_of_the_file_come_back(painter, tmp_path, mode, kind, size):
    file = tmp_path / f"mein Bild.{kind}"
    photograph(mode, size).save(file)
    canvas = painter.canvas(file)
    assert canvas.mode == "RGB" and max(canvas.size) <= 96
    layer = strokes(canvas.size, (10, 5, 30, 20))
    filled = painter.fill(file, [layer], background=np.dstack([np.asarray(canvas), np.full(canvas.size[::-1], 255, np.uint8)]))
    stored, result = Image.open(file), Image.open(filled.file)
    known = np.asarray(stored if stored.mode == result.mode else stored.convert(result.mode))
    hole, pixels = mask_from_layers([layer], size), np.asarray(result)
    assert result.format == "PNG" and result.size == size and filled.file.name == "mein_Bild-filled.png"
    assert (pixels[~hole] == known[~hole]).all() and (pixels[hole] != known[hole]).any()
    assert f"{size[0]}×{size[1]}" in filled.text
    assert ("unchanged" in filled.text) == (stored.mode == result.mode) == ("cannot hold" not in filled.text)


def test_colours_of_sixteen_bits_stay(painter, tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (40, 60, 3)).astype(np.uint16)
    file = save_picture(deep, tmp_path / "scan.png")
    filled = painter.fill(file, [strokes((60, 40), (10, 5, 30, 20))])
    hole = mask_from_layers([strokes((60, 40), (10, 5, 30, 20))], (60, 40))
    result = read_deep(filled.file)
    assert np.array_equal(result[~hole], deep[~hole]) and (result[hole] != deep[hole]).any() and "unchanged" in filled.text


def test_a_phone_s_photograph_is_upright_everywhere(painter, tmp_path):
    file, exif = tmp_path / "phone.png", Image.Exif()
    exif[0x0112] = 6
    photograph("RGB", (80, 50)).save(file, exif=exif)
    layer = strokes(painter.canvas(file).size, (0, 0, 10, 10))
    result = Image.open(painter.fill(file, [layer]).file)
    assert painter.canvas(file).size == result.size == (50, 80) and not result.getexif().get(0x0112)
    assert (np.asarray(result)[40:] == np.asarray(Image.open(file).transpose(Image.Transpose.ROTATE_270))[40:]).all()


# ---- sentences

def test_every_wrong_input_has_its_sentence(painter, tmp_path):
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    whole = io.BytesIO(); photograph("RGB", (50, 50)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    Image.new("1", (1001, 1000)).save(tmp_path / "wall.png")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)         # a few bytes that promise eleven gigabytes
    (tmp_path / "bomb.png").write_bytes(whole.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole.getvalue()[33:])
    (tmp_path / "heavy.png").write_bytes(whole.getvalue() + bytes(2_000_000))
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, sentence in {"letter.png": "not a picture", "page.eps": "not a picture", "cut.png": "cut off", "wall.png": "1001×1000 = 1.0 million pixels.*up to 1 million",
                           "bomb.png": "far too many pixels", "heavy.png": r"2\.0 MB.*up to 2 MB", "float.tif": "8 or 16 bits", "gone.png": "no longer here.*60 minutes"}.items():
        with says(f"{re.escape(name)}.*{sentence}") as error: painter.canvas(tmp_path / name)
        assert str(tmp_path) not in str(error.value), "visitors learn nothing about the machine"
    assert read_upload(tmp_path / "wall.png", Limits()).size == (1001, 1000)


def test_nothing_everything_and_another_picture(painter):
    sample, size = painter.samples[0], painter.canvas(painter.samples[0]).size
    with says("no picture yet"): painter.fill(None, [])
    for layers in ([], [strokes(size)], [strokes(size, (0, 0, *size), alpha=20)]):
        with says("nothing is painted"): painter.fill(sample, layers)
    with says("everything is painted"): painter.fill(sample, [strokes(size, (0, 0, *size))])
    some = strokes(size, (5, 5, 20, 20))
    for other in (np.zeros((9, 9, 4), np.uint8), 255 - np.asarray(painter.canvas(sample))):
        with says("another picture"): painter.fill(sample, [some], background=other)
    assert painter.fill(sample, [some]).file.exists()


def test_models_and_what_cannot_be_one(tmp_path):
    with says("cannot fill others"): app_method(f"folder:{tmp_path}")
    with says("unknown method"): app_method("nonsense")
    model = tiny_far()
    assert app_method(model).name == "far"
    assert app_method(None).name == "far"                                       # the weights that come with the package


# ---- how it is served

def test_launched_for_this_machine_alone_unless_asked():
    options = launch_options()
    assert options["server_name"] == "127.0.0.1" and options["share"] is False and options["allowed_paths"] == []
    assert options["max_file_size"] == 20_000_000 and not options["show_error"] and not options["run_history"] and not options["enable_monitoring"]
    asked = launch_options("0.0.0.0", 8080, True, Limits(megabytes=3))
    assert (asked["server_name"], asked["server_port"], asked["share"], asked["max_file_size"]) == ("0.0.0.0", 8080, True, 3_000_000)


def test_the_command_passes_on_what_it_is_told(monkeypatch):
    calls = []
    monkeypatch.setattr(app, "serve", lambda *given, announce: calls.append(given))
    assert CliRunner().invoke(far, ["app"]).exit_code == 0 and CliRunner().invoke(far, ["app", "-m", "telea", "--port", "8080", "--host", "0.0.0.0", "--share"]).exit_code == 0
    assert calls == [(None, "127.0.0.1", None, False), ("telea", "0.0.0.0", 8080, True)]
    assert CliRunner().invoke(far, ["app", "--port", "99999"]).exit_code == 2


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with says("pip install"): app.Page("mean")


def test_in_batch_no_page_is_started(monkeypatch, capsys):
    monkeypatch.setattr(app, "Page", lambda *given, **options: pytest.fail("a server in batch"))
    assert paint() is None and "nobody" in capsys.readouterr().out


def fetch(address, **request):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, **request), timeout=60) as answer: return answer.status, answer.read()
    except urllib.error.HTTPError as error: return error.code, error.read()
    except (ConnectionError, urllib.error.URLError): return 413, b""             # cut off while it sent


def test_a_page_serves_its_own_files_only_and_leaves_none(gradio, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "before"))
    monkeypatch.setattr(app, "_attended", lambda: True)
    (tmp_path / "secret.txt").write_text("secret")
    photograph("RGB", (70, 50)).save(tmp_path / "mine.png")
    monkeypatch.chdir(tmp_path)
    page = paint(tmp_path / "mine.png", tiny_far(), limits=Limits(megabytes=1))
    try:
        folder = page.painter.folder
        assert page.share_url is None and page.url.startswith("http://127.0.0.1:") and fetch(page.url)[0] == 200
        config = fetch(page.url + "config")[1].decode()
        assert str(tmp_path) not in config and str(Path(app.__file__).parent.parent) not in config
        for path in ("/etc/passwd", tmp_path / "secret.txt", tmp_path / "mine.png"): assert fetch(f"{page.url}gradio_api/file={path}")[0] == 403, path
        assert fetch(f"{page.url}gradio_api/file={page.painter.samples[0]}")[0] == 200
        for own in ("docs", "openapi.json", "monitoring"): assert fetch(page.url + own)[0] >= 400, own
        large = {"data": bytes(1_200_000), "headers": {"Content-Type": "multipart/form-data; boundary=x"}, "method": "POST"}
        assert fetch(page.url + "gradio_api/upload", **large)[0] == 413 and fetch(page.url + "gradio_api/component_server", **large)[0] == 413
        with says("nothing was filled yet"): page.result
        with says("cannot serve at"): app.Page("mean", port=int(page.url.rsplit(":")[-1].strip("/")))
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder), "the failed page touched this one's settings"
    finally: page.close()
    assert not folder.exists() and os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "before") and os.environ["GRADIO_ALLOWED_PATHS"] == "/"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.png", "secret.txt"]
    with pytest.raises(OSError): urllib.request.urlopen(page.url, timeout=5)
    page.close()                                                                # a second time does nothing


# ---- in a browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("FAR_NB_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def tiny_far():
    torch.manual_seed(0)
    config = MAEConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, feature_layer=1)
    return FAR(MAE(config), ACR(ACRConfig(width=4, blocks=1, prior_width=16, grid=4))).eval()


@contextmanager
def far_app(folder, *arguments):
    "`far app` as a process of its own in an empty folder, with a network that must not be asked; address, process, folder of temporary files."
    for name in ("here", "temporary"): (folder / name).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as outside:
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")} | {
            "TMPDIR": str(folder / "temporary"), "http_proxy": proxy, "https_proxy": proxy, "all_proxy": proxy, "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", "from far_nb.cli import main; main()", "app", "--port", str(port), *arguments], cwd=folder / "here",
                                   env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "http://" in line: break
            else: pytest.fail(f"far app ended with {process.wait()}: {''.join(said)}")
            yield re.search(r"http://\S+", line)[0], process, folder / "temporary"
            outside.setblocking(False)
            with pytest.raises(BlockingIOError): outside.accept()               # nobody asked for anything beyond this machine
        finally:
            if process.poll() is None: process.kill()
            process.wait()


class Visitor:
    "What somebody does on the page."

    def __init__(self, page): self.page = page

    def message(self, pattern):
        try: self.page.wait_for_function("pattern => new RegExp(pattern).test(document.querySelector('#message')?.innerText || '')", arg=pattern)
        except Exception: pytest.fail(f"waited for {pattern!r}, the page says {self.page.inner_text('#message')!r}")

    def upload(self, file, pattern):
        with self.page.expect_file_chooser() as chooser: self.page.click("#upload")
        chooser.value.set_files(file)
        self.message(pattern)
        self.page.wait_for_timeout(1000)                                        # until the canvas has its new size

    def tool(self, name): self.page.click(f'#editor [aria-label="{name}"]')

    def stroke(self):
        "From left to right over the middle of the picture."
        box = self.page.locator("#editor canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 60, y)
        self.page.mouse.down()
        self.page.mouse.move(x + 60, y, steps=6)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)

    def picture(self, name):
        "For people: FAR_NB_APP_PICTURES=FOLDER keeps screenshots."
        if folder := os.environ.get("FAR_NB_APP_PICTURES"): self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def fill(self, pattern):
        self.page.click("#fill")
        self.message(pattern)


def painted(temporary, size):
    "The hole in the layer that the browser sent last."
    layer = max(temporary.glob("far-app-*/*/layer_0.png"), key=lambda path: path.stat().st_mtime_ns)
    return mask_from_layers([np.asarray(Image.open(layer))], size)


@pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium found ({', '.join(_NAMES)}, or FAR_NB_CHROMIUM): apt-get install chromium")
def test_in_a_browser_only_what_is_painted_over_changes(gradio, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    tiny_far().save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((1300, 900), Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "holiday.png")
    (tmp_path / "letter.png").write_text("Dear Sir or Madam")
    requests, complaints = [], []
    with far_app(tmp_path, "--model", str(tmp_path / "model")) as (address, process, temporary), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        visitor = Visitor(page)
        page.goto(address)
        visitor.message("640×427")                                              # the first sample photograph is on the canvas
        visitor.picture("begin")
        visitor.upload(tmp_path / "letter.png", "letter.png is not a picture")
        visitor.upload(tmp_path / "holiday.png", "holiday.png: 1300×900")

        visitor.stroke()
        visitor.picture("painted")
        visitor.fill("Filled .* 1300×900")
        visitor.picture("result")
        with page.expect_download() as download: page.click("#download")
        hole = painted(temporary, (1300, 900))
        before, after = np.asarray(Image.open(tmp_path / "holiday.png")), np.asarray(Image.open(download.value.path()))
        changed = (before != after).any(-1)
        ys, xs = np.nonzero(hole)
        assert download.value.suggested_filename == "holiday-filled.png" and before.shape == after.shape
        assert not changed[~hole].any() and changed[hole].mean() > 0.9
        assert 150 < np.ptp(xs) < 700 and np.ptp(ys) < 250 and abs(xs.mean() - 650) < 100 and abs(ys.mean() - 450) < 150      # the stroke, where it was made

        visitor.tool("Undo")
        visitor.fill("nothing is painted")
        visitor.upload(tmp_path / "holiday.png", "holiday.png: 1300×900")
        visitor.stroke()
        visitor.tool("Erase"); visitor.stroke()
        visitor.fill("nothing is painted|Filled")                               # crumbs may stay at the rim
        assert painted(temporary, (1300, 900)).sum() < 0.2 * hole.sum()
        visitor.tool("Clear canvas")                                            # takes the paint away and leaves the picture
        visitor.message("holiday.png: 1300×900")
        page.wait_for_timeout(1000)
        visitor.tool("Brush"); visitor.stroke()
        visitor.fill("Filled .* 1300×900")
        page.locator("#samples button").nth(1).click()
        visitor.message("coffee")
        page.set_viewport_size({"width": 800, "height": 900})
        page.emulate_media(color_scheme="dark")
        visitor.picture("narrow-dark")

        assert not {url.split("/")[2] for url in requests if url.startswith("http")} - {address.split("/")[2]}
        assert not complaints
        assert str(tmp_path / "model") not in page.content() and str(tmp_path / "here") not in page.content()
        browser.close()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=90)[0]                               # a fraction of a second, where the machine has one to spare
        assert process.returncode == 0 and "Traceback" not in said, said
        assert not list(temporary.iterdir()) and not list((tmp_path / "here").iterdir())
