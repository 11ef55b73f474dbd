"""Object masks from the segmentations of COCO 2017, as 1-bit PNG of the pictures' sizes (white: the object).

ANNOTATIONS are instances_train2017.json and instances_val2017.json from https://cocodataset.org (annotations_trainval2017.zip); the
pictures are not needed. Masks of 10-50 % of the area are kept (paper, section 4): every instance for itself, the union of all
instances of a picture, or both. Crowds, whose outlines are rough, are left out.

A mask is named after its annotation (instance-000000001234.png) or picture (union-000000005678.png) and depends on nothing else.
OUT/train and OUT/val take them in the order of the hash of their names: --count N is a random sample, and a larger N contains it.
far_nb takes them as silhouettes: `far reproduce --masks OUT/train`, `test_masks.py --masks OUT/val`.

Needs pycocotools: pip install 'far_nb[data]'. The 450 MB of the training annotations need about 4 GB of memory while they are read.
"""
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Iterator, Optional

import typer
from common import Area, Form, Forms, Jobs, Out, PerShard, build, by_hash, mask_png, one_line_errors
from tqdm import tqdm

from far_nb.core import FarError, read_json

try: from pycocotools import mask as coco
except ImportError: coco = None

RLE = dict[str, Any]      # {"size": [height, width], "counts": run lengths}


class Kind(str, Enum):
    instance = "instance"
    union = "union"
    both = "both"


def run_lengths(segmentation: list | RLE, height: int, width: int) -> RLE | None:
    "Run lengths of an annotation, which holds polygons, run lengths, or compressed run lengths; None where it marks nothing."
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]: raise ValueError("its size is not its picture's")
        return coco.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]      # four numbers would be taken for a box
    return coco.merge(coco.frPyObjects(polygons, height, width)) if polygons else None


def instances(path: Path) -> Iterator[tuple[int, int, RLE]]:
    "(annotation, picture, run lengths) of every object of a file of annotations."
    content = read_json(path)
    try:
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        annotations = sorted(content["annotations"], key=lambda annotation: annotation["id"])
    except (KeyError, TypeError):
        raise FarError(f"{path} is no file of COCO instances: give instances_train2017.json or instances_val2017.json") from None
    for annotation in tqdm(annotations, desc=path.stem, unit=" objects", smoothing=0.05):
        if annotation.get("iscrowd"): continue
        try: found = run_lengths(annotation["segmentation"], *sizes[annotation["image_id"]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FarError(f"{path}: annotation {annotation.get('id')} is not COCO's ({type(error).__name__}: {error})") from None
        if found is not None: yield annotation["id"], annotation["image_id"], found


def masks(path: Path, kind: Kind, area: tuple[float, float]) -> dict[str, RLE]:
    "Name -> run lengths of the masks of a file whose exact share of the pixels is in `area`."
    fits = lambda found: area[0] <= int(coco.area(found)) / (found["size"][0] * found["size"][1]) <= area[1]
    chosen, pictures = {}, defaultdict(list)
    for annotation, image, found in instances(path):
        if kind is not Kind.union and fits(found): chosen[f"instance-{annotation:012d}.png"] = found
        if kind is not Kind.instance: pictures[image].append(found)
    for image, parts in pictures.items():
        if kind is Kind.both and len(parts) == 1: continue                     # the instance again
        if fits(whole := coco.merge(parts)): chosen[f"union-{image:012d}.png"] = whole
    return chosen


def draw(found: RLE) -> bytes:
    "PNG of run lengths."
    return mask_png(coco.decode(found).astype(bool))


def main(annotations: Annotated[list[Path], typer.Argument(help="instances_train2017.json, instances_val2017.json, or both.", show_default=False)],
         out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to go on with.", show_default=False)],
         kind: Annotated[Kind, typer.Option(help="Single objects, all of a picture, or both.")] = Kind.instance,
         count: Annotated[Optional[int], typer.Option("--count", "-n", min=1, help="At most so many per file. Default: all.")] = None,
         area: Area = (0.1, 0.5),
         form: Forms = Form.tar, per_shard: PerShard = 1000, jobs: Jobs = 1) -> None:
    """Turn COCO's segmentations into object masks: OUT/train and OUT/val, their lists and a manifest."""
    with one_line_errors():
        if coco is None: raise FarError("COCO's segmentations need pycocotools: pip install 'far_nb[data]'")
        if not 0 <= area[0] < area[1] <= 1: raise FarError(f"--area {area[0]} {area[1]}: give two shares, 0 <= low < high <= 1")
        parts: dict[str, list[tuple[str, RLE]]] = {}
        for path in annotations:
            part = next((name for name in ("train", "val") if name in path.stem), path.stem)
            if part in parts: raise FarError(f"{path} would be OUT/{part} a second time: give one file for each part")
            found = masks(path, kind, area)
            parts[part] = [(name, found[name]) for name in by_hash(found)[:count]]
        build(out, parts, draw, {"script": "coco_masks", "kind": kind.value, "area": list(area)}, form, per_shard, jobs)


if __name__ == "__main__":
    typer.run(main)
