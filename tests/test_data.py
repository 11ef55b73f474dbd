"""Reading pictures and masks, sets on disk, the sample set, samples with an address."""
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from far_nb import data as data_module
from far_nb.core import FarError
from far_nb.data import (ImageFolder, InpaintingDataset, Photographs, StepSampler, open_images, open_masks, read_image, read_mask,
                         sample_faces, sample_objects, sample_scenes, test_set, to_batch)
from far_nb.masks import MaskSampler


def ramp(width=40, height=30):
    "A picture whose every pixel tells where it is: red grows to the right, green downwards."
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], -1).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def far_apart(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


# ---- reading one picture -------------------------------------------------------------------------------------------------------

def test_plain_pictures_are_read_exactly_from_path_bytes_and_file(tmp_path):
    ramp().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), io.BytesIO(encoded(ramp()))):
        image = read_image(source)
        assert image.mode == "RGB" and far_apart(image, ramp()) == 0


def test_cmyk():
    image = read_image(encoded(ramp().convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB" and far_apart(image, ramp()) < 25                # JPEG and the CMYK conversion lose some


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.linspace(0, 65535, 50).astype(np.uint16)[None].repeat(20, 0)
    for kind in ("PNG", "TIFF"):
        image = read_image(encoded(Image.fromarray(levels), kind))
        assert image.mode == "RGB" and far_apart(np.asarray(image)[..., 0], levels // 257) == 0
    in_32_bits = Image.fromarray(levels.astype(np.int32))                       # how some Pillow versions open 16-bit PNG
    assert far_apart(np.asarray(read_image(encoded(in_32_bits, "TIFF")))[..., 0], levels // 257) == 0


def test_palette_grey_and_one_bit():
    quantised = ramp().quantize(16)
    assert far_apart(read_image(encoded(quantised)), quantised.convert("RGB")) == 0
    assert read_image(encoded(ramp().convert("L"))).mode == "RGB"
    assert set(np.unique(read_image(encoded(ramp().convert("1"))))) == {0, 255}


def test_transparency_is_laid_over_white():
    image = ramp().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0, 255]], 30, 0).repeat(20, 1).astype(np.uint8)))
    pixels = np.asarray(read_image(encoded(image)))
    assert (pixels[:, :20] == 255).all() and far_apart(pixels[:, 20:], np.asarray(ramp())[:, 20:]) == 0
    palette = ramp().quantize(4)
    transparent = np.asarray(read_image(encoded(palette, transparency=0)))
    assert (transparent[np.asarray(palette) == 0] == 255).all()


def test_exif_rotation_is_undone():
    exif = Image.Exif()
    for orientation, operation in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)):
        exif[0x0112] = orientation
        image = read_image(encoded(ramp(), "JPEG", exif=exif, quality=95))
        expected = ramp().transpose(operation)
        assert image.size == expected.size and far_apart(image, expected) < 25


