"""What the scripts of this folder share: pictures out of folders, tar and zip files that nobody has vouched for, and sets written so
that a killed run goes on where it was (`far_nb.shards.write_set`).

At the end a set has OUT/manifest.json, which `far data verify OUT` checks. What it finds changed can be deleted: the same call makes
it again.
"""
import io
import os
import stat
import zipfile
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import typer
from PIL import Image

from far_nb.core import FarError
from far_nb.data import _index, _is_picture, _safe, read_image
from far_nb.shards import Form, by_hash, write_set

_LARGEST = 2 ** 29          # bytes of one picture: a zip member may claim to unpack to more than the memory holds


Out = Annotated[Path, typer.Argument(help="Folder to write, or to go on with.", show_default=False)]
Forms = Annotated[Form, typer.Option(help="Tar shards, or files in folders.")]
PerShard = Annotated[int, typer.Option(min=1, help="Pictures per shard.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes.")]
Area = Annotated[tuple[float, float], typer.Option(help="Least and greatest share of the hole.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    "A user's mistake, a full disk or Ctrl-C is one line on stderr and an exit code."
    try: yield
    except KeyboardInterrupt: message, code = "stopped: the same command goes on where it was", 130
    except BrokenProcessPool: message, code = "a process was killed, for want of memory? the same command with fewer --jobs goes on where it was", 2
    except (FarError, OSError) as error: message, code = " ".join(str(error).split()), 2
    else: return
    typer.echo(message, err=True)
    raise typer.Exit(code) from None


def note(text: str) -> None:
    "What the user should know, beside the results."
    typer.echo(f"note: {text}", err=True)


# ---- pictures out of folders, tar and zip files ------------------------------------------------------------------------------------

class Member(NamedTuple):
    "A picture in a source: `where` is its offset in a tar, its name in a zip, None for a file of its own."
    name: str
    path: str
    where: int | str | None = None
    size: int | None = None


def members(source: Path) -> list[Member]:
    """The pictures of a folder, an uncompressed tar or a zip, by name; nothing is unpacked.

    Absolute names, '..', links that leave the source, devices, encrypted and gigantic members: `FarError`."""
    if source.suffix == ".zip": return _zip_members(source)
    found = sorted(Member(*entry) for entry in _index(source))
    for member in found:
        if member.where is None: _plain(Path(member.path), source)
    return found


def _plain(path: Path, source: Path) -> None:
    "Refuse a file of a folder that is a device, a pipe, or a link to somewhere else (an unpacked archive may have left one)."
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode) and path.resolve().is_relative_to(source.resolve()) and path.is_file(): return
    if not stat.S_ISREG(mode):
        raise FarError(f"{path} is a link out of {source.name} or a special file: only plain files are read; give the folder where the pictures are")


def _zip_members(source: Path) -> list[Member]:
    found = []
    for info in _zip(source).infolist():
        name, kind = _safe(info.filename, str(source)), stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1 or info.file_size > _LARGEST:
            raise FarError(f"{source}: '{info.filename}' is a link, a special file, encrypted or gigantic: only plain pictures are read from a zip")
        if not info.is_dir() and _is_picture(name): found.append(Member(name, str(source), info.filename, info.file_size))
    return sorted(found)


@lru_cache(maxsize=4)
def _zip(path: Path | str) -> zipfile.ZipFile:
    try: return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error: raise FarError(f"{path}: not a whole zip file ({error}): download it again") from None


def read(member: Member) -> bytes:
    "Content of a member; a damaged one is a `FarError`, a source that has gone an `OSError`."
    if isinstance(member.where, str):
        try: return _zip(member.path).read(member.where)
        except (zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError, EOFError) as error:
            raise FarError(f"{member.name}: damaged in {member.path} ({error})") from None
    with open(member.path, "rb") as file:
        if member.where is not None: file.seek(member.where)
        content = file.read() if member.size is None else file.read(member.size)
    if member.size is not None and len(content) < member.size: raise FarError(f"{member.name}: cut off in {member.path}")
    return content


def shorter_side(content: bytes) -> int:
    "Pixels, from the header alone; 0 where there is no picture."
    try: return min(Image.open(io.BytesIO(content)).size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError): return 0


def picture(member: Member, size: int | None = None) -> bytes:
    "Content of a member as it is, or with its shorter side reduced to `size` (never enlarged) in the format that its name says."
    content = read(member)
    if size is None: return content
    image = read_image(content, member.name, at_least=2 * size)
    return content if shorter_side(content) <= size else reduced(image, size, member.name)


def reduced(image: Image.Image, size: int, name: str) -> bytes:
    "`image` encoded in the format of `name`'s suffix, its shorter side at most `size`: LANCZOS; JPEG at 95 without chroma subsampling."
    factor, buffer = min(1.0, size / min(image.size)), io.BytesIO()
    if factor < 1: image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    kind = Image.registered_extensions()[Path(name).suffix.lower()]
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def mask_png(hole: np.ndarray) -> bytes:
    "1-bit PNG of a bool array, white = hole."
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(hole)).save(buffer, "PNG")
    return buffer.getvalue()


# ---- choosing ----------------------------------------------------------------------------------------------------------------------

def lines_of(path: Path) -> list[str]:
    "Lines of a text file without empty ones."
    try: return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error: raise FarError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError: raise FarError(f"{path}: a list must be UTF-8 text, one name a line") from None


def listed(path: Path, names: Iterable[str]) -> list[str]:
    "Those of `names` that a list names, one a line, with any folders in front (`/data/val_large/a.jpg` means `a.jpg`)."
    names, found, absent = set(names), {}, []
    for line in lines_of(path):
        parts = line.replace("\\", "/").split("/")
        match = next((tail for tail in ("/".join(parts[start:]) for start in range(len(parts))) if tail in names), None)
        if match: found[match] = None
        else: absent.append(line)
    if absent: raise FarError(f"{path}: {len(absent)} of its names are not among the pictures, such as '{absent[0]}'")
    return list(found)


# ---- writing a set -----------------------------------------------------------------------------------------------------------------

def build(out: Path, parts: dict[str, Sequence[tuple[str, Any]]], make: Callable[[Any], bytes], settings: dict[str, Any],
          form: Form = Form.tar, per_shard: int = 1000, jobs: int = 1, makers: dict[str, Callable[[Any], bytes]] | None = None) -> dict[str, Any]:
    "`write_set`, and say what there is; the manifest."
    manifest = write_set(out, parts, make, settings, form, per_shard, jobs, makers)
    kind = "shards" if form is Form.tar else "files"
    for part in (part for part, items in parts.items() if items):
        entry = manifest["parts"][part]
        typer.echo(f"{part}: {entry['pictures']:,} pictures in {len(entry['files']):,} {kind}, {entry['bytes'] / 1e6:,.1f} MB")
        if skipped := entry.get("skipped"): note(f"{part}: {len(skipped):,} broken pictures left out; the first: {next(iter(skipped.values()))}")
    typer.echo(f"{manifest['pictures']:,} pictures, {manifest['bytes'] / 1e6:,.1f} MB, hash {manifest['hash'][:16]}; to check: far data verify {out}")
    return manifest
