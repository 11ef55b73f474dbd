"""A fixed set of test masks, so that every method and every run is measured on the same holes.

40 % brush, 40 % object, 20 % the union of both, as in training (paper, section 4), each with 10-50 % of the area. The numbers of each
kind are exact, not drawn; names tell the kind. Mask i of a kind comes from the seed, the kind, i and the silhouettes alone.
Give silhouettes that no training has seen: the default is the test part of the sample set, --masks a folder or tar of your own
(coco_masks.py on instances_val2017.json writes one). `far evaluate --test-masks OUT/masks` and `far reproduce --test-masks` use the set.
"""
import hashlib
from functools import lru_cache, partial
from typing import Annotated

import numpy as np
import typer
from common import Area, Form, Forms, Jobs, Out, PerShard, build, mask_png, one_line_errors

from far_nb.core import rng
from far_nb.data import open_masks
from far_nb.masks import MaskSampler

KINDS, SHARES = ("brush", "object", "union"), (0.4, 0.4, 0.2)


@lru_cache(maxsize=1)
def silhouettes(source: str) -> list[np.ndarray]:
    "Once per process."
    return open_masks(source, "test")


def draw(address: tuple[int, int], source: str, size: int, area: tuple[float, float], seed: int) -> bytes:
    "PNG of mask `address` = (kind, index)."
    kind, index = address
    sampler = MaskSampler(size, silhouettes(source), area, tuple(float(kind == other) for other in range(3)))
    return mask_png(sampler(rng(seed, kind, index)))


def main(out: Out,
         masks: Annotated[str, typer.Option(help="Silhouettes: 'sample', or a folder or .tar of masks.")] = "sample",
         count: Annotated[int, typer.Option("--count", "-n", min=3, help="Masks of all kinds together.")] = 1_000,
         size: Annotated[int, typer.Option(min=16, help="Side in pixels.")] = 256,
         seed: Annotated[int, typer.Option(min=0, help="Another seed gives another set.")] = 0,
         area: Area = (0.1, 0.5),
         form: Forms = Form.folder, per_shard: PerShard = 1000, jobs: Jobs = 1) -> None:
    """Write fixed test masks (brush, object, union; white: hole) to OUT/masks, their list and a manifest."""
    with one_line_errors():
        draw((2, 0), masks, size, area, seed)                # what is wrong with the silhouettes or the range is told before anything is written
        numbers = [round(share * count) for share in SHARES[:2]]
        numbers.append(count - sum(numbers))
        items = [(f"{name}-{index:05d}.png", (kind, index)) for kind, name in enumerate(KINDS) for index in range(numbers[kind])]
        digest = hashlib.sha256(b"".join(repr(shape.shape).encode() + shape.tobytes() for shape in silhouettes(masks))).hexdigest()
        settings = {"script": "test_masks", "silhouettes": digest, "size": size, "seed": seed, "area": list(area)}
        build(out, {"masks": items}, partial(draw, source=masks, size=size, area=area, seed=seed), settings, form, per_shard, jobs)


if __name__ == "__main__":
    typer.run(main)
