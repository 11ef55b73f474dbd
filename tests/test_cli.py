"""The options of `far`: what they pass on, what they refuse, and `far data test`. What the jobs do is tested in test_pipeline.py."""
import ctypes
import json
import os
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import far_nb.cli as cli
from far_nb.cli import Progress, app, main, parse_seeds, write_test_set
from far_nb.core import FarError
from far_nb.experiments import build_test_set, get_preset
from far_nb.inpaint import get_method, read_deep, save_picture


def refused(capsys, monkeypatch, *arguments: str) -> str:
    "The one line that a mistake gets."
    monkeypatch.setattr(sys, "argv", ["far", *map(str, arguments)])
    with pytest.raises(SystemExit) as left: main()
    line, = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    return line


def test_seeds():
    assert parse_seeds("0") == [0] and parse_seeds(" 3, 1,2") == [3, 1, 2]
    for wrong in ("", "a", "-1", "1.5", "0,,1", "0,1,0", "0,00", "1" * 5000, "²"):
        with pytest.raises(FarError, match="--seeds"): parse_seeds(wrong)


@pytest.mark.parametrize("arguments, said", [(["--seeds", "0,1,1"], "twice"), (["--seeds", "one"], "--seeds"), (["--faces", "/no/faces"], "/no/faces"),
                                             (["--figure-data", "/no/scenes"], "/no/scenes"), (["--outputs", "/no/outputs"], "--outputs"),
                                             (["--test-masks", "/no/masks"], "--test-masks"), (["--jobs", "0"], "--jobs")])
def test_a_wrong_option_is_one_line_before_anything_is_written(tmp_path, capsys, monkeypatch, arguments, said):
    assert said in refused(capsys, monkeypatch, "reproduce", "--preset", "smoke", "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.rglob("*.json"))


def test_every_source_and_seed_reaches_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_planned", lambda command: [])
    pictures, outputs = tmp_path / "pictures", tmp_path / "outputs"
    for index in range(12):
        (pictures / "all").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(pictures / f"{index}.png")
    outputs.mkdir()
    given = ["--data", pictures, "--faces", "sample-faces", "--masks", "sample", "--figure-data", pictures, "--outputs", outputs]
    done = CliRunner().invoke(app, ["reproduce", "--preset", "smoke", "--out", str(tmp_path / "out"), "--dry-run", "--seeds", "4,2", *map(str, given)])
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "out/runs/smoke/plan.json").read_text())
    assert plan["seeds"] == [4, 2]
    assert plan["sources"] == {"data": str(pictures), "faces": "sample-faces", "masks": "sample", "figure_data": str(pictures), "outputs": str(outputs)}


@pytest.mark.parametrize("code", [0, 1])
def test_the_index_is_written_after_a_run_and_its_place_told(tmp_path, monkeypatch, capsys, code):
    calls = []
    def write_index(figures, runs, preset, seeds, failed):
        calls.append((figures, runs, preset, seeds, failed))
        figures.mkdir(parents=True, exist_ok=True)
        (figures / "README.md").write_text("index")
        return figures / "README.md"
    monkeypatch.setattr("far_nb.figures.write_index", write_index)
    progress = Progress(tmp_path, Console(width=300, force_jupyter=False), done=1)
    if code: progress.failed["far-s0"] = "runs/smoke/far-s0/train.ipynb"
    assert cli._conclude(progress, code, "smoke", ["table4"], [0, 1]) == code
    assert calls == [(tmp_path / "figures/smoke", tmp_path / "runs", "smoke", [0, 1], progress.failed)]
    assert f"index: {tmp_path}/figures/smoke/README.md" in capsys.readouterr().out
    cli._conclude(Progress(tmp_path, progress.console), 0, "smoke", ["table4"], [0, 1])          # nothing was to do: the index stays as it is
    assert len(calls) == 1


def test_every_rule_of_the_snakefile_has_its_word():
    rules = {line.split()[1].rstrip(":") for line in (cli.paper_notebooks() / "Snakefile").read_text().splitlines() if line.startswith("rule ")}
    assert rules - {"all"} == set(cli._DONE)


