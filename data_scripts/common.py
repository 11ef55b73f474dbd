"""What the scripts of this folder share: pictures out of folders, tar and zip files that nobody has vouched for, and sets written so
that a killed run goes on where it was.

A set is built in units (a shard, or as many pictures in a folder). A unit is written under a temporary name and renamed, then noted in
OUT/.journal with its bytes and SHA-256; a second call does the units that are not noted, or whose files are gone or of another length.
At the end the notes become OUT/manifest.json, which `far data verify OUT` checks. What it finds changed can be deleted: the same call
makes it again.
"""
import fcntl
import hashlib
import io
import json
import os
import signal
import stat
import tarfile
import threading
import zipfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from far_nb.core import FarError, atomic_path, read_json, write_json
from far_nb.data import _index, _is_picture, _safe, checksum, manifest_of, read_image

_LARGEST = 2 ** 29          # bytes of one picture: a zip member may claim to unpack to more than the memory holds


class Form(str, Enum):
    tar = "tar"
    folder = "folder"


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

def by_hash(names: Iterable[str]) -> list[str]:
    "The names in the order of their SHA-256: shuffled, but the same everywhere and for ever; a prefix is a random sample."
    return sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())


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

class Unit(NamedTuple):
    "What is written at a time, and noted when it is done."
    part: str
    number: int
    items: Sequence[tuple[str, Any]]


