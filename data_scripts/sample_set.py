"""Write the sample set to disk: scenes, faces and object masks that come with Python packages, without a network.

OUT/scenes/{train,val,test}/, OUT/faces/{train,val,test}/ and OUT/masks/{train,val,test}/, as folders of files or as tar shards;
OUT/manifest.json lists every file with its bytes and SHA-256. `far reproduce --data OUT/scenes` reads either form.
"""
import hashlib
import io
import tarfile
from enum import Enum
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import typer
from PIL import Image

from far_nb.core import FarError, atomic_path, provenance, write_json
from far_nb.data import SPLITS, sample_faces, sample_objects, sample_scenes


class Form(str, Enum):
    folder = "folder"
    tar = "tar"


def encoded(image: Image.Image, size: int) -> bytes:
    "The picture with its shorter side reduced to `size` (never enlarged): JPEG, or PNG for a 1-bit mask."
    buffer = io.BytesIO()
    if image.mode == "1":
        image.save(buffer, "PNG")
        return buffer.getvalue()
    factor = min(1.0, size / min(image.size))
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS) if factor < 1 else image
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def pictures(kind: str, split: str, size: int) -> Iterator[tuple[str, bytes]]:
    "Names and contents of one part of the set."
    if kind == "masks":
        for index, shape in enumerate(sample_objects(split, 1000)):
            yield f"object-{index:04d}.png", encoded(Image.fromarray(np.ascontiguousarray(shape)), size)
    else:
        sample = {"scenes": sample_scenes, "faces": sample_faces}[kind](split)
        for index, name in enumerate(sample.names):
            yield f"{name}.jpg", encoded(sample[index], size)


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    folder.mkdir(parents=True)
    for name, content in files: (folder / name).write_bytes(content)      # the manifest, written last, says that all are there


def write_shards(folder: Path, files: list[tuple[str, bytes]], per_shard: int) -> None:
    "Tar files of at most `per_shard` pictures; the same pictures always give the same bytes."
    for number, start in enumerate(range(0, len(files), per_shard)):
        with atomic_path(folder / f"{number:05d}.tar") as temporary, tarfile.open(temporary, "w") as archive:
            for name, content in files[start:start + per_shard]:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def describe(folder: Path, count: int) -> dict:
    "Manifest entry of a written part."
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in sorted(folder.iterdir())}
    return {"pictures": count, "bytes": sum(file["bytes"] for file in files.values()), "files": files}


def main(out: Path = typer.Argument(..., help="Folder to write; it must be new or empty."),
         size: int = typer.Option(256, min=16, help="Shorter side of the pictures in pixels; smaller ones are left as they are."),
         form: Form = typer.Option(Form.folder, help="Files in folders, or tar shards."),
         per_shard: int = typer.Option(1000, min=1, help="Pictures per tar shard.")) -> None:
    """Write the sample set (scenes, faces, object masks; train, val, test) and its manifest."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        typer.echo(f"{out} exists and is not an empty folder: give a new one", err=True)
        raise typer.Exit(2)
    manifest = {"size": size, "form": form.value, "provenance": provenance(), "parts": {}}
    try:
        for kind in ("scenes", "faces", "masks"):
            for split in SPLITS:
                files, folder = list(pictures(kind, split, size)), out / kind / split
                write_folder(folder, files) if form is Form.folder else write_shards(folder, files, per_shard)
                part = manifest["parts"][f"{kind}/{split}"] = describe(folder, len(files))
                typer.echo(f"{kind}/{split}: {len(files)} pictures, {part['bytes'] / 1e6:.1f} MB")
        write_json(out / "manifest.json", manifest)
    except (FarError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