@pytest.mark.parametrize("which", ["scenes", "faces", "hr"])
def test_a_written_test_set_comes_back_through_a_folder(tmp_path, which):
    done = CliRunner().invoke(app, ["data", "test", "-o", str(tmp_path / "set"), "--preset", "smoke", "--set", which])
    assert done.exit_code == 0, done.output
    test, record = build_test_set(get_preset("smoke"), which), json.loads((tmp_path / "set/test.json").read_text())
    assert record["hash"] == test["hash"] and len(list((tmp_path / "set/images").iterdir())) == len(test["names"]) == record["images"]
    returned = get_method(f"folder:{tmp_path}/set/images")(test["images"], test["masks"], test["names"])
    assert torch.equal((returned * 255).round(), (test["images"] * 255).round())                 # png holds 8 bits
    for name, mask in zip(record["names"], test["masks"]):
        hole = np.asarray(Image.open(tmp_path / f"set/masks/{name}.png"))
        assert hole.ndim == 2 and set(np.unique(hole)) <= {0, 255} and np.array_equal(hole > 0, mask[0].numpy() > 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]                            # no leftovers beside it


def test_a_test_set_replaces_only_a_test_set(tmp_path, capsys, monkeypatch):
    write_test_set(tmp_path / "set", "smoke")
    assert "--overwrite" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "set", "--preset", "smoke")
    (tmp_path / "set/images/old.png").write_bytes(b"")
    write_test_set(tmp_path / "set", "smoke", "faces", overwrite=True)
    assert json.loads((tmp_path / "set/test.json").read_text())["set"] == "faces" and not (tmp_path / "set/images/old.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    assert "mine" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "mine", "--preset", "smoke", "--overwrite")
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    assert "faces, hr, scenes" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "new", "--preset", "smoke", "--set", "dogs")
    assert "--data" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "new", "--preset", "paper")


def test_pictures_of_one_name_are_refused(tmp_path, capsys, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / "pictures/test" / folder).mkdir(parents=True)
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / f"pictures/test/{folder}/same.png")
    assert "'same'" in refused(capsys, monkeypatch, "data", "test", "-o", tmp_path / "set", "--preset", "smoke", "--data", tmp_path / "pictures")
    assert not (tmp_path / "set").exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_write_pictures", lambda folder, *_: folder.mkdir(parents=True) or (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): write_test_set(tmp_path / "set", "smoke")
    assert not list(tmp_path.iterdir())


# ---- far inpaint

@pytest.fixture
def desk(tmp_path, monkeypatch):
    "IMAGES/ with a.png, b.jpg and deep/c.png, MASKS/ with their masks, in the current folder."
    monkeypatch.chdir(tmp_path)
    generator, hole = np.random.default_rng(0), np.zeros((20, 30), np.uint8)
    hole[5:12, 8:20] = 255
    for name in ("a.png", "b.jpg", "deep/c.png"):
        for folder in ("IMAGES", "MASKS"): (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "IMAGES" / name, dpi=(300, 300), icc_profile=b"profile")
        Image.fromarray(hole).save((tmp_path / "MASKS" / name).with_suffix(".png"))
    return tmp_path


def far(*arguments, code=0):
    done = CliRunner().invoke(app, ["inpaint", *map(str, arguments), "-m", "telea"])
    assert done.exit_code == code and (done.exception is None or isinstance(done.exception, SystemExit)), (done.output, done.exception)
    return done


def written(folder): return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_a_folder_is_filled_by_name_and_once(desk):
    assert "2 filled in OUT" in far("IMAGES", "MASKS", "-o", "OUT").stdout and written("OUT") == ["a.png", "b.jpg"]
    before = Path("OUT/a.png").stat().st_mtime_ns
    again = far("IMAGES", "MASKS", "-o", "OUT", "--recursive").stdout
    assert "1 filled, 2 left as they were" in again and written("OUT") == ["a.png", "b.jpg", "deep/c.png"]
    assert Path("OUT/a.png").stat().st_mtime_ns == before
    assert "2 filled in" in far("IMAGES", "MASKS", "-o", "OUT", "--overwrite").stdout and Path("OUT/a.png").stat().st_mtime_ns > before
    inside = np.asarray(Image.open("MASKS/a.png")) > 0
    first, second = (np.asarray(Image.open(f"{folder}/a.png")) for folder in ("IMAGES", "OUT"))
    assert np.array_equal(first[~inside], second[~inside]) and not np.array_equal(first[inside], second[inside])
    for name in ("a.png", "b.jpg"):
        info = Image.open(f"OUT/{name}").info
        assert info["icc_profile"] == b"profile" and np.allclose(info["dpi"], 300, atol=0.1)


