"""Sets for real scale: shards written once and for other programs too, opened at once, read in an order that stays near; broken files in them."""
import io
import os
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from far_nb import data as data_module
from far_nb import shards as shards_module
from far_nb import training as training_module
from far_nb.core import FarError, read_json
from far_nb.data import ImageFolder, InpaintingDataset, Photographs, StepSampler, _Entries, open_images, verify
from far_nb.mae import MAE, MAEConfig
from far_nb.masks import MaskSampler
from far_nb.shards import ShardSampler, _keyed, order_of, sampler_for, write_shards
from far_nb.training import TrainConfig, pretrain_mae


def colour(number, kind="PNG", size=(40, 32)):
    "A picture of one colour that tells its number."
    buffer = io.BytesIO()
    Image.new("RGB", size, (10 * number, 0, 100)).save(buffer, kind)
    return buffer.getvalue()


def number_of(image):
    return round(float(image[0].mean()) * 25.5)


def twelve():
    return [(f"{'town' if number % 2 else 'sea'}/{number:02d}.png", colour(number)) for number in range(12)]


def contents(images):
    return {name: images.read_bytes(index) for index, name in enumerate(images.names)}


# ---- the order -----------------------------------------------------------------------------------------------------------------

orders = st.fixed_dictionaries({"shards": st.lists(st.integers(0, 6), min_size=1, max_size=60), "window": st.integers(1, 8), "seed": st.integers(0, 99)})


