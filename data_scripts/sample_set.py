"""Write the sample set to disk: scenes, faces and object masks that come with Python packages, without a network.

OUT/scenes/{train,val,test}/, OUT/faces/{train,val,test}/ and OUT/masks/{train,val,test}/, as folders of files or as tar shards;
OUT/manifest.json lists every file with its bytes and SHA-256. `far reproduce --data OUT/scenes` reads either form.
"""
from functools import partial
from typing import Annotated

import typer
from common import Form, Forms, Jobs, Out, PerShard, build, mask_png, one_line_errors, reduced

from far_nb.data import SPLITS, sample_faces, sample_objects, sample_scenes

SAMPLES = {"scenes": sample_scenes, "faces": sample_faces}


def draw(address: tuple[str, str, int], size: int) -> bytes:
    "Content of picture `address` = (kind, split, index): JPEG, its shorter side reduced to `size`, or PNG for a mask."
    kind, split, index = address
    if kind == "masks": return mask_png(sample_objects(split, 1000)[index])
    return reduced(SAMPLES[kind](split)[index], size, "picture.jpg")


def main(out: Out,
         size: Annotated[int, typer.Option(min=16, help="Shorter side of the pictures in pixels; smaller ones are left as they are.")] = 256,
         form: Forms = Form.folder, per_shard: PerShard = 1000, jobs: Jobs = 1) -> None:
    """Write the sample set (scenes, faces, object masks; train, val, test) and its manifest."""
    with one_line_errors():
        parts = {}
        for split in SPLITS:
            names = {kind: [f"{name}.jpg" for name in sample(split).names] for kind, sample in SAMPLES.items()}
            names["masks"] = [f"object-{index:04d}.png" for index in range(len(sample_objects(split, 1000)))]
            parts |= {f"{kind}/{split}": [(name, (kind, split, index)) for index, name in enumerate(found)] for kind, found in names.items()}
        build(out, dict(sorted(parts.items())), partial(draw, size=size), {"script": "sample_set", "size": size}, form, per_shard, jobs)


if __name__ == "__main__":
    typer.run(main)
