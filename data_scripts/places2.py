"""Places2 (Places365-Standard) as the paper uses it, from the official files, packed or unpacked.

SOURCE holds what http://places2.csail.mit.edu/download.html offers, of the large or the 256 px version:
train_large_places365standard.tar, val_large.tar, test_large.tar, or the folders data_large, val_large, test_large that come out of
them; and, where present, the official lists (places365_train_standard.txt, places365_val.txt, categories_places365.txt).
The easy-format layout (folders train/SCENE and val/SCENE) does as well. Nothing is unpacked; files are copied byte by byte, unless --size.

OUT/train: the whole official training set, 1.8 million pictures, in the order of the hash of their names.
OUT/test:  36,500 pictures. The paper does not publish its list; 36,500 is the number of the official validation pictures (100 of each
           of 365 scenes), and the released configuration evaluates on a folder named after them, so these are taken. Were there more,
           those whose names have the smallest SHA-256; --test-list takes any other list of names.
OUT/hr:    1,000 of the test pictures for 512x512: the first by hash with at least --hr-side pixels a side (or --hr-list), never reduced
           below it. The paper calls them additional; the released configuration takes them from the validation pictures, too.
OUT/val:   2,000 of the official test pictures by hash, if SOURCE has them: to watch a training without looking at the test set.

--scenes writes the subset of the ablations instead: five scenes with all of their training pictures (about 25,000) as OUT/train and
their official validation pictures (500) as OUT/val. The paper does not name its scenes in the main text; --scenes ablation takes
bathroom, bedroom, highway, house and kitchen.

A file list OUT/PART.txt stands beside each part, one path a line, as the released code reads it from OUT when the pictures are files
(--form folder, or shards unpacked in place).
"""
import difflib
import hashlib
from collections import ChainMap
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Mapping, Optional, Sequence

import typer
from common import (Form, Forms, Jobs, Member, Out, PerShard, build, by_hash, lines_of, listed, members, note, one_line_errors, picture, read,
                    shorter_side)

from far_nb.core import FarError

ABLATION = ("bathroom", "bedroom", "highway", "house", "kitchen")
OFFICIAL = {"train": 1_803_460, "val": 36_500, "test": 328_500}
NAMES = {"train": ("train_large_places365standard.tar", "data_large_standard", "data_large",
                   "train_256_places365standard.tar", "data_256_standard", "data_256", "train"),
         "val": ("val_large.tar", "val_large", "val_256.tar", "val_256", "val"),
         "test": ("test_large.tar", "test_large", "test_256.tar", "test_256", "test")}
MD5 = {"train_large_places365standard.tar": "67e186b496a84c929568076ed01a8aa1", "val_large.tar": "9b71c4993ad89d2d8bcbdc4aef38042f",
       "test_large.tar": "41a4b6b724b1d2cd862fb3871ed59913", "train_256_places365standard.tar": "53ca1c756c3d1e7809517cc47c5561c5",
       "val_256.tar": "e27b17d8d44f4af9a78502beb927f808", "test_256.tar": "f532f6ad7b582262a2ec8009075e186b"}
Pool = dict[str, Member]


def find(source: Path, part: str) -> Path | None:
    "The archive or folder of an official part."
    return next((source / name for name in NAMES[part] if (source / name).exists()), None)


def pool(source: Path, part: str) -> Pool:
    "Pictures of an official part by their official names, without the folder that the archives put around them; empty if it is not there."
    path = find(source, part)
    if path is None: return {}
    found = {}
    for member in members(path):
        first, _, rest = member.name.partition("/")
        found[rest if first in NAMES[part] else member.name] = member
    if len(found) != OFFICIAL[part]: note(f"{path} has {len(found):,} pictures; the official {part} part has {OFFICIAL[part]:,}")
    return found


def check(source: Path) -> None:
    "Compare the archives with the published MD5 sums."
    for path in filter(None, (find(source, part) for part in NAMES)):
        if path.name not in MD5: note(f"{path} is no official archive: nothing to compare it with"); continue
        with open(path, "rb") as file: found = hashlib.file_digest(file, "md5").hexdigest()
        if found != MD5[path.name]: raise FarError(f"{path}: MD5 {found}, published {MD5[path.name]}: download it again")
        typer.echo(f"{path.name}: MD5 as published")


def official_list(source: Path, name: str) -> list[tuple[str, int]] | None:
    "(picture, number of its scene) of an official list, which stands in SOURCE or the folder it came in; None without one."
    path = next((path for path in (source / name, source / "filelist_places365-standard" / name) if path.exists()), None)
    if path is None: return None
    try: return [(picture.lstrip("/"), int(number)) for picture, number in (line.rsplit(maxsplit=1) for line in lines_of(path))]
    except ValueError: raise FarError(f"{path} is not an official list: each line should be a path and a number") from None


def on_list(found: Pool, source: Path, name: str) -> Pool:
    "The pictures that the official list names, where there is one; those that are missing are told."
    if not found or (wanted := official_list(source, name)) is None: return found
    if absent := [picture for picture, _ in wanted if picture not in found]:
        if len(absent) == len(wanted): return found          # the easy-format layout has other names
        note(f"{len(absent):,} of the {len(wanted):,} pictures of {name} are not there, such as {absent[0]}")
    return {picture: found[picture] for picture, _ in wanted if picture in found}


