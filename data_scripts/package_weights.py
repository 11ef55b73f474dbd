"""Put a trained model into the package: float16 weights, config.json, and a model card whose numbers come from the run's own files.

    python data_scripts/package_weights.py runs/tiny-photos/hr-s0 -o far_nb/weights/scenes --data "8,207 photographs of …"

`FAR.from_pretrained()` loads what lies in far_nb/weights/scenes. check.json records what the packaged weights make of one sample
photograph, so that a test can tell whether they still do.
"""
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common import one_line_errors
from PIL import Image, ImageOps

from far_nb.core import FarError, atomic_path, read_json, rng, write_json
from far_nb.data import sample_scenes, test_set
from far_nb.evaluation import composite_uint8, psnr
from far_nb.experiments import get_experiment, get_preset, resolve, stands_on
from far_nb.far import FAR
from far_nb.inpaint import get_method, inpaint
from far_nb.masks import brush_mask
from far_nb.tables import table

LIMIT = 14_000_000                               # bytes of weights in the package
METRICS = ("PSNR", "SSIM", "LPIPS (lite0)", "FID (lite0)")
CHECK = {"source": "sample-scenes", "size": 256, "picture": 0}


def measured(runs: Path, preset: str, seed: int) -> pd.DataFrame:
    "Measured cells of Table 5 in the standard protocol: mean and 95 % interval over the test pictures."
    frame = table(5, runs, preset, [seed])
    return frame[(frame["protocol"] == "standard") & frame["measured"].notna() & frame["metric"].isin(METRICS)]