def test_one_mask_for_all_and_masks_called_name_mask(desk):
    assert "3 filled" in far("IMAGES", "MASKS/a.png", "-o", "OUT", "-r").stdout
    Path("MASKS/a.png").rename("MASKS/a_mask.png"), Path("MASKS/b.png").unlink()
    done = far("IMAGES", "MASKS", "-o", "OUT2", code=1)
    assert "1 filled, 1 failed" in done.stdout and written("OUT2") == ["a.png"]
    line, = done.stderr.strip().splitlines()
    assert line.startswith("far: IMAGES/b.jpg: no masks called 'b'")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_bad_picture_stops_nothing(desk, batch):
    Path("IMAGES/a.png").write_bytes(Path("IMAGES/a.png").read_bytes()[:300])
    Image.new("L", (30, 20), 255).save("MASKS/deep/c.png")
    done = far("IMAGES", "MASKS", "-o", "OUT", "-r", "--batch", batch, code=1)
    assert "1 filled, 2 failed" in done.stdout and written("OUT") == ["b.jpg"]
    first, second = done.stderr.strip().splitlines()
    assert "IMAGES/a.png: damaged" in first and "covers all of IMAGES/deep/c.png" in second


def test_the_hole_can_be_in_the_picture(desk):
    hole = np.asarray(Image.open("MASKS/a.png")) > 0
    erased, painted = Image.open("IMAGES/a.png").convert("RGBA"), np.array(Image.open("IMAGES/a.png"))
    erased.putalpha(Image.fromarray((~hole * 255).astype(np.uint8))), erased.save("erased.png")
    painted[hole] = (255, 0, 250)
    Image.fromarray(painted).save("painted.png")
    assert far("erased.png", "-o", "1.png", "--mask-alpha").stdout.strip() == "1.png"
    far("painted.png", "-o", "2.png", "--mask-color", "#ff00ff")
    expected = np.asarray(Image.open(far("IMAGES/a.png", "MASKS/a.png", "-o", "3.png").stdout.strip()))
    for name in ("1.png", "2.png"): assert np.array_equal(np.asarray(Image.open(name).convert("RGB")), expected)
    assert "no pixel has the colour" in far("painted.png", "-o", "4.png", "--mask-color", "#00ff00", code=1).stderr
    assert "no transparency" in far("painted.png", "-o", "4.png", "--mask-alpha", code=1).stderr and not Path("4.png").exists()
    far("IMAGES/a.png", "MASKS/a.png", "-o", "5.png", "--invert")
    assert not np.array_equal(np.asarray(Image.open("5.png")), expected)


@pytest.mark.parametrize("arguments, said", [
    (["IMAGES/a.png", "-o", "x.png"], "give one mask"), (["IMAGES/a.png", "MASKS/a.png", "--mask-alpha", "-o", "x.png"], "give one mask"),
    (["IMAGES/a.png", "-o", "x.png", "--mask-color", "pinkish"], "pinkish"), (["IMAGES/a.png", "-o", "x.png", "--mask-color", "red", "--tolerance", "300"], "300"),
    (["IMAGES/none.png", "MASKS/a.png", "-o", "x.png"], "IMAGES/none.png"), (["IMAGES/a.png", "MASKS/none.png", "-o", "x.png"], "MASKS/none.png"),
    (["IMAGES/a.png", "MASKS/a.png", "-o", "x.doc"], "x.doc"), (["IMAGES", "MASKS", "-o", "x.png"], "must be one too"), (["IMAGES", "MASKS", "-o", "MASKS"], "is a mask"),
    (["IMAGES/a.png", "MASKS/a.png", "-o", "IMAGES/a.png"], "the picture itself"), (["IMAGES", "MASKS", "-o", "IMAGES"], "the picture itself"),
    (["IMAGES/a.png", "MASKS/a.png", "-o", "MASKS/a.png", "--overwrite"], "is a mask"), (["IMAGES", "MASKS", "-o", "x", "--format", "exe"], "exe"),
    (["IMAGES/a.png", "MASKS/a.png", "-o", "x.png", "-m", "criminisi"], "criminisi"), (["IMAGES/a.png", "MASKS/a.png", "-o", "x.png", "-m", "far:no/model", "--device", "banana"], "banana|no/model"),
    (["IMAGES/a.png", "MASKS/a.png", "-o", "x.png", "-m", "telea", "--max-side", "3"], "max_side"), (["MASKS/deep", "-o", "x", "--mask-alpha", "--format", "doc"], "doc")])