@pytest.mark.parametrize("content", [b"", b"this is not a picture", encoded(ramp(), "JPEG")[:400], encoded(ramp(200, 200))[:500],
                                     encoded(ramp())[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 60, b"GIF89a" + b"\xff" * 30],
                         ids=["empty", "text", "cut jpeg", "cut png", "cut header", "damaged png", "damaged gif"])
def test_unreadable_pictures_are_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    for source, name in ((path, None), (content, "holiday.jpg")):
        with pytest.raises(FarError, match="holiday.jpg") as caught: read_image(source, name)
        assert "\n" not in str(caught.value)


def test_missing_file_folder_and_float_pictures(tmp_path):
    with pytest.raises(FarError, match="no such file"): read_image(tmp_path / "absent.png")
    with pytest.raises(FarError, match=tmp_path.name): read_image(tmp_path)
    with pytest.raises(FarError, match="floating-point"): read_image(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "f.tif")


def test_one_pixel_and_twenty_thousand_pixels(tmp_path):
    assert read_image(encoded(Image.new("RGB", (1, 1), "red"))).size == (1, 1)
    Image.new("RGB", (20_000, 50), "red").save(tmp_path / "wide.jpg")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert read_image(tmp_path / "wide.jpg").size == (20_000, 50)
    for crop in ("resized", "random", "center"):
        items = InpaintingDataset(ImageFolder(tmp_path), 32, MaskSampler(32), crop=crop)
        for index in range(2):
            image = items[index]["image"]
            assert image.shape == (3, 32, 32) and image[0].min() > 0.98 and image[1:].max() < 0.02


def test_too_many_pixels_is_refused_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(FarError, match="bomb.png: too large"): read_image(encoded(ramp()), "bomb.png")


def test_jpegs_are_decoded_no_larger_than_needed():
    content = encoded(ramp(1600, 800), "JPEG", quality=95)
    small = read_image(content, at_least=180)
    assert small.size == (400, 200) and far_apart(small, ramp(1600, 800).reduce(4)) < 12
    assert read_image(content, at_least=2000).size == (1600, 800)


# ---- masks ---------------------------------------------------------------------------------------------------------------------

def test_masks_soft_inverted_resized_and_binary():
    soft = Image.fromarray(np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(20, 0))
    hole = read_mask(encoded(soft))
    assert hole.dtype == bool and hole.shape == (20, 60)
    assert (hole == (np.asarray(soft) > 127)).all() and (read_mask(encoded(soft), invert=True) == ~hole).all()
    assert (read_mask(encoded(soft), size=(30, 10)) == hole[1::2, 1::2]).all()           # nearest
    larger = read_mask(encoded(soft), size=(120, 40))
    assert (larger == hole.repeat(2, 0).repeat(2, 1)).all()
    for stored in (hole.astype(np.uint8), hole.astype(np.uint8) * 255, hole):
        assert (read_mask(encoded(Image.fromarray(stored))) == hole).all()
    assert not read_mask(encoded(Image.new("L", (8, 8)))).any() and read_mask(encoded(Image.new("L", (8, 8), 255))).all()
    with pytest.raises(FarError, match="m.png"): read_mask(b"junk", name="m.png")


def test_open_masks(tmp_path):
    assert open_masks(None) is None
    assert all(mask.dtype == bool and mask.any() for mask in open_masks("sample"))
    for name, value in (("a", 255), ("empty", 0)): Image.new("L", (20, 10), value).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    assert [mask.shape for mask in open_masks(tmp_path, size=(8, 6))] == [(6, 8)]
    (tmp_path / "a.png").unlink()
    with pytest.raises(FarError, match="none of its 2 files"): open_masks(tmp_path)


# ---- sets on disk --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def photos(tmp_path):
    "Eight pictures of one colour each in two folders."
    folder = tmp_path / "photos"
    for index in range(8):
        path = folder / ("town" if index % 2 else "country") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (10 * index, 0, 0)).save(path)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "town" / ".hidden.png").write_bytes(b"")
    return folder


