"""The scripts that prepare data, each on a miniature of the real layout; `far data verify` on what they write."""
import io
import json
import os
import runpy
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from far_nb.cli import app as far
from far_nb.core import FarError
from far_nb.data import ImageFolder, open_images, open_masks, read_mask, verify
from far_nb.shards import _Journal

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
NAMES = ("places2", "ffhq", "coco_masks", "brush_masks", "test_masks", "sample_set")
SCENES = ("a/airfield", "b/bathroom", "b/bedroom", "b/basketball_court/indoor", "h/highway", "h/house", "k/kitchen")
sys.path.append(str(SCRIPTS))          # last: one of the scripts is called like a file of tests
import common
from common import Form, Member, build, by_hash, listed, members, picture, read

MAINS = {name: runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"] for name in NAMES}


def call(name, *arguments, code=0):
    "Run a script in this process; its output."
    app = typer.Typer(); app.command()(MAINS[name])
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def told(*arguments, code):
    done = CliRunner().invoke(far, ["data", "verify", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output.splitlines()


def jpeg(number, size=(60, 40), kind="JPEG"):
    "A small picture that no other number has."
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size).save(buffer, kind)
    return buffer.getvalue()


def add(archive, name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items(): setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def parts(out):
    return {part: ImageFolder(out / part) for part in ("train", "val", "test", "hr") if (out / part).exists()}


def contents(images):
    return {name: images.read_bytes(index) for index, name in enumerate(images.names)}


def hash_of(out): return json.loads((out / "manifest.json").read_text())["hash"]


# ---- Places2 -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "The official archives and lists, in small: 7 scenes x 6 training, 4 validation and 10 test pictures each; some are small."
    source = tmp_path_factory.mktemp("places")
    train = [f"{scene}/{index:08d}.jpg" for scene in SCENES for index in range(1, 7)]
    val = [f"Places365_val_{index:08d}.jpg" for index in range(1, 4 * len(SCENES) + 1)]
    test = [f"Places365_test_{index:08d}.jpg" for index in range(1, 11)]
    archives = (("train_large_places365standard", "data_large", train), ("val_large", "val_large", val), ("test_large", "test_large", test))
    for packed, folder, names in archives:
        with tarfile.open(source / f"{packed}.tar", "w") as archive:
            add(archive, folder, type=tarfile.DIRTYPE)
            for number, name in enumerate(names):
                add(archive, f"{folder}/{name}", jpeg(number + 1000 * len(folder), (60, 40) if number % 3 else (30, 20)))
    lists = source / "filelist_places365-standard"; lists.mkdir()
    (lists / "places365_train_standard.txt").write_text("".join(f"/{name} {SCENES.index(name.rsplit('/', 1)[0])}\n" for name in train))
    (lists / "places365_val.txt").write_text("".join(f"{name} {index % len(SCENES)}\n" for index, name in enumerate(val)))
    (lists / "categories_places365.txt").write_text("".join(f"/{scene} {index}\n" for index, scene in enumerate(SCENES)))
    return source


SMALL = ("--val-count", 5, "--hr-count", 4, "--hr-side", 40, "--per-shard", 10)


def test_places2_from_archives(places, tmp_path):
    output = call("places2", places, tmp_path / "out", *SMALL)
    assert "28 pictures; the official val part has 36,500" in output
    found = parts(tmp_path / "out")
    assert {part: len(images) for part, images in found.items()} == {"train": 42, "val": 5, "test": 28, "hr": 4}
    names = {part: set(images.names) for part, images in found.items()}
    assert not names["train"] & names["test"] and not names["val"] & names["test"] and names["hr"] < names["test"]
    assert {name.split("_")[1] for name in names["test"]} == {"val"} and {name.split("_")[1] for name in names["val"]} == {"test"}
    assert all(min(image.size) >= 40 for image in found["hr"]) and any(min(image.size) < 40 for image in found["test"])
    with tarfile.open(places / "val_large.tar") as archive:
        for name, content in contents(found["test"]).items(): assert archive.extractfile(f"val_large/{name}").read() == content, "copied byte by byte"
    assert [path.name for path in sorted((tmp_path / "out/train").iterdir())] == [f"0000{index}.tar" for index in range(5)]
    shuffled = [line.split("/", 1)[1] for line in (tmp_path / "out/train.txt").read_text().splitlines()]
    assert shuffled == by_hash(names["train"]) != sorted(shuffled)
    assert told(tmp_path / "out", code=0)[-1].endswith("as written")
    assert [len(open_images(tmp_path / "out", split)) for split in ("train", "val", "test")] == [42, 5, 28]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["pictures"] == 79 and manifest["parts"]["test"]["pictures"] == 28 and len(manifest["hash"]) == 64


def test_places2_folders_are_the_same_set_and_lists_can_be_read(places, tmp_path):
    for path in places.glob("*.tar"):
        with tarfile.open(path) as archive: archive.extractall(tmp_path / "source", filter="data")
    call("places2", places, tmp_path / "tar", *SMALL)
    call("places2", tmp_path / "source", tmp_path / "folder", *SMALL, "--form", "folder")
    for part, images in parts(tmp_path / "tar").items():
        unpacked = ImageFolder(tmp_path / "folder" / part)
        assert contents(unpacked) == contents(images)
        assert contents(ImageFolder(tmp_path / "folder" / f"{part}.txt")) == {f"{part}/{name}": content for name, content in contents(images).items()}
        as_released = [line.strip() for line in open(tmp_path / "folder" / f"{part}.txt").readlines()]
        assert sorted(as_released) == [f"{part}/{name}" for name in images.names]
        assert all((tmp_path / "folder" / line).is_file() for line in as_released)
    assert told(tmp_path / "folder", code=0)


def test_places2_selection_does_not_depend_on_the_run(places, tmp_path):
    some = (*SMALL[:-2], "--test-count", 9, "--size", 24)
    for name, per_shard in (("one", 10), ("two", 10), ("three", 7)): call("places2", places, tmp_path / name, *some, "--per-shard", per_shard)
    assert hash_of(tmp_path / "one") == hash_of(tmp_path / "two")
    one, three = parts(tmp_path / "one"), parts(tmp_path / "three")
    assert all(contents(one[part]) == contents(three[part]) for part in one)
    assert {min(image.size) for image in one["test"]} == {20, 24} and {min(image.size) for image in one["hr"]} == {40}, "reduced, never enlarged"
    assert one["train"].hash() and one["test"].names == sorted(by_hash(f"Places365_val_{index:08d}.jpg" for index in range(1, 29))[:9])


def test_places2_takes_a_list_of_test_pictures(places, tmp_path):
    chosen = ["/data/places/val_large/Places365_val_00000003.jpg", "Places365_test_00000002.jpg", "data_large/b/bedroom/00000001.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(chosen) + "\n\n")
    call("places2", places, tmp_path / "out", "--test-list", tmp_path / "list.txt", *SMALL)
    found = parts(tmp_path / "out")
    assert found["test"].names == ["Places365_test_00000002.jpg", "Places365_val_00000003.jpg", "b/bedroom/00000001.jpg"]
    assert len(found["train"]) == 41 and not set(found["test"].names) & {*found["train"].names, *found["val"].names}
    (tmp_path / "list.txt").write_text("Places365_val_99999999.jpg\n")
    assert "Places365_val_99999999" in call("places2", places, tmp_path / "no", "--test-list", tmp_path / "list.txt", code=2)


def test_places2_five_scenes(places, tmp_path):
    call("places2", places, tmp_path / "five", "--scenes", "ablation", "--per-shard", 10)
    found = parts(tmp_path / "five")
    assert {part: len(images) for part, images in found.items()} == {"train": 30, "val": 20}
    assert {name.split("/")[1] for name in found["train"].names} == {"bathroom", "bedroom", "highway", "house", "kitchen"}
    wanted = {1, 2, 4, 5, 6}
    assert {(int(name[-12:-4]) - 1) % len(SCENES) for name in found["val"].names} == wanted
    call("places2", places, tmp_path / "one", "--scenes", "basketball_court/indoor")
    assert len(parts(tmp_path / "one")["train"]) == 6 and len(parts(tmp_path / "one")["val"]) == 4
    assert "did you mean kitchen" in call("places2", places, tmp_path / "no", "--scenes", "kitchn", code=2)
    assert not (tmp_path / "no").exists()


def test_places2_easy_format(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for scene in ("kitchen", "house"):
            (tmp_path / "source" / part / scene).mkdir(parents=True)
            for index in range(count): (tmp_path / "source" / part / scene / f"{part}_{index}.jpg").write_bytes(jpeg(index))
    output = call("places2", tmp_path / "source", tmp_path / "out", "--hr-side", 999)
    assert "0 test pictures, not 1,000, have 999 pixels" in output and not (tmp_path / "out/hr").exists()
    assert len(open_images(tmp_path / "out", "val")) == len(open_images(tmp_path / "out", "test")) == 4, "no official test part, no val of its own"
    call("places2", tmp_path / "source", tmp_path / "kitchens", "--scenes", "kitchen")
    assert len(parts(tmp_path / "kitchens")["val"]) == 2


def test_places2_mistakes(places, tmp_path):
    assert "train_large_places365standard.tar" in call("places2", tmp_path, tmp_path / "out", code=2)
    assert "MD5" in call("places2", places, tmp_path / "out", "--check-md5", code=2)
    for part in ("train", "val"):
        (tmp_path / "equal" / part / "kitchen").mkdir(parents=True)
        (tmp_path / "equal" / part / "kitchen/1.jpg").write_bytes(jpeg(1))
    assert "one name" in call("places2", tmp_path / "equal", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
    with open(places / "train_large_places365standard.tar", "rb") as file: cut = file.read()[:30_000]
    (tmp_path / "source").mkdir()
    (tmp_path / "source/train_large_places365standard.tar").write_bytes(cut)
    assert "tar" in call("places2", tmp_path / "source", tmp_path / "out", code=2)


# ---- FFHQ ----------------------------------------------------------------------------------------------------------------------

NUMBERS = [*range(0, 5), *range(67_995, 68_005), 69_999]


@pytest.fixture(scope="module", params=["folders", "flat", "zip", "tar"])
def ffhq(request, tmp_path_factory):
    "Sixteen faces of 64 px around the border of the split, in each of the forms that they are passed on in."
    root = tmp_path_factory.mktemp("ffhq")
    faces = {f"{n // 1000 * 1000:05d}/{n:05d}.png" if request.param != "flat" else f"{n:05d}.png": jpeg(n, (64, 64), "PNG") for n in NUMBERS}
    if request.param in ("folders", "flat"):
        for name, content in faces.items():
            (root / "images1024x1024" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "images1024x1024" / name).write_bytes(content)
        (root / "images1024x1024/LICENSE.txt").write_text("CC")
        return root / "images1024x1024"
    if request.param == "zip":
        with zipfile.ZipFile(root / "thumbnails128x128.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("thumbnails128x128")
            for name, content in faces.items(): archive.writestr(f"thumbnails128x128/{name}", content)
        return root / "thumbnails128x128.zip"
    with tarfile.open(root / "thumbnails128x128.tar", "w") as archive:
        for name, content in faces.items(): add(archive, f"thumbnails128x128/{name}", content)
    return root / "thumbnails128x128.tar"


def test_ffhq(ffhq, tmp_path):
    assert "16 pictures; FFHQ has 70,000" in call("ffhq", ffhq, tmp_path / "out", "--per-shard", 4)
    found = parts(tmp_path / "out")
    assert set(found) == {"train", "test"}
    assert {part: [int(Path(name).stem) for name in images.names] for part, images in found.items()} == {"train": NUMBERS[:10], "test": NUMBERS[10:]}
    assert contents(found["test"])["69000/69999.png"] == jpeg(69_999, (64, 64), "PNG")
    call("ffhq", ffhq, tmp_path / "small", "--size", 32, "--form", "folder")
    assert {image.size for image in parts(tmp_path / "small")["train"]} == {(32, 32)} and told(tmp_path / "small", code=0)


def test_ffhq_list_and_wrong_folder(tmp_path):
    for n in NUMBERS: (tmp_path / "faces").mkdir(exist_ok=True); (tmp_path / f"faces/{n:05d}.png").write_bytes(jpeg(n))
    (tmp_path / "list.txt").write_text("00003.png\nimages1024x1024/68000/68001.png\n")
    call("ffhq", tmp_path / "faces", tmp_path / "out", "--list", tmp_path / "list.txt")
    assert parts(tmp_path / "out")["test"].names == ["00000/00003.png", "68000/68001.png"] and len(parts(tmp_path / "out")["train"]) == 14
    (tmp_path / "faces/me.png").write_bytes(jpeg(1))
    assert "me.png" in call("ffhq", tmp_path / "faces", tmp_path / "no", code=2)


# ---- masks ---------------------------------------------------------------------------------------------------------------------

def coco_json(path, first=1):
    "Three pictures: polygons of 25 %, 4 % and 16 %; run lengths of 40 %; a crowd; two halves whose union is too large."
    from pycocotools import mask
    square = lambda x, y, side: [x, y, x + side, y, x + side, y + side, x, y + side]
    right = np.zeros((50, 100), np.uint8); right[:, 60:] = 1
    packed = mask.encode(np.asfortranarray(right)); packed["counts"] = packed["counts"].decode()
    lengths = {"size": [50, 100], "counts": [60 * 50, 40 * 50]}                              # column by column, background first
    annotations = [(1, {"segmentation": [square(0, 0, 50)]}), (1, {"segmentation": [square(60, 60, 20)]}),
                   (1, {"segmentation": [square(50, 0, 20), square(70, 70, 34.6)]}),
                   (2, {"segmentation": lengths}), (2, {"segmentation": lengths, "iscrowd": 1}), (3, {"segmentation": packed}),
                   (3, {"segmentation": [[0, 0, 45, 0, 45, 50, 0, 50]]}), (3, {"segmentation": [[1, 2, 3, 4]]})]
    images = [{"id": 1, "height": 100, "width": 100}, {"id": 2, "height": 50, "width": 100}, {"id": 3, "height": 50, "width": 100}]
    entries = [{"id": first + index, "image_id": image, "category_id": 1, "iscrowd": 0, **rest} for index, (image, rest) in enumerate(annotations)]
    path.write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "thing"}], "annotations": entries}))
    return path


def test_coco_masks(tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'far_nb[data]'")
    sources = coco_json(tmp_path / "instances_train2017.json"), coco_json(tmp_path / "instances_val2017.json", 101)
    call("coco_masks", *sources, "-o", tmp_path / "out")
    train, val = (ImageFolder(tmp_path / "out" / part) for part in ("train", "val"))
    assert train.names == [f"instance-{index:012d}.png" for index in (1, 3, 4, 6, 7)] and val.names[0] == f"instance-{101:012d}.png"
    for images in (train, val):
        for name, content in contents(images).items():
            assert Image.open(io.BytesIO(content)).mode == "1" and 0.1 <= read_mask(content).mean() <= 0.5
    hole = read_mask(contents(train)[f"instance-{4:012d}.png"])
    assert hole.shape == (50, 100) and hole[:, 60:].all() and not hole[:, :60].any()
    assert abs(read_mask(contents(train)[f"instance-{1:012d}.png"]).mean() - 0.25) < 0.02
    call("coco_masks", sources[0], "-o", tmp_path / "both", "--kind", "both")
    both = set(ImageFolder(tmp_path / "both/train").names)
    assert both - set(train.names) == {f"union-{1:012d}.png"}, "picture 2 has one object, and 3's are larger than half of it together"
    call("coco_masks", sources[0], "-o", tmp_path / "union", "--kind", "union", "--form", "folder")
    assert ImageFolder(tmp_path / "union/train").names == [f"union-{index:012d}.png" for index in (1, 2)]
    call("coco_masks", sources[0], "-o", tmp_path / "two", "--count", 2)
    call("coco_masks", sources[0], "-o", tmp_path / "three", "--count", 3)
    assert set(ImageFolder(tmp_path / "two/train").names) < set(ImageFolder(tmp_path / "three/train").names)
    call("test_masks", tmp_path / "test", "--masks", tmp_path / "out/val", "-n", 10, "--size", 32)
    assert told(tmp_path / "out", code=0)


def test_coco_mistakes(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'far_nb[data]'")
    (tmp_path / "captions_train2017.json").write_text('{"images": []}')
    assert "no file of COCO instances" in call("coco_masks", tmp_path / "captions_train2017.json", "-o", tmp_path / "out", code=2)
    path = coco_json(tmp_path / "instances_train2017.json")
    assert "second time" in call("coco_masks", path, path, "-o", tmp_path / "out", code=2)
    path.write_text(path.read_text().replace('"image_id": 2', '"image_id": 77'))
    assert "annotation 4" in call("coco_masks", path, "-o", tmp_path / "out", code=2)


def test_without_pycocotools_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(MAINS, "coco_masks", runpy.run_path(str(SCRIPTS / "coco_masks.py"))["main"])
    output = call("coco_masks", tmp_path / "instances_train2017.json", "-o", tmp_path / "out", code=2)
    assert "pip install 'far_nb[data]'" in output and len(output.strip().splitlines()) == 1


def test_brush_masks(tmp_path):
    call("brush_masks", tmp_path / "a", "-n", 12, "--size", 32, "--per-shard", 5)
    call("brush_masks", tmp_path / "b", "-n", 20, "--size", 32, "--form", "folder")
    call("brush_masks", tmp_path / "c", "-n", 12, "--size", 32, "--seed", 1)
    a, b, c = (contents(ImageFolder(tmp_path / name / "masks")) for name in "abc")
    assert len(a) == 12 and a.items() <= b.items() and not set(a.values()) & set(c.values())
    assert all(0.1 <= read_mask(content).mean() <= 0.5 and Image.open(io.BytesIO(content)).mode == "1" for content in a.values())
    assert "no mask of 32x32" in call("brush_masks", tmp_path / "d", "--size", 32, "--area", 0.6, 0.2, code=2) and not (tmp_path / "d").exists()


def test_fixed_test_masks(tmp_path):
    for name in ("a", "b"): call("test_masks", tmp_path / name, "-n", 25, "--size", 48)
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b")
    names = ImageFolder(tmp_path / "a/masks").names
    assert [sum(name.startswith(kind) for name in names) for kind in ("brush", "object", "union")] == [10, 10, 5]
    assert all(0.1 <= mask.mean() <= 0.5 and mask.shape == (48, 48) for mask in open_masks(tmp_path / "a/masks"))
    call("test_masks", tmp_path / "c", "-n", 25, "--size", 48, "--masks", tmp_path / "a/masks")
    a, c = (contents(ImageFolder(tmp_path / name / "masks")) for name in "ac")
    assert a["brush-00003.png"] == c["brush-00003.png"] and a["object-00003.png"] != c["object-00003.png"]
    assert "no such" in call("test_masks", tmp_path / "d", "--masks", tmp_path / "absent", code=2) and not (tmp_path / "d").exists()
    assert "silhouettes" in call("test_masks", tmp_path / "a", "-n", 25, "--size", 48, "--masks", tmp_path / "c/masks", code=2)


# ---- nobody has vouched for the archives ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "C:/x.jpg", "..\\x.jpg"])
def test_names_that_point_outside_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "val_large.tar", "w") as archive: add(archive, name, jpeg(1))
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive: archive.writestr(zipfile.ZipInfo(name), jpeg(1))
    assert "points outside" in call("places2", tmp_path, tmp_path / "out", code=2)
    assert "points outside" in call("ffhq", tmp_path / "faces.zip", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "val_large.tar", "w") as archive: add(archive, "val_large/a.jpg", type=kind, linkname="/etc/passwd")
    assert "link or a special file" in call("places2", tmp_path, tmp_path / "out", code=2)


def test_odd_members_of_a_zip_are_refused(tmp_path, monkeypatch):
    def zipped(**attributes):
        info = zipfile.ZipInfo("00000.png")
        for key, value in attributes.items(): setattr(info, key, value)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zip"
        with zipfile.ZipFile(path, "w") as archive: archive.writestr(info, jpeg(1))
        return path
    assert len(members(zipped(external_attr=0o100644 << 16))) == 1
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        with pytest.raises(FarError, match="00000.png"): members(zipped(external_attr=(kind | 0o644) << 16))
    monkeypatch.setattr(common, "_LARGEST", 100)
    with pytest.raises(FarError, match="gigantic"): members(zipped())
    (tmp_path / "cut.zip").write_bytes(zipped().read_bytes()[:60])
    with pytest.raises(FarError, match="cut.zip"): members(tmp_path / "cut.zip")


def test_links_and_pipes_in_a_folder_are_refused(tmp_path):
    folder = tmp_path / "faces"; folder.mkdir()
    (folder / "00000.png").write_bytes(jpeg(0))
    (folder / "00001.png").symlink_to("00000.png")
    assert len(members(folder)) == 2, "a link that stays inside"
    (tmp_path / "secret.png").write_bytes(jpeg(1))
    (folder / "00002.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(FarError, match="00002.png is a link"): members(folder)
    (folder / "00002.png").unlink(); os.mkfifo(folder / "00002.png")
    with pytest.raises(FarError, match="special file"): members(folder)


def test_damaged_members_are_one_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive: archive.writestr("00000.png", jpeg(1))
    raw = bytearray((tmp_path / "a.zip").read_bytes()); raw[60] ^= 255
    (tmp_path / "b.zip").write_bytes(raw)
    member, = members(tmp_path / "b.zip")
    with pytest.raises(FarError, match="damaged"): read(member)
    (tmp_path / "t.tar").write_bytes(b"x" * 10)
    with pytest.raises(FarError, match="cut off"): read(Member("a.jpg", str(tmp_path / "t.tar"), 5, 100))


# ---- killed, and called again --------------------------------------------------------------------------------------------------

def shout(payload):
    if payload == "broken": raise FarError("it is broken")
    return payload.encode() * 50


def items(count=10): return {"train": [(f"{index:02d}.png", f"{index:02d}") for index in range(count)]}


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("stop", [1, 4, 7, 10])
def test_what_a_stopped_run_has_written_is_kept_and_the_rest_added(tmp_path, form, stop):
    made = []
    def make(payload):
        made.append(payload)
        if len(made) == stop and not again: raise OSError(28, "No space left on device")
        return shout(payload)
    again = False
    with pytest.raises(OSError): build(tmp_path / "out", items(), make, {}, form, 3)
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(FarError, match="no manifest"): verify(tmp_path / "out")
    again, before = True, (stop - 1) // 3 * 3
    made.clear()
    (tmp_path / "out/train").mkdir(exist_ok=True)
    (tmp_path / "out/train/.00.png").write_bytes(b"half")                     # what SIGKILL leaves
    with open(tmp_path / "out/.journal", "ab") as file: file.write(b'{"part": "tr')
    build(tmp_path / "out", items(), make, {}, form, 3)
    assert made == [f"{index:02d}" for index in range(before, 10)], "only what was missing"
    build(tmp_path / "whole", items(), shout, {}, form, 3)
    assert hash_of(tmp_path / "out") == hash_of(tmp_path / "whole") and verify(tmp_path / "out")["problems"] == []
    made.clear(); build(tmp_path / "out", items(), make, {}, form, 3)
    assert made == [] and verify(tmp_path / "out")["problems"] == []


@pytest.mark.parametrize("form", list(Form))
def test_lost_and_shortened_files_are_made_again(tmp_path, form):
    out = tmp_path / "out"
    build(out, items(), shout, {}, form, 3)
    before, files = hash_of(out), sorted((out / "train").iterdir())
    files[0].unlink(); files[-1].write_bytes(files[-1].read_bytes()[:10])
    made = []
    build(out, items(), lambda payload: made.append(payload) or shout(payload), {}, form, 3)
    assert made == ["00", "01", "02", "09"] and hash_of(out) == before and verify(out)["problems"] == []


def test_broken_pictures_are_left_out_and_told(tmp_path, capsys):
    parts = {"train": [("a.png", "a"), ("b.png", "broken"), ("c.png", "c")], "val": [("d.png", "d")]}
    for form in Form:
        out = tmp_path / form.value
        manifest = build(out, parts, shout, {}, form, 2)
        assert manifest["pictures"] == 3 and manifest["parts"]["train"]["skipped"] == {"b.png": "it is broken"}
        assert (out / "train.txt").read_text() == "train/a.png\ntrain/c.png\n" and "1 broken pictures left out" in capsys.readouterr().err
        assert build(out, parts, lambda _: pytest.fail("made again"), {}, form, 2)["hash"] == manifest["hash"]
    with pytest.raises(FarError, match="none of its 1"): build(tmp_path / "none", {"train": [("b.png", "broken")]}, shout, {})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    out = tmp_path / "mine"; out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(FarError, match="not empty"): build(out, items(), shout, {})
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
    build(tmp_path / "out", items(), shout, {"size": 256})
    for settings, wanted in (({"size": 512}, items()), ({"size": 256}, items(9))):
        with pytest.raises(FarError, match="other settings"): build(tmp_path / "out", wanted, shout, settings)
    with pytest.raises(FarError, match="one name"): build(tmp_path / "twice", {"train": [("a.png", "a")] * 2}, shout, {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FarError, match="is a file"): build(tmp_path / "file", items(), shout, {})


def test_two_runs_do_not_write_one_folder(tmp_path):
    journal = _Journal(tmp_path / "out", {})
    with pytest.raises(FarError, match="another run"): _Journal(tmp_path / "out", {})
    journal.close()


def test_a_killed_process_goes_on_with_several(tmp_path):
    "The real thing: two processes, SIGKILL to their parent in the middle, then the same command again."
    command = [sys.executable, SCRIPTS / "brush_masks.py", tmp_path / "out", "-n", "1500", "--per-shard", "20", "--size", "128", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    journal = tmp_path / "out/.journal"
    while not (journal.exists() and b"00000.tar" in journal.read_bytes()) and time.monotonic() < deadline: time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL); process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1], "no worker outlives its parent"
    assert not (tmp_path / "out/manifest.json").exists()
    kept = (tmp_path / "out/masks/00000.tar").stat().st_mtime_ns
    call("brush_masks", *command[2:-2])
    assert (tmp_path / "out/masks/00000.tar").stat().st_mtime_ns == kept and len(ImageFolder(tmp_path / "out/masks")) == 1500
    call("brush_masks", tmp_path / "alone", "-n", 1500, "--per-shard", 20, "--size", 128, "--form", "tar")
    assert hash_of(tmp_path / "out") == hash_of(tmp_path / "alone"), "two processes write what one writes"
    assert told(tmp_path / "out", code=0)


# ---- far data verify -----------------------------------------------------------------------------------------------------------

def test_verify_names_each_problem(tmp_path):
    out = tmp_path / "out"
    build(out, items(), shout, {}, Form.folder)
    assert told(out, code=0) == ["11 files, 0.0 MB: as written"]
    (out / "train/00.png").unlink()
    (out / "train/01.png").write_bytes(b"longer" * 100)
    (out / "train/02.png").write_bytes(b"x" * 100)
    (out / "train/new.png").write_bytes(b"")
    assert told(out, code=1) == ["train/00.png is missing", "train/01.png has 600 bytes, not 100", "train/02.png has other content (SHA-256)",
                                 "train/new.png is not in the manifest", "11 files, 0.0 MB: 4 problems"]
    assert told(out, "--quick", code=1)[-1] == "11 files, 0.0 MB: 3 problems (lengths only)"
    for index in range(20): (out / f"train/more{index}.png").write_bytes(b"")
    assert len(lines := told(out, code=1)) == 12 and lines[10] == "… and 14 more"


def test_verify_of_a_changed_or_missing_manifest(tmp_path, monkeypatch, capsys):
    from far_nb.cli import main
    def refused(folder):
        monkeypatch.setattr(sys, "argv", ["far", "data", "verify", str(folder)])
        with pytest.raises(SystemExit) as left: main()
        assert left.value.code == 2
        line, = capsys.readouterr().err.strip().splitlines()
        return line
    out = tmp_path / "out"
    assert "manifest.json" in refused(tmp_path)
    build(out, items(), shout, {})
    capsys.readouterr()
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["parts"]["train"]["files"]["00000.tar"]["sha256"] = "0" * 64
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert told(out, code=1)[:-1] == ["manifest.json was changed: its hash is not that of its entries", "train/00000.tar has other content (SHA-256)"]
    manifest["parts"]["train"]["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "points outside" in refused(out)
    for content in ("{", "[]", '{"parts": 3}', '{"parts": {"train": {"files": {"a": {}}}}, "hash": ""}'):
        (out / "manifest.json").write_text(content)
        refused(out)


# ---- for people ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_help_reads_well_at_eighty_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80"); monkeypatch.setenv("TERMINAL_WIDTH", "80")
    lines = call(name, "--help").splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines), "nothing is cut"
    text = " ".join(" ".join(lines).replace("│", " ").split())
    assert all(option in text for option in ("--form", "--per-shard", "--jobs")) and "[default: 1]" in text


def test_lists_match_names_with_any_folders_in_front(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("/x/y/a/b.jpg\nc.jpg\r\n\n")
    assert listed(path, ["a/b.jpg", "c.jpg", "b.jpg"]) == ["a/b.jpg", "c.jpg"], "the longest name that fits"
    with pytest.raises(FarError, match="absent.txt"): listed(tmp_path / "absent.txt", [])


def test_pictures_are_reduced_in_their_own_format(tmp_path):
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")):
        (tmp_path / name).write_bytes(jpeg(3, (90, 60), kind))
        member = Member(name, str(tmp_path / name))
        small = Image.open(io.BytesIO(picture(member, 30)))
        assert small.format == kind and small.size == (45, 30)
        assert picture(member, 60) == picture(member, 500) == picture(member) == (tmp_path / name).read_bytes()
    (tmp_path / "bad.jpg").write_bytes(jpeg(3)[:300])
    for size in (10, 500):
        with pytest.raises(FarError, match="bad.jpg"): picture(Member("bad.jpg", str(tmp_path / "bad.jpg")), size)