def write_unit(out: Path, form: Form, makers: dict[str, Callable[[Any], bytes]], unit: Unit) -> tuple[Unit, dict, dict]:
    "Make and write the pictures of a unit; (unit, files: path -> bytes and SHA-256, skipped: name -> reason)."
    skipped, files = {}, {}

    def contents() -> Iterator[tuple[str, bytes]]:
        for name, payload in unit.items:
            try: content = makers[unit.part](payload)
            except FarError as error: skipped[name] = str(error)
            else: yield name, content

    folder = out / unit.part
    if form is Form.tar:
        shard = folder / f"{unit.number:05d}.tar"
        with atomic_path(shard) as temporary, tarfile.open(temporary, "w") as archive:
            for name, content in contents(): _add(archive, name, content)
        files[f"{unit.part}/{shard.name}"] = checksum(shard)
    else:
        for name, content in contents():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}")      # no fsync: it would take longer than the pictures, and lengths are compared on resuming
            temporary.write_bytes(content)
            os.replace(temporary, path)
            files[f"{unit.part}/{name}"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return unit, files, skipped


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    "A member without time or owner: the same pictures give the same bytes."
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


class Journal:
    "What earlier calls have finished: `files` path -> bytes and SHA-256, `skipped` part -> name -> reason; and what this one adds."

    def __init__(self, out: Path, settings: dict[str, Any]):
        if out.exists() and not out.is_dir(): raise FarError(f"{out} is a file: give a folder")
        self.out, self.path, self.files, self.skipped = out, out / ".journal", {}, {}
        if (out / "manifest.json").exists(): self._take_manifest(settings)
        elif not self.path.exists() and out.exists() and any(out.iterdir()):
            raise FarError(f"{out} is not empty and no set that was begun here: give a new folder")
        out.mkdir(parents=True, exist_ok=True)
        self._handle = open(self.path, "a+b")
        try: fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: raise FarError(f"{out} is being written by another run: wait for it or stop it") from None
        self._take_notes(settings)
        for path in out.rglob(".*"):                        # temporary files of a killed run
            if path != self.path and path.is_file(): path.unlink()

    def _take_manifest(self, settings: dict[str, Any]) -> None:
        manifest = read_json(self.out / "manifest.json")
        self._same(manifest.get("settings"), settings)
        for part, entry in manifest["parts"].items():
            self.files |= {f"{part}/{name}": file for name, file in entry["files"].items()}
            self.skipped.setdefault(part, {}).update(entry.get("skipped", {}))

    def _take_notes(self, settings: dict[str, Any]) -> None:
        self._handle.seek(0)
        lines = self._handle.read().splitlines(keepends=True)
        notes = []
        for line in lines:
            try: notes.append(json.loads(line))
            except ValueError: continue                     # the last line of a killed run: its unit is done again
        if lines and not lines[-1].endswith(b"\n"): self._write(b"\n")
        if not notes: self._note({"settings": settings})
        else: self._same(notes[0].get("settings"), settings)
        for note in notes[1:]:
            self.files |= note["files"]
            self.skipped.setdefault(note["part"], {}).update(note["skipped"])

    def _same(self, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        "An `OUT` of two kinds of pictures would be worthless."
        if before == now: return
        before = before or {}
        differing = [f"{key} {before.get(key)} before, {now.get(key)} now" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        raise FarError(f"{self.out} was begun with other settings or sources ({'; '.join(differing)}): give a new folder, or the settings of before")

    def _write(self, content: bytes) -> None:
        self._handle.write(content); self._handle.flush()

    def _note(self, note: dict[str, Any]) -> None: self._write(json.dumps(note, ensure_ascii=True).encode() + b"\n")

    def add(self, unit: Unit, files: dict, skipped: dict) -> None:
        "Note a unit that has been written."
        self._note({"part": unit.part, "files": files, "skipped": skipped})
        self.files |= files
        names = {name for name, _ in unit.items}            # a picture that was broken at an earlier call may have been repaired
        self.skipped[unit.part] = {name: reason for name, reason in self.skipped.get(unit.part, {}).items() if name not in names} | skipped

    def has(self, unit: Unit, form: Form) -> bool:
        "Whether all files of the unit have been noted and are there with the bytes noted."
        skipped = self.skipped.get(unit.part, {})
        names = [f"{unit.number:05d}.tar"] if form is Form.tar else [name for name, _ in unit.items if name not in skipped]
        return all((file := self.files.get(f"{unit.part}/{name}")) and _length(self.out / unit.part / name) == file["bytes"] for name in names)

    def close(self) -> None: self._handle.close()

    def remove(self) -> None:
        self.path.unlink()
        self.close()


def _length(path: Path) -> int:
    try: return path.stat().st_size
    except OSError: return -1


def _each(work: Callable[[Unit], Any], units: Iterable[Unit], jobs: int) -> Iterator[Any]:
    "Results as they come, from `jobs` processes; no more units are under way than keep them busy."
    if jobs == 1:
        yield from map(work, units)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_leave_with_parent)
    try:
        units, waiting = iter(units), set()
        while waiting := waiting | {pool.submit(work, unit) for unit in islice(units, 2 * jobs - len(waiting))}:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done: yield future.result()
    finally: pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    "In a worker: Ctrl-C is the parent's to answer, and a parent that was killed leaves no worker behind."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _units(parts: dict[str, Sequence[tuple[str, Any]]], per_shard: int) -> list[Unit]:
    return [Unit(part, number, items[start:start + per_shard]) for part, items in parts.items()
            for number, start in enumerate(range(0, len(items), per_shard))]


def _digest(parts: dict[str, Sequence[tuple[str, Any]]]) -> str:
    "What tells one plan from another: the parts and their names in order."
    digest = hashlib.sha256()
    for part, items in parts.items():
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            raise FarError(f"{part}: two pictures have one name, such as '{next(name for name in names if names.count(name) > 1)}'")
        for name in names: digest.update(f"{part}\t{name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def build(out: Path, parts: dict[str, Sequence[tuple[str, Any]]], make: Callable[[Any], bytes], settings: dict[str, Any],
          form: Form = Form.tar, per_shard: int = 1000, jobs: int = 1, makers: dict[str, Callable[[Any], bytes]] | None = None) -> dict[str, Any]:
    """Write OUT/PART (shards of `per_shard` pictures, or files), OUT/PART.txt (one path a line) and OUT/manifest.json; the manifest.

    `parts`: name -> (file name, what `make` turns into its bytes), in order; `makers`: for a part that is made otherwise. A picture of
    which `make` says `FarError` is left out and told. `settings` must be those of the call that began OUT, else `FarError`."""
    if not any(parts.values()): raise FarError("there is no picture to write")
    parts = {part: items for part, items in parts.items() if items}
    settings = {**settings, "form": form.value, "per_shard": per_shard, "names": _digest(parts)}
    journal, units = Journal(out, settings), _units(parts, per_shard)
    try:
        missing = [unit for unit in units if not journal.has(unit, form)]
        total, left = (sum(len(unit.items) for unit in some) for some in (units, missing))
        with tqdm(total=total, initial=total - left, unit=" pictures", desc=out.name, smoothing=0.05) as bar:
            work = partial(write_unit, out, form, {part: make for part in parts} | (makers or {}))
            for unit, files, skipped in _each(work, missing, jobs):
                journal.add(unit, files, skipped)
                bar.update(len(unit.items))
        manifest = _conclude(out, parts, journal, settings, form)
        journal.remove()
    finally: journal.close()
    return manifest


def _entry(pictures: int, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"pictures": pictures, "bytes": sum(file["bytes"] for file in files.values()), "files": files}


def _conclude(out: Path, parts: dict[str, Sequence[tuple[str, Any]]], journal: Journal, settings: dict[str, Any], form: Form) -> dict[str, Any]:
    "Write lists and manifest, and say what there is."
    entries, lists = {}, {}
    for part, items in parts.items():
        skipped = journal.skipped.get(part, {})
        names = [name for name, _ in items if name not in skipped]
        if not names: raise FarError(f"{part}: none of its {len(items)} pictures is sound; the first: {next(iter(skipped.values()))}")
        prefix = f"{part}/"
        files = {path.removeprefix(prefix): file for path, file in sorted(journal.files.items()) if path.startswith(prefix)}
        entries[part] = _entry(len(names), files) | ({"skipped": skipped} if skipped else {})
        with atomic_path(out / f"{part}.txt") as temporary:
            temporary.write_text("".join(f"{Path(part).name}/{name}\n" for name in names), encoding="utf-8")
        lists[f"{part}.txt"] = checksum(out / f"{part}.txt")
        kind, size = "shards" if form is Form.tar else "files", entries[part]["bytes"] / 1e6
        typer.echo(f"{part}: {len(names):,} pictures in {len(files):,} {kind}, {size:,.1f} MB")
        if skipped: note(f"{part}: {len(skipped):,} broken pictures left out; the first: {next(iter(skipped.values()))}")
    manifest = manifest_of({**entries, ".": _entry(0, lists)}, settings=settings)
    write_json(out / "manifest.json", manifest)
    typer.echo(f"{manifest['pictures']:,} pictures, {manifest['bytes'] / 1e6:,.1f} MB, hash {manifest['hash'][:16]}; to check: far data verify {out}")
    return manifest