def pack(folder, path, names=None, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name in names or sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png") if not file.name.startswith(".")):
            archive.add(folder / name, name)
    return path


def test_folder_list_and_tar_are_the_same_set(photos, tmp_path):
    folder = ImageFolder(photos)
    assert folder.names == [f"country/{i}.png" for i in (0, 2, 4, 6)] + [f"town/{i}.png" for i in (1, 3, 5, 7)]
    (photos / "list.txt").write_text("# shuffled\n\n" + "\n".join(reversed(folder.names)) + "\n")
    (photos / "notes.txt").unlink()
    listed, packed = ImageFolder(photos / "list.txt"), ImageFolder(pack(photos, tmp_path / "all.tar"))
    dotted = tmp_path / "dotted.tar"
    with tarfile.open(dotted, "w") as archive: archive.add(photos, ".", filter=lambda member: None if "/." in member.name else member)
    for other in (listed, packed, ImageFolder(dotted)):
        assert other.names == folder.names and other.hash() == folder.hash() and len(other) == 8
        assert all(far_apart(other[index], folder[index]) == 0 for index in range(8))
    Image.new("RGB", (30, 30), "blue").save(photos / "country" / "0.png")
    assert ImageFolder(photos).hash() != packed.hash()


def test_several_shards_also_with_equal_names(photos, tmp_path):
    names = ImageFolder(photos).names
    one, two = pack(photos, tmp_path / "s-000.tar", names[:5]), pack(photos, tmp_path / "s-001.tar", names[5:])
    assert ImageFolder([one, two]).names == names
    for source in (tmp_path, str(tmp_path / "s-*.tar")): assert len(open_images(source, "all")) == 8
    doubled = ImageFolder([one, pack(photos, tmp_path / "s-002.tar", names[:2])])
    assert len(set(doubled.names)) == 7 and "s-002/country/0.png" in doubled.names


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png", "..\\secret.png", "C:/secret.png"])
def test_entries_that_point_outside_are_refused(tmp_path, name):
    content = encoded(ramp())
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        member = tarfile.TarInfo(name); member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    (tmp_path / "evil.txt").write_text(f"good.png\n{name}\n")
    for source in ("evil.tar", "evil.txt"):
        with pytest.raises(FarError, match="points outside"): ImageFolder(tmp_path / source)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_special_files_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        member = tarfile.TarInfo("photo.png"); member.type = kind; member.linkname = "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(FarError, match="link or a special file"): ImageFolder(tmp_path / "links.tar")


def test_sources_that_are_not_sets(tmp_path, photos):
    archive = pack(photos, tmp_path / "all.tar")
    (tmp_path / "cut.tar").write_bytes(archive.read_bytes()[:1100])
    (tmp_path / "text.tar").write_bytes(b"hello" * 500)
    (tmp_path / "zipped.tar").write_bytes(__import__("gzip").compress(archive.read_bytes()))
    (tmp_path / "latin.txt").write_bytes("é.png\n".encode("latin-1"))
    (tmp_path / "photo.zip").write_bytes(b"PK")
    (tmp_path / "nothing").mkdir()
    for name in ("cut.tar", "text.tar", "zipped.tar", "latin.txt", "photo.zip", "nothing", "absent"):
        with pytest.raises(FarError, match=name.split(".")[0]) as caught: ImageFolder(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_broken_files_are_replaced_counted_and_named(photos):
    (photos / "country" / "2.png").write_bytes(b"")
    (photos / "country" / "4.png").write_bytes((photos / "country" / "6.png").read_bytes()[:50])
    images = ImageFolder(photos)
    assert not images.skipped
    assert [images[index].getpixel((0, 0))[0] for index in range(8)] == [0, 60, 60, 60, 10, 30, 50, 70]
    assert sorted(images.skipped) == ["country/2.png", "country/4.png"] and all(images.skipped.values())
    again = ImageFolder(photos)
    assert far_apart(again[2], images[2]) == 0, "the stand-in does not depend on what was met before"
    log = images._log.path
    assert log.exists()
    del images
    assert not log.exists(), "the notes are removed with the set"


def test_missing_list_entries_are_skipped(photos):
    (photos / "list.txt").write_text("town/1.png\ntown/99.png\n")
    images = ImageFolder(photos / "list.txt")
    assert images[1].getpixel((0, 0)) == images[0].getpixel((0, 0)) == (10, 0, 0) and "town/99.png" in images.skipped
    assert images.hash()


def test_nothing_sound_is_an_error_not_an_endless_loop(tmp_path):
    for index in range(5): (tmp_path / f"{index}.jpg").write_bytes(b"broken")
    items = InpaintingDataset(ImageFolder(tmp_path), 32, MaskSampler(32))
    with pytest.raises(FarError, match="none of the 5 pictures"): items[3]


def test_skips_in_data_workers_reach_the_main_process(photos):
    (photos / "town" / "3.png").write_bytes(b"")
    images = ImageFolder(photos)
    loader = DataLoader(InpaintingDataset(images, 32, MaskSampler(32)), batch_size=4, num_workers=2)
    assert sum(len(batch["index"]) for batch in loader) == 8
    assert list(images.skipped) == ["town/3.png"]


def test_open_images_splits(photos, tmp_path):
    whole = set(open_images(photos, "all").names)
    parts = [set(open_images(photos, split).names) for split in ("train", "val", "test")]
    assert set.union(*parts) == whole and sum(map(len, parts)) == 8 and all(parts), "unsplit: fixed parts are held out"
    for split, names in (("train", "abc"), ("val", "de")):
        for name in names:
            (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
            ramp().save(tmp_path / "set" / split / f"{name}.png")
    for source in (tmp_path / "set", f"{tmp_path}/set/{{split}}", f"{tmp_path}/set/{{split}}*"):
        assert [open_images(source, split).names for split in ("train", "val", "test")] == [["a.png", "b.png", "c.png"], ["d.png", "e.png"], ["d.png", "e.png"]]
        assert len(open_images(source, "all")) == 5
    for wrong in ("sample-cats", tmp_path / "absent", f"{tmp_path}/{{split}}.tar"):
        with pytest.raises(FarError): open_images(wrong, "train")
    with pytest.raises(FarError, match="train"): open_images("sample-scenes", "training")
    two = tmp_path / "two"; two.mkdir()
    for name in "ab": ramp().save(two / f"{name}.png")
    with pytest.raises(FarError, match="all"): open_images(two, "train")


# ---- the sample set ------------------------------------------------------------------------------------------------------------

def test_sample_set_needs_no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the sample set went to the network"))
    for cached in (sample_scenes, sample_faces, data_module._objects): cached.cache_clear()
    sizes = {split: (len(sample_scenes(split)), len(sample_faces(split))) for split in ("train", "val", "test")}
    assert sizes == {"train": (18, 119), "val": (3, 17), "test": (6, 34)}
    assert not sample_scenes("train").skipped and not sample_faces("test").skipped
    assert len(sample_objects("train", 40)) == 40 and all(shape.dtype == bool and shape.any() for shape in sample_objects("test"))


def test_sample_set_is_split_by_photograph_and_person():
    for sample in (sample_scenes, sample_faces):
        groups = [{name.split("-")[0] for name in sample(split).names} for split in ("train", "val", "test")]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        hashes = {sample(split).hash() for split in ("train", "val", "test")}
        assert len(hashes) == 3


def test_faces_are_panels_without_their_frames():
    for face, name in zip(sample_faces("test"), sample_faces("test").names):
        assert face.width == face.height >= 250, name
        edges = np.concatenate([np.asarray(face)[[0, -1], :, :].reshape(-1, 3), np.asarray(face)[:, [0, -1], :].reshape(-1, 3)])
        top = np.asarray(face)[0]
        assert (top.min(-1) > 200).mean() < 0.05, f"{name}: a white frame at the top"
        assert (edges.min(-1) > 235).mean() < 0.35, f"{name}: a white frame"      # a white shirt may touch the lower edge


def test_a_package_without_its_pictures_is_named(monkeypatch):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FarError, match="pip install openpeople"): data_module._packaged("openpeople/data/x.jpg")


# ---- samples with an address ---------------------------------------------------------------------------------------------------

def gradients(count=5, size=(90, 70)):
    return Photographs([ramp(*size) for _ in range(count)])


@pytest.mark.parametrize("task", ["far", "mae"])
def test_items(task):
    items = InpaintingDataset(gradients(), 64, MaskSampler(64), seed=3, patch_size=8, task=task, length=12)
    assert len(items) == 12
    item = items[11]
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.float32 and 0 <= item["image"].min() <= item["image"].max() <= 1
    assert item["mask"].shape == (1, 64, 64) and item["mask"].dtype == torch.float32 and set(item["mask"].unique().tolist()) == {0.0, 1.0}
    assert item["index"] == 11 and ("token_mask" in item) == (task == "mae")
    if task == "mae": assert item["token_mask"].shape == (64,) and item["token_mask"].dtype == torch.bool and item["token_mask"].sum() == 48
    with pytest.raises(IndexError): items[12]


def test_crops_keep_the_geometry():
    photographs = gradients(1, (120, 80))
    for crop in ("resized", "random", "center"):
        items = InpaintingDataset(photographs, 32, MaskSampler(32), crop=crop, length=40)
        pictures = torch.stack([items[index]["image"] for index in range(40)])
        rising = (pictures[:, 0, :, -1] > pictures[:, 0, :, 0]).all(1)
        assert 5 < rising.sum() < 35, "flipped about half of the time"
        assert (pictures[:, 1, -1] > pictures[:, 1, 0]).all(), "never upside down"
        shown = (pictures[:, 0].amax((1, 2)) - pictures[:, 0].amin((1, 2))) * 120                # width of the crop in pixels, by its colours
        if crop == "resized": assert shown.min() < 60 and shown.max() > 95
        else: assert (shown - 80).abs().max() < 6
    items = InpaintingDataset(photographs, 80, MaskSampler(80), crop="center", length=20)
    straight = {bool(items[i]["image"][0, 0, 0] < items[i]["image"][0, 0, -1]): items[i]["image"] for i in range(20)}[True]
    centre = torch.from_numpy(np.asarray(ramp(120, 80))[:, 20:100].transpose(2, 0, 1) / 255).float()
    assert torch.allclose(straight, centre, atol=1e-6)


def test_workers_epochs_and_addresses_give_the_same_samples():
    items = InpaintingDataset(gradients(), 32, MaskSampler(32, [np.ones((3, 5), bool)]), seed=1, patch_size=8, task="mae", length=10)
    streams = [list(DataLoader(items, batch_size=4, sampler=StepSampler(10, 4, 5, seed=2), num_workers=workers)) for workers in (0, 2)]
    for first, second in zip(*streams, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    items.set_epoch(7)
    by_epoch = items[3]
    items.set_epoch(0)
    assert all(torch.equal(torch.as_tensor(by_epoch[key]), torch.as_tensor(items[7, 3][key])) for key in by_epoch)
    assert not torch.equal(items[0, 3]["mask"], items[1, 3]["mask"])
    other = InpaintingDataset(gradients(), 32, items.masks, seed=2, patch_size=8, task="mae", length=10)
    assert not torch.equal(items[0, 3]["mask"], other[0, 3]["mask"])


@pytest.mark.parametrize("wrong", [dict(size=32), dict(patch_size=7), dict(crop="corner"), dict(task="gan"), dict(mask_kind="blocks"), dict(scale=(0, 1))])
def test_wrong_settings_are_refused_where_they_enter(wrong):
    with pytest.raises(FarError): InpaintingDataset(gradients(1), **{"size": 64, "masks": MaskSampler(64), **wrong})


def test_step_sampler_resumes_and_shares():
    whole = list(StepSampler(7, 3, 11, seed=4))
    assert len(whole) == len(StepSampler(7, 3, 11, seed=4)) == 33
    for start in range(12): assert list(StepSampler(7, 3, 11, seed=4, start_step=start)) == whole[3 * start:]
    for epoch in range(4): assert sorted(index for e, index in whole if e == epoch) == list(range(7))
    assert [index for e, index in whole if e == 0] != [index for e, index in whole if e == 1], "a fresh permutation"
    ranks = [list(StepSampler(7, 1, 11, seed=4, rank=rank, world=3)) for rank in range(3)]
    assert [pair for step in zip(*ranks) for pair in step] == whole
    with pytest.raises(FarError): StepSampler(0, 1, 1)


def test_a_step_has_one_size_for_all_its_samples_and_processes():
    whole = list(StepSampler(7, 4, 11, seed=4, sizes=(64, 48, 32)))
    assert [address[:2] for address in whole] == list(StepSampler(7, 4, 11, seed=4)), "sizes change no order"
    assert [address[2] for address in whole] == [(64, 48, 32)[step % 3] for step in range(11) for _ in range(4)]
    for start in range(12): assert list(StepSampler(7, 4, 11, seed=4, start_step=start, sizes=(64, 48, 32))) == whole[4 * start:]
    ranks = [list(StepSampler(7, 2, 11, seed=4, rank=rank, world=2, sizes=(64, 48, 32))) for rank in range(2)]
    assert [address for step in range(11) for part in ranks for address in part[2 * step:2 * step + 2]] == whole


def test_an_address_with_a_size_is_the_same_sample_larger_or_smaller():
    items = InpaintingDataset(gradients(2, (300, 260)), 64, MaskSampler(64, [np.ones((3, 5), bool)], area=(0.1, 0.3)), patch_size=8, length=30)
    for crop in ("resized", "random", "center"):
        items.crop = crop
        for index in range(30):
            large, small, own = items[2, index, 128], items[2, index, 64], items[2, index]
            assert large["image"].shape == (3, 128, 128) and large["mask"].shape == (1, 128, 128)
            assert all(torch.equal(torch.as_tensor(small[key]), torch.as_tensor(own[key])) for key in own)
            assert (torch.nn.functional.avg_pool2d(large["image"], 2) - small["image"]).abs().mean() < 0.02, "the same crop and flip"
            assert 0.1 <= large["mask"].mean() <= 0.3 and abs(large["mask"].mean() - small["mask"].mean()) < 0.01


def test_to_batch():
    picture, hole = ramp(8, 6), np.eye(6, 8, dtype=bool)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    batch = to_batch([picture, np.asarray(picture), tensor, tensor / 255],
                     [hole, hole * np.uint8(255), torch.from_numpy(hole).float()[None], Image.fromarray(hole * np.uint8(255))])
    assert batch["image"].shape == (4, 3, 6, 8) and batch["mask"].shape == (4, 1, 6, 8)
    for index in range(1, 4):
        assert torch.allclose(batch["image"][index], batch["image"][0]) and torch.equal(batch["mask"][index], batch["mask"][0])
    for images, masks in (([picture], []), ([picture, ramp(9, 6)], [hole, hole]), ([picture], [hole.T]), ([], [])):
        with pytest.raises(FarError): to_batch(images, masks)


# ---- the fixed test set --------------------------------------------------------------------------------------------------------

def test_test_set_is_fixed_and_held_out(tmp_path):
    one, again, other = (test_set("sample-scenes", 32, 14, seed=seed) for seed in (0, 0, 1))
    assert one["images"].shape == (14, 3, 32, 32) and one["masks"].shape == (14, 1, 32, 32) and len(set(one["names"])) == 14
    assert one["hash"] == again["hash"] != other["hash"] and torch.equal(one["images"], again["images"]) and torch.equal(one["masks"], again["masks"])
    assert {name.split("#")[0] for name in one["names"]} == set(sample_scenes("test").names)
    share = one["masks"].mean((1, 2, 3))
    assert share.min() >= 0.1 and share.max() <= 0.5


def test_test_set_from_disk_with_fixed_masks(photos, tmp_path):
    masks = tmp_path / "masks"; masks.mkdir()
    for index in range(3):
        hole = np.zeros((50, 50), bool); hole[:, :10 * (index + 1)] = True
        Image.fromarray(hole).save(masks / f"{index}.png")
    fixed = test_set(photos, 16, 100, split="all", masks=masks)
    assert len(fixed["names"]) == 8 and fixed["names"] == ImageFolder(photos).names, "each picture once, however many were asked for"
    assert np.allclose(fixed["masks"][:3].mean((1, 2, 3)), [0.2, 0.4, 0.6], atol=0.04)
    assert torch.allclose(fixed["images"][:, 0, 0, 0] * 255, torch.tensor([0, 20, 40, 60, 10, 30, 50, 70]).float(), atol=0.01)
    assert len(test_set(photos, 16, 3, split="all", masks=masks)["names"]) == 3


# ---- the script that writes the sample set -------------------------------------------------------------------------------------

def test_sample_set_script(tmp_path, monkeypatch):
    import hashlib, runpy, sys, typer
    from typer.testing import CliRunner
    from far_nb.core import read_json

    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "data_scripts")])
    script = runpy.run_path(str(Path(__file__).parents[1] / "data_scripts" / "sample_set.py"))
    app = typer.Typer(); app.command()(script["main"])
    written = {}
    for form in ("folder", "tar"):
        out = tmp_path / form
        assert CliRunner().invoke(app, [str(out), "--size", "48", "--form", form, "--per-shard", "50"]).exit_code == 0
        manifest = read_json(out / "manifest.json")
        assert manifest["parts"]["faces/train"]["pictures"] == 119
        for part, entry in manifest["parts"].items():
            for name, file in entry["files"].items():
                content = (out / part / name).read_bytes()
                assert len(content) == file["bytes"] and hashlib.sha256(content).hexdigest() == file["sha256"]
        written[form] = [open_images(out / "faces", split) for split in ("train", "val", "test")]
        assert len(open_masks(out / "masks" / "test")) == len(sample_objects("test", 1000))
    assert [len(part) for part in written["folder"]] == [119, 17, 34]
    for one, other in zip(written["folder"], written["tar"]):
        assert one.names == other.names and one.hash() == other.hash() and one[3].size == (48, 48)
    refused = CliRunner().invoke(app, [str(tmp_path / "tar")])
    assert refused.exit_code == 2


def test_a_broken_test_picture_is_named(tmp_path):
    for index in range(3): (tmp_path / f"{index}.png").write_bytes(encoded(ramp()))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 pictures of .* can't be read.*1.png"): assert len(test_set(tmp_path, 16, 3, "all")["names"]) == 3