@settings(max_examples=60)
@given(orders, st.integers(1, 3), st.integers(1, 4), st.integers(0, 12))
def test_an_epoch_has_each_picture_once_for_any_processes_and_from_any_step(order, world, batch, start):
    shards, steps = order["shards"], 12 + len(order["shards"]) // (world * batch)
    whole = list(ShardSampler(batch_size=world * batch, steps=steps, **order))
    assert len(whole) == steps * world * batch == world * len(ShardSampler(batch_size=batch, steps=steps, world=world, **order))
    for epoch in range(steps * world * batch // len(shards)):
        assert sorted(index for e, index in whole if e == epoch) == list(range(len(shards)))
    ranks = [list(ShardSampler(batch_size=batch, steps=steps, rank=rank, world=world, start_step=start, **order)) for rank in range(world)]
    shared = [address for step in range(steps - start) for part in ranks for address in part[step * batch:(step + 1) * batch]]
    assert shared == whole[start * world * batch:], "the batches of one process, from any step on"


@settings(max_examples=60)
@given(orders, st.integers(0, 5))
def test_never_more_shards_at_a_time_than_the_window(order, epoch):
    sampler, shards = ShardSampler(batch_size=1, steps=1, **order), np.array(order["shards"])
    place = shards[sampler.order(epoch)]
    spans = [np.flatnonzero(place == shard)[[0, -1]] for shard in set(order["shards"])]
    begun = [sum(first <= position <= last for first, last in spans) for position in range(len(place))]
    assert max(begun) <= order["window"]
    renamed = (7 - shards) * 1000                                            # another listing of the same shards
    again = ShardSampler(batch_size=1, steps=1, **{**order, "shards": renamed}).order(epoch)
    assert (again == sampler.order(epoch)).all(), "only which pictures share a shard matters"


def test_shards_and_pictures_are_shuffled_anew_in_every_epoch():
    shards = np.repeat(range(10), 20)
    sampler = ShardSampler(shards, 3, 1, 1)
    one, two, other = sampler.order(0), sampler.order(1), ShardSampler(shards, 3, 1, 1, seed=1).order(0)
    assert len({tuple(order) for order in (one, two, other)}) == 3
    assert set(shards[one[:60]]) != set(shards[two[:60]]), "other shards come first"
    assert len(set(shards[one[:12]])) == 3, "the shards of a window are mixed"
    assert (np.diff(one) < 0).mean() > 0.3
    with pytest.raises(FarError, match="window of 0"): ShardSampler(shards, 0, 1, 1)


# ---- many entries --------------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
entries = st.lists(st.tuples(names, names, st.one_of(st.none(), st.integers(0, 2 ** 40)), st.one_of(st.none(), st.integers(0, 2 ** 40))), max_size=8)


@settings(max_examples=60)
@given(entries, entries, st.data())
def test_entries_in_arrays_are_the_entries(one, other, draw):
    both = _Entries.joined([_Entries.of(one), _Entries.of(other)])
    assert list(both) == [both[index] for index in range(len(both))] == one + other
    assert list(both.sorted()) == sorted(one + other, key=lambda entry: entry[0])
    assert both.names == [entry[0] for entry in one + other] and both.names[1:3] == [entry[0] for entry in one + other][1:3]
    some = draw.draw(st.lists(st.integers(0, len(both) - 1), max_size=5)) if len(both) else []
    assert list(both.take(some)) == [(one + other)[index] for index in some]
    with pytest.raises(IndexError): both[len(both)]


# ---- writing -------------------------------------------------------------------------------------------------------------------

def test_shards_have_the_bytes_of_the_files_and_are_a_set(tmp_path):
    for name, content in twelve():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    manifest = write_shards(tmp_path / "photos", tmp_path / "out", per_shard=5)
    assert manifest["pictures"] == 12 and verify(tmp_path / "out")["problems"] == []
    assert sorted(path.name for path in (tmp_path / "out/pictures").iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    written = open_images(tmp_path / "out", "all")
    assert contents(written) == dict(twelve()) and written.hash() == ImageFolder(tmp_path / "photos").hash()
    assert Counter(written.shards.tolist()) == {0: 5, 1: 5, 2: 2} and ImageFolder(tmp_path / "photos").shards is None
    with tarfile.open(tmp_path / "out/pictures/00000.tar") as archive: assert archive.getnames() != sorted(archive.getnames()), "a random sample"
    again = write_shards(written, tmp_path / "again", per_shard=5)
    assert again["hash"] == manifest["hash"], "shards of shards"
    write_shards({"train": written.subset(range(8)), "val": written.subset(range(8, 12))}, tmp_path / "split", per_shard=3, shuffle=False)
    assert [len(open_images(tmp_path / "split", split)) for split in ("train", "val")] == [8, 4]
    with pytest.raises(FarError, match="other settings"): write_shards(twelve()[:5], tmp_path / "out", per_shard=5)
    with pytest.raises(FarError, match="in memory"): write_shards(Photographs([Image.new("RGB", (4, 4))]), tmp_path / "memory")
    with pytest.raises(FarError, match="points outside"): write_shards([("../a.jpg", b"")], tmp_path / "evil")
    assert not (tmp_path / "memory").exists() and not (tmp_path / "evil").exists()


def test_a_stopped_write_leaves_whole_shards_and_goes_on(tmp_path, monkeypatch):
    asked, content = [], shards_module._content
    def fails(payload):
        asked.append(payload)
        if len(asked) == 8: raise OSError(28, "No space left on device")
        return content(payload)
    monkeypatch.setattr(shards_module, "_content", fails)
    with pytest.raises(OSError): write_shards(twelve(), tmp_path / "out", per_shard=5)
    (tmp_path / "out/pictures/.00001.tar.half.tar").write_bytes(b"half")              # what SIGKILL leaves
    assert [path.name for path in (tmp_path / "out").rglob("0*.tar")] == ["00000.tar"] and len(ImageFolder(tmp_path / "out/pictures/00000.tar")) == 5
    assert not (tmp_path / "out/manifest.json").exists()
    monkeypatch.setattr(shards_module, "_content", lambda payload: asked.append(payload) or content(payload))
    asked.clear()
    manifest = write_shards(twelve(), tmp_path / "out", per_shard=5)
    assert len(asked) == 7, "only what was missing"
    assert manifest["hash"] == write_shards(twelve(), tmp_path / "whole", per_shard=5)["hash"] and verify(tmp_path / "out")["problems"] == []


def test_what_cannot_be_copied_is_left_out_and_told(tmp_path):
    folder = tmp_path / "photos"; (folder / "d.png").mkdir(parents=True)
    (folder / "a.png").write_bytes(colour(1)); (folder / "b.png").write_bytes(b"broken")
    manifest = write_shards(folder, tmp_path / "out")
    assert list(manifest["parts"]["pictures"]["skipped"]) == ["d.png"]
    assert contents(ImageFolder(tmp_path / "out")) == {"a.png": colour(1), "b.png": b"broken"}, "bytes as they are, whatever they say"


parts_of_names = st.lists(st.text("ab._-_é\n: ", min_size=1, max_size=5).filter(lambda part: part.strip(". ")), min_size=1, max_size=2)


@settings(max_examples=100)
@given(st.lists(st.tuples(parts_of_names, st.sampled_from([".jpg", ".PNG", ".jpeg"])), max_size=8))
def test_names_are_safe_for_webdataset(drawn):
    webdataset = pytest.importorskip("webdataset")
    given_names = ["/".join(parts) + suffix for parts, suffix in drawn]
    safe = _keyed(given_names)
    keys = [webdataset.tariterators.base_plus_ext(name) for name in safe]
    assert [suffix for _, suffix in keys] == [suffix[1:].lower() for _, suffix in drawn] and len({key for key, _ in keys}) == len(keys)
    assert all(name.splitlines() == [name] for name in safe) and _keyed(safe) == safe, "safe names stay as they are"
    assert _keyed(["b/class.x/name.jpg", "name_2.png"]) == ["b/class.x/name.jpg", "name_2.png"]
    with pytest.raises(FarError, match="suffix"): _keyed(["name"])


def test_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    odd = [("town.x/a.b.c.jpg", colour(13, "JPEG")), ("town.x/a_b_c.JPG", colour(14, "JPEG")), ("__meta__/a.jpg", colour(15, "JPEG")), ("a.png", colour(16)), ("a.jpg", colour(17, "JPEG"))]
    write_shards(twelve() + odd, tmp_path / "out", per_shard=5)
    urls = [str(path) for path in sorted((tmp_path / "out").rglob("*.tar"))]
    assert len(urls) == 4
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    found = [image for sample in samples for kind, image in sample.items() if kind in ("jpg", "png")]
    assert len(samples) == len(found) == 17 and {round(image.getpixel((5, 5))[0] / 10) for image in found} == {*range(12), *range(13, 18)}
    assert {sample["__key__"] for sample in samples} == {name.rsplit(".", 1)[0] for name in ImageFolder(tmp_path / "out").names}


# ---- opening and reading -------------------------------------------------------------------------------------------------------

@pytest.fixture
def old_shard(tmp_path, monkeypatch):
    "A tar with an old date, and every tar worth keeping."
    monkeypatch.setattr(data_module, "_WORTH_KEEPING", 1)
    monkeypatch.setenv("FAR_NB_CACHE", str(tmp_path / "cache"))
    write_shards(twelve(), tmp_path / "out", per_shard=100)
    path = tmp_path / "out/pictures/00000.tar"
    os.utime(path, (1e9, 1e9))
    return path


def test_headers_are_read_once(old_shard, tmp_path, monkeypatch):
    read, count = data_module._read_headers, []
    monkeypatch.setattr(data_module, "_read_headers", lambda path: count.append(path) or read(path))
    def opened():
        before = len(count)
        images = ImageFolder(old_shard)
        assert contents(images) == expected
        return len(count) - before
    expected = dict(twelve())
    assert [opened(), opened()] == [1, 0]
    kept, = (tmp_path / "cache").rglob("*.npz")
    for content in (b"", b"junk" * 99, kept.read_bytes()[:-40], pickle.dumps([1])):
        kept.write_bytes(content)
        assert [opened(), opened()] == [1, 0], "a torn index is made again"
    kept.unlink(); np.save(kept.with_suffix(".npy"), np.zeros(3)); os.replace(kept.with_suffix(".npy"), kept)
    assert opened() == 1
    expected["sea/00.png"] = colour(20, size=(60, 50))
    with tarfile.open(old_shard, "w") as archive:
        for name, content in expected.items(): shards_module._add(archive, name, content)
    assert [opened(), opened()] == [1, 1], "changed; and too new to be kept"
    os.utime(old_shard, (2e9 - 1e9 + 5, 1e9 + 5))
    assert [opened(), opened()] == [1, 0]


@pytest.mark.parametrize("cache", ["/proc/nowhere", "file"])
def test_without_a_place_to_keep_them_headers_are_read_again(old_shard, tmp_path, monkeypatch, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAR_NB_CACHE", str(tmp_path / cache))
    for _ in range(2): assert contents(ImageFolder(old_shard)) == dict(twelve())


def open_below(folder):
    "Files there that this process has open."
    links = [link for link in Path("/proc/self/fd").iterdir() if os.path.islink(link) and os.path.lexists(link)]
    return [target for target in (os.path.realpath(link) for link in links) if target.startswith(f"{folder}/")]


def test_few_shards_stay_open_and_all_can_be_read_by_others(tmp_path, monkeypatch):
    write_shards(twelve(), tmp_path / "out", per_shard=2)
    images = ImageFolder(tmp_path / "out")
    monkeypatch.setattr(ImageFolder, "_open_shards", 3)
    for _ in range(2):
        for index in range(12): images.read_bytes(index)
        assert len(images._handles) == 3
    copy = pickle.loads(pickle.dumps(images))
    assert not copy._handles and contents(copy) == contents(images) == dict(twelve())
    part = images.subset([7, 2])
    assert [part.read_bytes(0), part.read_bytes(1)] == [images.read_bytes(7), images.read_bytes(2)]
    for handle in images._handles.values(): os.close(handle.number); handle.number = os.open(tmp_path, os.O_RDONLY)      # the disk was away: reads fail
    assert contents(images) == dict(twelve()), "opened anew"
    if Path("/proc/self/fd").exists():
        assert open_below(tmp_path)
        del images, copy, part, handle
        assert not open_below(tmp_path)


def test_the_set_says_how_it_is_read(tmp_path, monkeypatch):
    write_shards(twelve(), tmp_path / "out", per_shard=2)
    dataset = lambda images, **options: InpaintingDataset(images, 16, MaskSampler(16), **options)
    small, memory = dataset(ImageFolder(tmp_path / "out")), dataset(Photographs([Image.new("RGB", (20, 20))]))
    for data in (small, memory): assert type(sampler_for(data, 1, 1)) is StepSampler and order_of(data) is None
    monkeypatch.setattr(data_module, "_LARGE", 100)
    large = open_images(tmp_path / "out", "all")
    assert large.window == 8 and large.subset([3]).window == 8
    large.window = 2
    several = dataset(large, length=30)
    assert isinstance(sampler_for(several, 1, 1), ShardSampler) and sorted(sampler_for(several, 1, 1).order(0)) == list(range(30))
    assert len({order_of(several), order_of(dataset(large.subset(range(11)))), order_of(small)}) == 3
    assert list(sampler_for(several, 2, 9, 3, 1, 1, 2, (32, 16))) == list(ShardSampler(np.resize(large.shards, 30), 2, 2, 9, 3, 1, 1, 2, (32, 16)))
    streams = [list(DataLoader(several, 4, sampler=sampler_for(several, 4, 6), num_workers=workers)) for workers in (0, 2)]
    for one, other in zip(*streams, strict=True): assert all(torch.equal(one[key], other[key]) for key in one)
    (tmp_path / "a.png").write_bytes(colour(1))
    loose = ImageFolder([tmp_path / "out", tmp_path])
    assert loose.window is None
    loose.window = 2
    with pytest.raises(FarError, match="not all pictures lie in tar shards"): sampler_for(dataset(loose), 1, 1)


# ---- twenty per cent of broken files -------------------------------------------------------------------------------------------

def damaged_set():
    "(name, content) of 25 pictures, a fifth of them broken in as many ways; 3 and 17 are sound but called by a wrong suffix."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file: file.writestr("a.png", colour(1))
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(noise, "JPEG")
    broken = {4: noise.getvalue()[:700], 5: b"", 11: b"<html>404 Not Found</html>", 18: archive.getvalue(), 24: b"\x89PNG\r\n\x1a\n" + b"\0" * 60}
    return [(f"{number:02d}.{'jpg' if number in (3, 4, 11, 17) else 'png'}", broken.get(number, colour(number))) for number in range(25)], [*broken]


def stand_in(number, broken):
    while number in broken: number = (number + 1) % 25
    return number


def train(images, out, monkeypatch, workers=0, stop_after=None, **options):
    "One epoch of a small MAE in five steps; [(index, picture that was seen)]."
    torch.manual_seed(0)
    mae = MAE(MAEConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2))
    data = InpaintingDataset(images, 32, MaskSampler(32, area=(0.1, 0.3)), patch_size=8, task="mae")
    seen, batches = [], training_module._batches
    def watched(*arguments):
        for number, parts in enumerate(batches(*arguments)):
            if number == stop_after: raise RuntimeError("stopped by the test")
            for batch in parts: seen.extend((index, number_of(image)) for index, image in zip(batch["index"].tolist(), batch["image"]))
            yield parts
    with monkeypatch.context() as patched:
        patched.setattr(training_module, "_batches", watched)
        pretrain_mae(mae, data, TrainConfig(**{"steps": 5, "batch_size": 5, "workers": workers, "save_every": 1, **options}), out)
    return seen


def test_a_fifth_of_broken_files_is_skipped_reported_and_nothing_else_is_lost(tmp_path, monkeypatch, capsys):
    pairs, broken = damaged_set()
    (tmp_path / "folder").mkdir()
    for name, content in pairs: (tmp_path / "folder" / name).write_bytes(content)
    write_shards(pairs, tmp_path / "shards", per_shard=7)
    models = set()
    for source in ("folder", "shards"):
        for workers in (0, 2):
            out = tmp_path / f"{source}-{workers}"
            seen = train(ImageFolder(tmp_path / source), out, monkeypatch, workers)
            assert sorted(seen) == [(number, stand_in(number, broken)) for number in range(25)], "each sample once, each sound picture itself"
            record = read_json(out / "train.json")
            assert sorted(record["skipped"]) == [pairs[number][0] for number in broken]
            assert all(reason.startswith(name) and len(reason) > len(name) + 10 for name, reason in record["skipped"].items())
            assert "5 unreadable pictures were skipped" in capsys.readouterr().out.strip().splitlines()[-1]
            assert record["steps"] == 5 and np.isfinite(float((out / "log.csv").read_text().splitlines()[-1].split(",")[-1]))
            models.add((out / "model/model.safetensors").read_bytes())
    assert len(models) == 1, "folder or shards, with workers or without: the same training"


def test_broken_files_met_before_an_interruption_are_reported_too(tmp_path, monkeypatch, capsys):
    pairs, broken = damaged_set()
    write_shards(pairs, tmp_path / "shards", per_shard=7)
    def opened(window):
        images = ImageFolder(tmp_path / "shards")
        images.window = window
        return images
    with pytest.raises(RuntimeError, match="by the test"): train(opened(2), tmp_path / "out", monkeypatch, stop_after=3)
    met = torch.load(tmp_path / "out/checkpoints/step-00000003.pt", weights_only=True)["skipped"]
    with pytest.raises(FarError, match="data.order was 2 of 4 shards at a time"): train(opened(None), tmp_path / "out", monkeypatch)
    rest = train(opened(2), tmp_path / "out", monkeypatch)
    assert met and len(rest) == 10 and not {pairs[index][0] for index, _ in rest} >= set(met), "some are met only before"
    assert sorted(read_json(tmp_path / "out/train.json")["skipped"]) == [pairs[number][0] for number in broken]
    assert train(opened(2), tmp_path / "whole", monkeypatch)[15:] == rest, "what would have followed"
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (tmp_path / "out/model/model.safetensors").read_bytes()
