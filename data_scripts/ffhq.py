"""FFHQ as the paper uses it: 68,000 faces to train with, 2,000 to test with.

SOURCE is images1024x1024 or thumbnails128x128 from https://github.com/NVlabs/ffhq-dataset: the folder (00000/00000.png … 69000/69999.png,
or all in one), or a tar or zip of it. Nothing is unpacked; pictures are copied byte by byte, unless --size.

The paper gives the numbers 68,000 and 2,000 and no list. The last 2,000 (68000 to 69999) are the test set here: FFHQ's order is that of
no person or theme, and the choice can be told in a word. --list takes any other names. There is no third part: a training that wants to
be watched on other pictures than the test set's can hold some out.
"""
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Optional

import typer
from common import Form, Forms, Jobs, Member, Out, PerShard, build, by_hash, listed, members, note, one_line_errors, picture

from far_nb.core import FarError

COUNT, FIRST_TEST = 70_000, 68_000


def numbered(found: list[Member]) -> dict[str, Member]:
    "Faces by their official names, '68000/68123.png', however the source arranges them."
    faces = {}
    for member in found:
        path = PurePosixPath(member.name)
        if not (path.stem.isdecimal() and len(path.stem) == 5):
            raise FarError(f"'{member.name}' of {member.path} is no picture of FFHQ (five digits): give the folder or archive of images1024x1024")
        faces[f"{int(path.stem) // 1000 * 1000:05d}/{path.name}"] = member
    if len(faces) < len(found):
        raise FarError(f"{len(found) - len(faces)} pictures have the name of another: give one folder or archive, of one size")
    if len(faces) != COUNT: note(f"{len(faces):,} pictures; FFHQ has {COUNT:,}")
    return faces


def main(source: Annotated[Path, typer.Argument(help="Folder, .tar or .zip of images1024x1024 or thumbnails128x128.", show_default=False)],
         out: Out,
         size: Annotated[Optional[int], typer.Option(min=16, help="Shorter side in pixels; smaller pictures stay. Default: all as they are.")] = None,
         test_list: Annotated[Optional[Path], typer.Option("--list", help="Names of the test pictures, one a line. Default: 68000 to 69999.")] = None,
         form: Forms = Form.tar, per_shard: PerShard = 1000, jobs: Jobs = 1) -> None:
    """Prepare FFHQ: OUT/train, OUT/test, their file lists and a manifest.

    The same call again does what is missing. far reproduce --preset paper --faces OUT trains on it.
    """
    with one_line_errors():
        faces = numbered(members(source))
        full = {PurePosixPath(name).name: name for name in faces}
        test = {full[name] for name in listed(test_list, full)} if test_list else {full[name] for name in full if int(name[:5]) >= FIRST_TEST}
        names = {"train": [name for name in by_hash(faces) if name not in test], "test": by_hash(test)}
        parts = {part: [(name, faces[name]) for name in chosen] for part, chosen in names.items()}
        build(out, parts, partial(picture, size=size), {"script": "ffhq", "source": source.name, "size": size}, form, per_shard, jobs)


if __name__ == "__main__":
    typer.run(main)