def test_a_wrong_call_is_one_line_and_code_2(desk, capsys, monkeypatch, arguments, said):
    before = {path: (desk / path).read_bytes() for path in written(desk)}
    line = refused(capsys, monkeypatch, "inpaint", *arguments, *([] if "-m" in arguments else ["-m", "telea"]))
    assert any(word in line for word in said.split("|")) and {path: (desk / path).read_bytes() for path in written(desk)} == before


def test_the_input_is_replaced_when_asked_and_two_results_never_share_a_name(desk, capsys, monkeypatch):
    far("IMAGES/a.png", "MASKS/a.png", "-o", "IMAGES/a.png", "--overwrite")
    Image.open("IMAGES/b.jpg").save("IMAGES/a.jpg")
    assert "would both become" in refused(capsys, monkeypatch, "inpaint", "IMAGES", "MASKS", "-o", "OUT", "--format", "png", "-m", "telea")
    assert "--recursive" in refused(capsys, monkeypatch, "inpaint", Path("IMAGES/deep").parent.parent / ".", "MASKS/a.png", "-o", "OUT", "-m", "telea")


def test_formats_hold_what_they_can(desk):
    deep, hole = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)), np.asarray(Image.open("MASKS/a.png")) > 0
    deep.save("deep.png"), Image.open("IMAGES/a.png").convert("CMYK").save("press.tif", icc_profile=b"press")
    turned = Image.Exif()
    turned[0x0112], turned[0x010F] = 6, "Maker"
    Image.open("IMAGES/a.png").rotate(90, expand=True).save("phone.jpg", exif=turned, quality=100)
    far("deep.png", "MASKS/a.png", "-o", "deep out.tif"), far("press.tif", "MASKS/a.png", "-o", "press out.tif"), far("press.tif", "MASKS/a.png", "-o", "press out.png")
    far("phone.jpg", "MASKS/a.png", "-o", "phone out.jpg"), far("IMAGES/a.png", "MASKS/a.png", "-o", "a.webp"), far("IMAGES/a.png", "MASKS/a.png", "-o", "small.webp", "--quality", 50)
    assert np.array_equal(np.asarray(Image.open("deep out.tif"))[~hole], np.asarray(deep)[~hole])
    press = Image.open("press out.tif")
    assert press.mode == "CMYK" and press.info["icc_profile"] == b"press" and "icc_profile" not in Image.open("press out.png").info
    phone = Image.open("phone out.jpg")
    assert phone.size == (30, 20) and phone.getexif().get(0x0112, 1) == 1 and phone.getexif()[0x010F] == "Maker"
    assert np.array_equal(np.asarray(Image.open("a.webp"))[~hole], np.asarray(Image.open("IMAGES/a.png"))[~hole])
    assert Path("small.webp").stat().st_size < Path("a.webp").stat().st_size


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_per_colour_stay_sixteen(desk, channels):
    values, hole = np.random.default_rng(0).integers(0, 65536, (20, 30, channels)).astype(np.uint16), np.asarray(Image.open("MASKS/a.png")) > 0
    save_picture(values, "deep.png", info={"icc_profile": b"wide", "dpi": (300, 300)})
    assert np.array_equal(read_deep("deep.png"), values) and Image.open("deep.png").info["icc_profile"] == b"wide"
    for name in ("out.png", "out.tif"):
        far("deep.png", "MASKS/a.png", "-o", name)
        result, info = read_deep(name), Image.open(name).info
        assert np.array_equal(result[~hole], values[~hole]) and not np.array_equal(result[hole], values[hole]), name
        assert info["icc_profile"] == b"wide" and np.allclose([float(value) for value in info["dpi"]], 300, atol=0.1)
    far("deep.png", "MASKS/a.png", "-o", "out.jpg"), far("out.tif", "MASKS/a.png", "-o", "again.webp")
    assert Image.open("out.jpg").info["icc_profile"] == b"wide" and Image.open("again.webp").mode == ("RGB" if channels == 3 else "RGBA")
    Path("torn.png").write_bytes(Path("deep.png").read_bytes()[:900])
    assert "torn.png: damaged" in far("torn.png", "MASKS/a.png", "-o", "torn out.png", code=1).stderr and not Path("torn out.png").exists()
    assert read_deep("IMAGES/a.png") is None and read_deep("none.png") is None


