"""Figures: drawn from the runs' files, the same pictures and holes for every method, and what is missing is said."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from far_nb import figures
from far_nb.core import FarError, rng
from far_nb.figures import figure_provenance, save_figure


@pytest.fixture
def logs(tmp_path):
    steps = np.arange(2, 11, 2)
    for k, experiment in enumerate(("lama", "far-noalpha", "far-alpha0", "far-alpha1")):
        (tmp_path / "smoke" / f"{experiment}-s0").mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"step": steps, "psnr": 15.0 + k + steps, "ssim": 0.5, "lpips_lite0": 0.5 / steps, "fid_lite0": 90.0 / steps}).to_csv(
            tmp_path / "smoke" / f"{experiment}-s0" / "eval.csv", index=False)
    pd.DataFrame({"step": steps, **{f"alpha{j}": (-1) ** j * 0.01 * j * steps for j in range(1, 5)}}).to_csv(tmp_path / "smoke" / "far-alpha0-s0" / "log.csv", index=False)
    return tmp_path


def test_figure_5_draws_the_runs_curves(logs):
    figure = figures.figure5(logs, "smoke")
    curves, learned = figure.subfigs
    assert [axis.get_title() for axis in curves.axes] == ["PSNR ↑", "FID (lite0) ↓", "LPIPS (lite0) ↓"]
    assert [line.get_label() for line in curves.axes[0].lines] == ["LaMa", "LaMa+MAE", "+0", "+1"]
    for k, line in enumerate(curves.axes[0].lines): np.testing.assert_allclose(line.get_xydata(), [[s, 15 + k + s] for s in range(2, 11, 2)])
    for j, line in enumerate(learned.axes[0].lines, 1): np.testing.assert_allclose(line.get_ydata(), [0.01 * j * s for s in range(2, 11, 2)])   # |alpha|


@pytest.mark.parametrize("name, content, message", [("eval.csv", None, "far-alpha0-s0"), ("log.csv", None, "far-alpha0-s0"),
                                                    ("log.csv", "step,alpha1\n1,0\n", "alpha2"), ("eval.csv", "step,psnr,fid_lite0,lpips_lite0\n", "no lines")])
def test_figure_5_names_the_run_that_is_missing(logs, name, content, message):
    path = logs / "smoke" / "far-alpha0-s0" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(FarError, match=message): figures.figure5(logs, "smoke")


def test_figure_3_has_the_papers_panels():
    figure = figures.figure3("smoke")
    titles = [axis.get_title() for axis in figure.axes]
    assert [title[:3] for title in titles] == ["(a)", "(b)", "(c)", "(d)"] and titles[1].endswith("75%") and titles[3].endswith("75%")
    photograph, random, continuous, mixed = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    assert np.isclose((random != photograph).any(-1).mean(), 0.75, atol=0.01)
    hidden = (continuous != photograph).any(-1)
    assert 0.1 <= hidden.mean() <= 0.4                                  # a brush and an object of 10-20 % each
    assert (mixed[hidden] == continuous[hidden]).all()                  # all of (c) is in (d), in the same grey
    again = figures.figure3("smoke")
    assert all((np.asarray(a.images[0].get_array()) == np.asarray(b.images[0].get_array())).all() for a, b in zip(figure.axes, again.axes))


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    "Figure 6 with pictures and methods that are cheap and known: each method paints the hole in its own grey."
    images, masks = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, 16, 16)
    masks[..., 4:12, 4:12] = 1
    greys = {"mae": 0.1, "lama": 0.2, "far": 0.3}
    monkeypatch.setattr(figures, "test_set", lambda *_, **__: {"images": images, "masks": masks})
    monkeypatch.setattr(figures, "get_method", lambda spec: lambda i, m: torch.full_like(i, greys[spec.split(":")[0]]))
    for experiment in ("mae-mixed", "lama", "far"): (tmp_path / "smoke" / f"{experiment}-s0" / "model").mkdir(parents=True)
    return tmp_path, images, masks, greys


def test_figure_6_pastes_each_prediction_into_the_same_holes(sheet):
    runs, images, masks, greys = sheet
    figure = figures.figure6(runs, "smoke", count=3)
    axes = np.array(figure.axes).reshape(3, 5)
    assert [axis.get_title() for axis in axes[0]] == ["masked", "MAE", "LaMa", "FAR", "original"]
    for row in range(3):
        for axis, value in zip(axes[row, 1:4], greys.values()):
            expected = (images * (1 - masks) + value * masks)[row].permute(1, 2, 0)
            np.testing.assert_allclose(np.asarray(axis.images[0].get_array()), expected, atol=1e-6)    # float32
        np.testing.assert_allclose(np.asarray(axes[row, 4].images[0].get_array()), images[row].permute(1, 2, 0))


def test_figure_6_names_the_model_that_is_missing(sheet):
    (sheet[0] / "smoke" / "lama-s0" / "model").rmdir()
    with pytest.raises(FarError, match="lama-s0"): figures.figure6(sheet[0], "smoke")


def test_a_saved_figure_is_a_png_and_a_pdf_that_say_where_they_come_from(sheet, tmp_path):
    figure = figures.figure6(sheet[0], "smoke", count=3)
    provenance = {**figure_provenance(6, "smoke"), "git_commit": "0123456789abcdef", "git_dirty": True}
    assert {"mae-mixed-s0", "lama-s0", "far-s0"} == set(provenance["runs"])
    png, pdf = save_figure(figure, tmp_path / "figures" / "figure6", provenance)
    assert (png.name, pdf.name) == ("figure6.png", "figure6.pdf") and pdf.read_bytes().startswith(b"%PDF")
    with Image.open(png) as picture:
        about = picture.text
        assert picture.width == pytest.approx(6.9 * 200, abs=1)
    assert about["Title"] == "Figure 6: Qualitative results"
    for part in ("smoke", "lama-s0", "0123456789", "uncommitted"): assert part in about["Description"] and part.encode() in pdf.read_bytes()
    before = png.read_bytes(), pdf.read_bytes()
    assert tuple(path.read_bytes() for path in save_figure(figure, tmp_path / "figures" / "figure6", provenance)) == before
    assert sorted(path.name for path in png.parent.iterdir()) == ["figure6.pdf", "figure6.png"]


def test_labels_move_apart_and_keep_their_order():
    for heights in ([0.0, 0.0, 0.0, 0.0], [0.5, 0.1, 0.12, 0.9], [1.0, 0.0]):
        moved = figures._apart(heights, 0.2)
        assert all(abs(a - b) > 0.199 for a, b in combinations(moved, 2))
        assert all((moved[i] <= moved[j]) for i, j in combinations(range(len(heights)), 2) if heights[i] <= heights[j])


def test_an_unknown_figure_is_refused():
    with pytest.raises(FarError, match="unknown figure '12'"): figure_provenance(12, "smoke")
