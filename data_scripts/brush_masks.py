"""Brush masks (DeepFill v2's free-form strokes) for programs that read masks from files; far_nb draws its own while it trains.

Mask i comes from the seed and i alone: a larger set begins with the smaller one, and any machine draws the same.
"""
from functools import partial
from typing import Annotated

import typer
from common import Area, Form, Forms, Jobs, Out, PerShard, build, mask_png, one_line_errors

from far_nb.core import rng
from far_nb.masks import brush_mask


def draw(index: int, size: int, area: tuple[float, float], seed: int) -> bytes:
    "PNG of mask `index`."
    return mask_png(brush_mask(size, rng(seed, index), area))


def main(out: Out,
         count: Annotated[int, typer.Option("--count", "-n", min=1, help="Masks to draw.")] = 10_000,
         size: Annotated[int, typer.Option(min=16, help="Side in pixels.")] = 256,
         seed: Annotated[int, typer.Option(min=0, help="Another seed gives other masks.")] = 0,
         area: Area = (0.1, 0.5),
         form: Forms = Form.tar, per_shard: PerShard = 1000, jobs: Jobs = 1) -> None:
    """Write brush masks as 1-bit PNG (white: hole) to OUT/masks, their list and a manifest."""
    with one_line_errors():
        draw(0, size, area, seed)                            # a range that no mask meets is told before anything is written
        settings = {"script": "brush_masks", "size": size, "seed": seed, "area": list(area)}
        build(out, {"masks": [(f"brush-{index:06d}.png", index) for index in range(count)]},
              partial(draw, size=size, area=area, seed=seed), settings, form, per_shard, jobs)


if __name__ == "__main__":
    typer.run(main)