def test_a_full_disk_leaves_nothing_and_is_one_line(desk, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    done = far("IMAGES", "MASKS", "-o", "OUT", code=1)
    assert done.stderr.count("No space left on device") == 2 and written("OUT") == []


@pytest.fixture
def side(desk):
    "SIDE/ with a.png, a.jpg of other content, b.png, and the masks a_mask.png and deep/b_mask.png."
    (desk / "SIDE/deep").mkdir(parents=True)
    for name, source in (("a.png", "IMAGES/a.png"), ("a_mask.png", "MASKS/a.png"), ("deep/b.png", "IMAGES/deep/c.png"), ("deep/b_mask.png", "MASKS/a.png")):
        (desk / "SIDE" / name).write_bytes((desk / source).read_bytes())
    return desk


def test_in_one_folder_a_picture_is_never_its_own_mask_and_masks_are_not_filled(side):
    far("IMAGES/a.png", "MASKS/a.png", "-o", "expected.png"), far("IMAGES/deep/c.png", "MASKS/a.png", "-o", "expected b.png")
    assert "1 filled" in far("SIDE", "SIDE", "-o", "OUT").stdout and written("OUT") == ["a.png"]
    assert "1 filled, 1 left" in far("SIDE", "SIDE/deep/..", "-r", "-o", "OUT").stdout and written("OUT") == ["a.png", "deep/b.png"]
    far("SIDE/a.png", "SIDE", "-o", "single.png")
    for name, expected in (("OUT/a.png", "expected.png"), ("single.png", "expected.png"), ("OUT/deep/b.png", "expected b.png")):
        assert np.array_equal(np.asarray(Image.open(name)), np.asarray(Image.open(expected))), name
    Image.open("SIDE/deep/b.png").save("SIDE/a.jpg"), Image.open("SIDE/deep/b.png").save("SIDE/other.png")      # one more a, and one without a mask
    done = far("SIDE", "SIDE", "-o", "OUT2", code=1)
    assert written("OUT2") == ["a.jpg", "a.png"] and done.stderr.strip() == "far: SIDE/other.png: no masks called 'other_mask' in SIDE, expected one"
    assert np.array_equal(np.asarray(Image.open("OUT2/a.png")), np.asarray(Image.open("expected.png")))


def test_masks_and_results_may_lie_above_the_pictures(desk):
    Path("c.png").write_bytes(Path("MASKS/a.png").read_bytes())
    assert "1 filled" in far("IMAGES/deep", ".", "-o", "OUT").stdout and written("OUT") == ["c.png"]
    assert "2 filled" in far("IMAGES", "MASKS", "-o", ".").stdout and Path("a.png").is_file()


def test_the_one_mask_given_is_no_picture_of_its_folder(side):
    Path("IMAGES/hole.png").write_bytes(Path("MASKS/a.png").read_bytes())
    assert "2 filled" in far("IMAGES", "IMAGES/hole.png", "-o", "OUT").stdout and written("OUT") == ["a.png", "b.jpg"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_picture_under_another_name_is_still_no_mask_of_its_own(desk, capsys, monkeypatch, link):
    Path("MASKS/a.png").rename("MASKS/a_mask.png"), link(desk / "IMAGES/a.png", "MASKS/a.png"), link(desk / "IMAGES/a.png", "linked.png")
    far("IMAGES", "MASKS", "-o", "OUT"), far("IMAGES/a.png", "MASKS/a_mask.png", "-o", "expected.png")
    assert np.array_equal(np.asarray(Image.open("OUT/a.png")), np.asarray(Image.open("expected.png")))
    for mask in ("IMAGES/a.png", "linked.png"):
        assert "its own mask" in refused(capsys, monkeypatch, "inpaint", "IMAGES/a.png", mask, "-o", "x.png", "-m", "telea") and not Path("x.png").exists()


def test_a_format_takes_the_place_of_a_pictures_suffix_only_and_a_slash_makes_a_folder(desk):
    for out, form, result in (("filled.v2", "png", "filled.v2.png"), ("filled.JPG", ".PNG", "filled.png"), ("new/", None, "new/a.png"), ("x.png/", "tif", "x.png/a.tif")):
        assert far("IMAGES/a.png", "MASKS/a.png", "-o", out, *(["--format", form] if form else [])).stdout.strip() == result and Path(result).is_file()
    assert "2 filled" in far("IMAGES", "MASKS/a.png", "-o", "OUT.png/").stdout and written("OUT.png") == ["a.png", "b.jpg"]
    Image.open("IMAGES/a.png").save("photo.v2", "PNG")
    assert far("photo.v2", "MASKS/a.png", "-o", "new").stdout.strip() == "new/photo.v2.png"


def test_names_may_be_as_long_as_the_system_allows(desk):
    for name in ("n" * 251 + ".png", "ü" * 125 + "n.png"):
        Image.open("IMAGES/a.png").save(name)
        far(name, "MASKS/a.png", "-o", "OUT/")
        assert written("OUT") == [name] and not Path(f"OUT/{name}").unlink()
    Path("IMAGES/b.jpg").rename("IMAGES/" + "b" * 251 + ".jpg")
    done = far("IMAGES", "MASKS/a.png", "-o", "OUT", "--format", "jpeg", code=1)
    assert "1 filled, 1 failed" in done.stdout and "File name too long" in done.stderr and written("OUT") == ["a.jpeg"]


# ---- what the system refuses, and what nobody foresaw

@pytest.fixture
def locked(desk):
    "LOCKED/ with a picture, which cannot be searched: for root neither, whose right to do so is laid down meanwhile (Linux)."
    (desk / "LOCKED").mkdir(), (desk / "LOCKED/a.png").write_bytes((desk / "IMAGES/a.png").read_bytes()), (desk / "LOCKED").chmod(0)
    before, header = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0:
        try: libc = ctypes.CDLL(None)
        except OSError: libc = None
        if not hasattr(libc, "capset") or libc.capget(header, before): pytest.skip("root goes everywhere")
        libc.capset(header, (ctypes.c_uint32 * 6)(before[0] & ~0b110, *before[1:]))       # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    yield desk
    if os.geteuid() == 0: libc.capset(header, before)
    (desk / "LOCKED").chmod(0o755)


@pytest.mark.parametrize("arguments", [["IMAGES/a.png", "MASKS/a.png", "-o", "LOCKED/x.png"], ["IMAGES", "MASKS", "-o", "LOCKED/OUT"], ["LOCKED/a.png", "MASKS/a.png", "-o", "x.png"],
                                       ["IMAGES/a.png", "LOCKED/a.png", "-o", "x.png"], ["IMAGES/a.png", "MASKS/a.png", "-o", "x.png", "-m", "LOCKED/model"]])
def test_a_locked_folder_is_one_line(locked, capsys, monkeypatch, arguments):
    line = refused(capsys, monkeypatch, "inpaint", *arguments, *([] if "-m" in arguments else ["-m", "telea"]))
    assert line.startswith("far: LOCKED/") and line.endswith(": Permission denied") and not Path("x.png").exists()


def test_a_locked_folder_below_concerns_its_own_pictures_only(locked):
    Path("IMAGES/deep").chmod(0o444)                                                       # its names can be read, and no more
    done = far("IMAGES", "MASKS/a.png", "-o", "OUT", "-r", code=1)
    Path("IMAGES/deep").chmod(0o755)
    assert "2 filled, 1 failed" in done.stdout and done.stderr.startswith("far: IMAGES/deep/c.png: ") and "Permission denied" in done.stderr
    Path("OUT/deep").mkdir(mode=0o444)
    done = far("IMAGES", "MASKS/a.png", "-o", "OUT", "-r", code=1)
    assert "0 filled, 2 left" in done.stdout and done.stderr.strip() == "far: IMAGES/deep/c.png: OUT/deep/c.png: Permission denied"


@pytest.mark.parametrize("arguments, said", [
    (["inpaint", "IMAGES/a.png", "MASKS/a.png", "-o", "n" * 300 + ".png"], "File name too long"), (["inpaint", "n" * 300 + ".png", "MASKS/a.png", "-o", "x.png"], "File name too long"),
    (["export", "-o", "/dev/null/x/far.pt"], "/dev/null/x/far.pt cannot be written: Not a directory"), (["export", "-o", "IMAGES"], "IMAGES"),
    (["evaluate", "IMAGES", "IMAGES", "-o", "/dev/null/m.json"], "/dev/null/m.json cannot be written: Not a directory"), (["evaluate", "IMAGES", "IMAGES", "-o", "MASKS"], "MASKS cannot be written: Is a directory"),
    (["evaluate", "IMAGES", "IMAGES", "-o", "new/" + "n" * 300 + "/m.json"], "cannot be written: File name too long"), (["evaluate", "IMAGES", "IMAGES", "-o", "LOCKED/m.json"], "LOCKED/m.json cannot be written: Permission denied"),
    (["data", "test", "--preset", "smoke", "-o", "/dev/null/set"], "/dev/null")])
def test_a_place_that_cannot_be_is_one_line_before_anything_is_done(locked, capsys, monkeypatch, arguments, said):
    for name in ("evaluate_method", "evaluate_folders"): monkeypatch.setattr(cli, name, lambda *_: pytest.fail("measured first"))
    monkeypatch.setattr("far_nb.export.export_model", lambda *_: pytest.fail("exported first"))
    before = sorted(Path(".").rglob("*"))
    assert said in refused(capsys, monkeypatch, *arguments) and sorted(Path(".").rglob("*")) == before


def test_a_place_that_can_be_stays_as_it_was(desk):
    before = written(".")
    for out in ("m.json", "new/deeper/m.json", "new/../m.json", desk / "IMAGES/a.png"): cli._check_writable(Path(out))
    assert written(".") == before and not Path("new").exists()


@pytest.mark.parametrize("error, said", [(OSError(28, "No space left on device"), "far: No space left on device"), (OSError(28, "No space left on device", "x.bin"), "far: x.bin: No space left on device"),
                                         (ConnectionError("no route"), "far: ConnectionError: no route"), (FarError("a\nb"), "far: a b")])
def test_what_the_system_refuses_anywhere_is_one_line(capsys, monkeypatch, error, said):
    monkeypatch.setattr(cli, "reproduce", lambda *_, **__: (_ for _ in ()).throw(error))
    assert refused(capsys, monkeypatch, "reproduce") == said
    monkeypatch.setattr(cli, "reproduce", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError): main()                                          # a bug keeps its traceback


class Large(np.ndarray): "An array that can be watched."


@pytest.mark.parametrize("batch", [1, 3])
def test_what_nobody_foresaw_concerns_its_own_picture_only(desk, monkeypatch, batch):
    import far_nb.inpaint as library
    inpaint, save, alive = library.inpaint, library.save_picture, []
    def greedy(images, *arguments, **options):
        assert not any(watch() is not None for watch in alive)                             # what the failed picture took is free for the next
        if Path("IMAGES/a.png") in images:
            large = np.zeros(9).view(Large)
            alive.append(weakref.ref(large))
            raise MemoryError
        return inpaint(images, *arguments, **options)
    monkeypatch.setattr(library, "inpaint", greedy)
    monkeypatch.setattr(library, "save_picture", lambda picture, path, *rest: {}["b"] if path.name == "b.jpg" else save(picture, path, *rest))
    done = far("IMAGES", "MASKS", "-o", "OUT", "-r", "--batch", batch, code=1)
    assert "1 filled, 2 failed" in done.stdout and written("OUT") == ["deep/c.png"]
    assert done.stderr.splitlines() == ["far: IMAGES/a.png: MemoryError", "far: IMAGES/b.jpg: KeyError: 'b'"]


def test_an_interrupt_ends_with_what_was_filled(desk, monkeypatch):
    import far_nb.inpaint as library
    save = library.save_picture
    def interrupted(picture, path, *rest):
        if path.name == "b.jpg": raise KeyboardInterrupt
        return save(picture, path, *rest)
    monkeypatch.setattr(library, "save_picture", interrupted)
    done = far("IMAGES", "MASKS", "-o", "OUT", "-r", code=130)
    assert done.stdout.strip() == "1 filled in OUT" and done.stderr.strip() == "far: stopped, 2 of 3 not reached" and written("OUT") == ["a.png"]
    assert "130" in CliRunner().invoke(app, ["inpaint", "--help"]).stdout


# ---- far evaluate FILLED/ TRUE/

def measured(*arguments):
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def test_two_folders_are_compared_by_name(tmp_path, capsys, monkeypatch):
    generator, hole = np.random.default_rng(0), np.zeros((40, 48), np.uint8)
    hole[5:12, 8:20] = 255
    for folder in ("true", "filled", "masks"): (tmp_path / folder).mkdir()
    for name in "abc":
        true = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(true).save(tmp_path / f"true/{name}.png"), Image.fromarray(np.clip(true.astype(int) + 3, 0, 255).astype(np.uint8)).save(tmp_path / f"filled/{name}.png")
        Image.fromarray(hole).save(tmp_path / f"masks/{name}.png")
    value = lambda metrics, metric, protocol="standard": next(entry["value"] for entry in metrics["metrics"] if (entry["metric"], entry["protocol"]) == (metric, protocol))
    whole = measured(tmp_path / "filled", tmp_path / "true")
    assert whole["images"] == 3 and abs(value(whole, "PSNR") - 20 * np.log10(255 / 3)) < 0.1 and abs(value(whole, "PSNR", "paper") - value(whole, "PSNR") - 1) < 0.05
    inside = measured(tmp_path / "filled", tmp_path / "true", "--masks", tmp_path / "masks", "--protocol", "standard")
    assert {entry["protocol"] for entry in inside["metrics"]} == {"standard"}
    assert abs(value(inside, "PSNR") - value(whole, "PSNR") - 10 * np.log10(40 * 48 / (7 * 12))) < 0.2
    Image.new("RGB", (64, 52)).save(tmp_path / "true/d.png"), Image.new("RGB", (64, 52), (3, 3, 3)).save(tmp_path / "filled/d.png")
    mixed = measured(f"folder:{tmp_path / 'filled'}", tmp_path / "true")
    assert mixed["images"] == 4 and len(mixed["per_image"]["PSNR/standard"]) == 4 and value(mixed, "FID (lite0)") is None
    assert any("2 sizes" in (entry["reason"] or "") for entry in mixed["metrics"])
    (tmp_path / "filled/b.png").rename(tmp_path / "filled/b_mask.png")
    assert "no pictures called 'b'" in refused(capsys, monkeypatch, "evaluate", tmp_path / "filled", tmp_path / "true")
    for name in "abc": (tmp_path / f"masks/{name}.png").rename(tmp_path / f"true/{name}_mask.png")
    (tmp_path / "filled/b_mask.png").rename(tmp_path / "filled/b.png"), (tmp_path / "true/d.png").unlink()
    assert value(measured(tmp_path / "filled", tmp_path / "true", "--masks", tmp_path / "true"), "PSNR") == value(inside, "PSNR")
    assert "--masks" in refused(capsys, monkeypatch, "evaluate", "telea", "--masks", tmp_path / "masks")
    assert "protocol" in refused(capsys, monkeypatch, "evaluate", "telea", "--protocol", "mine")


@pytest.mark.parametrize("command", [[], ["reproduce"], ["inpaint"], ["evaluate"], ["data"], ["data", "test"]])
def test_help_fits_80_columns(command):
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0 and max(map(len, shown.stdout.splitlines())) <= 80 and "…" not in shown.stdout


def test_what_a_format_cannot_hold_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "masks"): Path(folder).mkdir()
    hole = np.zeros((20, 30), np.uint8)
    hole[5:9, 7:20] = 255
    pictures = {"clear.png": Image.new("RGBA", (30, 20), (9, 9, 9, 90)), "clear 2.png": Image.new("RGBA", (30, 20), (9, 9, 9, 90)), "plain.png": Image.new("RGB", (30, 20)),
                "deep.png": Image.fromarray(np.full((20, 30), 777, np.uint16))}
    for name, picture in pictures.items(): picture.save(Path("in", name))
    Image.new("L", (30, 20), 7).save("in/moving.gif", save_all=True, append_images=[Image.new("L", (30, 20), 90)])
    for name in (*pictures, "moving.gif"): Image.fromarray(hole).save(Path("masks", name).with_suffix(".png"))
    def notes(*more):
        done = CliRunner().invoke(app, ["inpaint", "in", "masks", "-m", "mean", *more])
        assert done.exit_code == 0, done.output
        return sorted(done.stderr.splitlines())
    frames = "note: written without further frames or pages: in/moving.gif"
    assert notes("-o", "same") == [frames]
    assert notes("-o", "out", "--format", "jpg") == ["note: written without 16 bits: in/deep.png", frames, "note: written without transparency: in/clear 2.png and 1 more"]