def scene(name: str) -> str:
    "'b/basketball_court/indoor/00000001.jpg' -> 'basketball_court/indoor'; '' for a picture in no folder."
    folders = PurePosixPath(name).parts[:-1]
    return "/".join(folders[1:] if folders and len(folders[0]) == 1 else folders)


def scenes_of_val(found: Pool, source: Path) -> dict[str, str]:
    "Picture -> scene for the validation part, from its folders or the official lists."
    if any(map(scene, found)): return {name: scene(name) for name in found}
    labels, scenes = official_list(source, "places365_val.txt"), official_list(source, "categories_places365.txt")
    if labels is None or scenes is None:
        raise FarError(f"--scenes needs places365_val.txt and categories_places365.txt in {source}: filelist_places365-standard.tar has them")
    by_number = {number: scene(f"{name}/picture") for name, number in scenes}
    return {name: by_number[number] for name, number in labels}


def ablation(source: Path, train: Pool, val: Pool, wanted: Sequence[str]) -> dict[str, list[str]]:
    "Names of the pictures of some scenes."
    have = {scene(name) for name in train}
    for name in wanted:
        if name not in have:
            near = difflib.get_close_matches(name, have, 3) or sorted(have)[:5]
            raise FarError(f"--scenes: no training picture is of the scene '{name}': did you mean {', '.join(near)}?")
    labels = scenes_of_val(val, source) if val else {}
    return {"train": by_hash(name for name in train if scene(name) in wanted), "val": by_hash(name for name in val if labels.get(name) in wanted)}


def large_enough(candidates: list[str], found: Mapping[str, Member], side: int, count: int) -> list[str]:
    "The first `count` with `side` pixels at least; a note when there are fewer."
    chosen = []
    for name in candidates:
        if len(chosen) == count: break
        if shorter_side(read(found[name])) >= side: chosen.append(name)
    if candidates and len(chosen) < count:
        note(f"{len(chosen):,} test pictures, not {count:,}, have {side} pixels a side for OUT/hr (val_large.tar has them)")
    return chosen


def main(source: Annotated[Path, typer.Argument(help="Folder of the official archives or what came out of them.", show_default=False)],
         out: Out,
         size: Annotated[Optional[int], typer.Option(min=16, help="Shorter side in pixels; smaller pictures stay. Default: all as they are.")] = None,
         scenes: Annotated[Optional[str], typer.Option(help="Only these, such as kitchen,house: the ablations' subset. 'ablation': five.")] = None,
         test_list: Annotated[Optional[Path], typer.Option(help="Names of the test pictures, one a line.")] = None,
         hr_list: Annotated[Optional[Path], typer.Option(help="Names of the high-resolution ones among them.")] = None,
         test_count: Annotated[int, typer.Option(min=1, help="Test pictures without a list.")] = 36_500,
         hr_count: Annotated[int, typer.Option(min=0, help="High-resolution test pictures.")] = 1_000,
         hr_side: Annotated[int, typer.Option(min=16, help="Pixels a side that these have at least.")] = 512,
         val_count: Annotated[int, typer.Option(min=0, help="Validation pictures.")] = 2_000,
         check_md5: Annotated[bool, typer.Option("--check-md5", help="First compare the archives with the published sums.")] = False,
         form: Forms = Form.tar, per_shard: PerShard = 1000, jobs: Jobs = 1) -> None:
    """Prepare Places2: OUT/train, OUT/val, OUT/test and OUT/hr, their file lists and a manifest.

    The same call again does what is missing. far reproduce --preset paper takes OUT as --data,
    or, written with --scenes, as --ablation-data.
    """
    with one_line_errors():
        if check_md5: check(source)
        pools = {part: pool(source, part) for part in NAMES}
        pools["train"] = on_list(pools["train"], source, "places365_train_standard.txt")
        if not any(pools.values()): raise FarError(f"{source} has none of {', '.join(name for names in NAMES.values() for name in names[:2])}")
        for part in (part for part, found in pools.items() if not found): note(f"{source} has no official {part} part ({NAMES[part][0]})")
        every = ChainMap(*pools.values())
        if len(every) < sum(map(len, pools.values())): raise FarError(f"{source}: two parts have pictures of one name: this is no official layout")
        settings = {"script": "places2", "source": [path.name for part in NAMES if (path := find(source, part))], "size": size, "hr_side": hr_side}
        if scenes:
            wanted = ABLATION if scenes == "ablation" else [name.strip() for name in scenes.split(",")]
            chosen = ablation(source, pools["train"], pools["val"], wanted)
        else:
            test = listed(test_list, every) if test_list else by_hash(pools["val"])[:test_count]
            held_out = set(test)
            chosen = {"train": by_hash(name for name in pools["train"] if name not in held_out),
                      "val": by_hash(name for name in pools["test"] if name not in held_out)[:val_count], "test": test,
                      "hr": listed(hr_list, test) if hr_list else large_enough(by_hash(test), every, hr_side, hr_count)}
        parts = {part: [(name, every[name]) for name in names] for part, names in chosen.items()}
        reduce = partial(picture, size=size)
        build(out, parts, reduce, settings, form, per_shard, jobs, makers={"hr": partial(picture, size=size and max(size, hr_side))})


if __name__ == "__main__":
    typer.run(main)