def card_table(frame: pd.DataFrame) -> str:
    "The cells as Markdown."
    text = lambda line: f"{line['measured']:.3f}" + ("" if pd.isna(line["ci_low"]) else f" [{line['ci_low']:.3f}, {line['ci_high']:.3f}]")
    lines = [f"| test pictures: method | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for row, cells in frame.groupby("row", sort=False):
        values = {line["metric"]: text(line) for _, line in cells.iterrows()}
        lines.append(f"| {row} | {' | '.join(values.get(metric, '–') for metric in METRICS)} |")
    return "\n".join(lines)


def standing(frame: pd.DataFrame) -> str:
    "In words, set by set: which methods' intervals lie apart from FAR's, and on which side."
    lines = []
    for (pictures, metric), cells in frame[frame["ci_low"].notna()].groupby([frame["row"].str.partition(": ")[0], "metric"], sort=False):
        cells = cells.set_index(cells["row"].str.partition(": ")[2])
        far, found = cells.loc["FAR"], {"better than": [], "worse than": [], "not to be told from": []}
        for name, other in cells.drop("FAR").iterrows():
            apart = other["ci_low"] > far["ci_high"] or other["ci_high"] < far["ci_low"]
            above = (far["measured"] > other["measured"]) == (metric in ("PSNR", "SSIM"))
            found["not to be told from" if not apart else "better than" if above else "worse than"].append(name)
        lines.append(f"- {pictures}, {metric}: " + "; ".join(f"{verdict} {', '.join(names)}" for verdict, names in found.items() if names) + ".")
    return "\n".join(lines)


def history(run: Path, preset: str, experiment: str) -> list[dict[str, Any]]:
    "What was trained for this model, in order: name, train.json and options.json of every run below it and of itself."
    scale, seed = get_preset(preset), run.name.rpartition("-s")[2]
    below = [entry for name in stands_on(scale, get_experiment(experiment)) for entry in history(run.with_name(f"{name}-s{seed}"), preset, name)]
    return [*below, {"name": experiment, "about": get_experiment(experiment).about, "train": read_json(run / "train.json"), "options": read_json(run / "options.json")}]


def trained_line(entry: dict[str, Any]) -> str:
    train, options = entry["train"], entry["options"]
    size = f"{options['sizes'][0]} to {min(options['sizes'])} px" if "sizes" in options else f"{options['image_size']} px"
    return (f"| {entry['name']} | {entry['about']} | {size} | {train['steps']:,} × {train['config']['batch_size']} | "
            f"{train['seconds'] / 60:.0f} min | {(train['provenance'].get('git_commit') or 'unknown')[:10]} |")


def recorded(far: FAR) -> dict[str, Any]:
    "What the packaged weights make of one sample photograph with a fixed hole."
    picture = test_set(CHECK["source"], CHECK["size"], CHECK["picture"] + 1)
    images, masks = (picture[key][-1:] for key in ("images", "masks"))
    filled = composite_uint8(images, masks, get_method(far)(images, masks))[0].movedim(0, -1).numpy()
    true = (images[0] * 255).round().byte().movedim(0, -1).numpy()
    return CHECK | {"name": picture["names"][-1], "hash": picture["hash"], "psnr": round(float(psnr(filled, true, "standard")), 4)}


def picture(folder: Path) -> Image.Image:
    "Held-out sample photographs with brush strokes, and filled by the packaged weights through `inpaint`."
    photographs = sample_scenes("test")
    chosen = [ImageOps.fit(photographs[index], (300, 300)) for index in (1, 2, 4)]
    holes = [brush_mask(photograph.size[::-1], rng(7, index), (0.03, 0.06)) for index, photograph in enumerate(chosen)]
    filled = inpaint(chosen, holes, folder)
    masked = [Image.fromarray(np.where(hole[..., None], np.uint8(190), np.asarray(photograph))) for photograph, hole in zip(chosen, holes)]
    sheet = Image.new("RGB", (312 * len(chosen) - 12, 612), "white")
    for row, pictures in enumerate((masked, filled)):
        for column, each in enumerate(pictures): sheet.paste(each, (312 * column, 312 * row))
    return sheet


CARD = """# far_nb {name}: a small FAR for scenes

The model that `FAR.from_pretrained()` loads: a masked autoencoder (MAE), the prior pyramid and the restoration network (ACR) of
*Learning Prior Feature and Attention Enhanced Image Inpainting* (ECCV 2022), {parameters:,} numbers in float16, {megabytes:.1f} MB.

![Held-out sample photographs with holes, and below what this model makes of them](sample.jpg)

It is a demonstration of the method at a small scale, trained by the preset `{preset}` of `far reproduce`; it is not the authors' model
and far from its quality.

## Training

Data: {data}. Object masks: {masks}. Seed {seed}, on {device}.

| run | what | size | steps × batch | time | commit |
|---|---|---|---|---|---|
{trained}

The MAE sees {mae_size}×{mae_size} pixels in {grid}×{grid} patches, whatever the size of the picture.

## Measured

{images} held-out pictures of the same kind with fixed masks (brush, objects and both, 5 to 70 % of the area), never trained on; mean
and 95 % bootstrap interval; protocol `standard`; (lite0) are surrogates on EfficientNet-Lite0 features, which compare with each other
only. 'scenes' are {size} px, 'HR scenes' {hr_size} px; this model is the row 'HR scenes: FAR'.

{measured}

FAR by these intervals alone (*not to be told from*: they overlap; the notes of Table 5 in `figures/{preset}` compare picture by picture, which decides more):

{standing}

## Limits

- Trained on pictures of at most {hr_size} px: large holes in large pictures come out soft; `inpaint` fills those from a reduced view.
- Trained on places (61 % roads, then rooms, houses and landscapes): it knows little of people, text or animals.
- The masks were brush strokes and silhouettes of 10 to 50 % of the area; much larger holes are beyond it.
- Fixed seed, one run: no spread over trainings was measured.

License of the weights: Apache 2.0, like the code. The photographs it was trained on are from public research sets and are not part of it.
"""


def main(run: Annotated[Path, typer.Argument(help="Folder of a finished FAR run, such as runs/tiny-photos/hr-s0.")],
         out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, such as far_nb/weights/scenes.")],
         data: Annotated[str, typer.Option(help="What the model was trained on, in words, for the card.")],
         masks: Annotated[str, typer.Option(help="What the training's object masks were, in words.")] = "the preset's",
         device: Annotated[str, typer.Option(help="What it was trained on, in words.")] = "a CPU") -> None:
    """Write float16 weights, config, model card and a recorded result of a run into a folder of the package."""
    with one_line_errors():
        options, preset = read_json(run / "options.json"), run.parent.name
        scale, seed = get_preset(preset), options["seed"]
        far = FAR.from_pretrained(run / "model")
        far.save_pretrained(out, half=True)
        size = (out / "model.safetensors").stat().st_size
        if size > LIMIT: raise FarError(f"{out}/model.safetensors has {size / 1e6:.1f} MB, {LIMIT / 1e6:.0f} MB fit the package: choose narrower networks")
        packaged, runs = FAR.from_pretrained(out), history(run, preset, resolve(scale, options["experiment"]))
        found = measured(run.parent.parent, preset, seed)
        write_json(out / "check.json", recorded(packaged))
        text = CARD.format(name=out.name, parameters=sum(tensor.numel() for tensor in far.state_dict().values()), megabytes=size / 1e6, preset=preset, data=data,
                           masks=masks, seed=seed, device=device, trained="\n".join(map(trained_line, runs)), mae_size=scale.mae.image_size, grid=scale.mae.grid,
                           images=scale.test_images, size=scale.image_size, hr_size=scale.hr_size, measured=card_table(found), standing=standing(found))
        with atomic_path(out / "sample.jpg") as temporary: picture(out).save(temporary, "JPEG", quality=85)
        with atomic_path(out / "README.md") as temporary: temporary.write_text(text, encoding="utf-8")
        typer.echo(f"{out}: {size / 1e6:.1f} MB; PSNR {read_json(out / 'check.json')['psnr']:.2f} dB on {CHECK['source']}")


if __name__ == "__main__":
    typer.run(main)
