"""Figures: drawn from the modules and the runs' files, the same pictures and holes for every method, and what is missing is said."""
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from far_nb import figures
from far_nb.acr import ACR
from far_nb.core import FarError
from far_nb.experiments import EXPERIMENTS, PRESETS, Sources, build_far, build_mae, get_experiment, get_preset, resolve, run_folder, run_name
from far_nb.far import FAR
from far_nb.figures import FIGURES, SHEETS, attention_colours, figure_provenance, palette, picture_sheet, save_figure, write_index
from far_nb.mae import MAE
from far_nb.tables import Ordering, Pair

SMOKE = get_preset("smoke")


@pytest.fixture(scope="module")
def networks():
    "Fresh networks of the smallest preset."
    mae = build_mae(SMOKE, get_experiment("mae-mixed"))
    return {name: build_far(SMOKE, get_experiment(name), mae if get_experiment(name).mae else None) for name in ("far", "lama", "far-contextual")}


@pytest.fixture(scope="module")
def trained(networks, tmp_path_factory):
    "A runs folder with a model for every run of a figure: fresh weights in place of trained ones."
    runs = tmp_path_factory.mktemp("runs")
    for experiment in (e for e in EXPERIMENTS.values() if e.figures and e.spec is None):
        model = networks["far"].mae if experiment.kind == "mae" else networks.get(experiment.name, networks["lama" if "lama" in experiment.name else "far"])
        model.save_pretrained(run_folder(runs, "smoke", resolve(SMOKE, experiment.name), 0) / "model")
    return runs


def picture(axis): return np.asarray(axis.images[0].get_array())


def titles(figure): return [axis.get_title() for axis in figure.axes if axis.get_title()]


# Sheets of pictures


@pytest.mark.parametrize("number, expected", [
    (1, ["masked", "MAE", "LaMa", "FAR"]), (4, ["masked", "MAE", "FAR", "MAE, partial\nfine-tuning", "FAR on the\nfine-tuned MAE", "original"]),
    (6, ["masked", "MAE", "LaMa", "FAR", "original"]), (7, 3 * ["masked", "LaMa", "FAR", "original"]), (8, ["masked", "LaMa", "FAR", "MAE", "original"])])
def test_sheets_have_the_papers_columns(trained, number, expected):
    figure = FIGURES[number].draw(trained, "smoke")
    assert titles(figure) == expected
    sizes = {len(picture(axis)) for axis in figure.axes}
    assert sizes == {getattr(SMOKE, sheet.size) for sheet in SHEETS[number]}


def test_figures_of_one_set_and_size_show_the_same_pictures_and_holes(trained):
    first, second = (FIGURES[number].draw(trained, "smoke").axes for number in (4, 6))
    for row in range(3):
        for column in (0, -1):      # masked, original
            np.testing.assert_array_equal(picture(first[6 * row:6 * row + 6][column]), picture(second[5 * row:5 * row + 5][column]))
    large, panel = FIGURES[1].draw(trained, "smoke").axes, FIGURES[7].draw(trained, "smoke").axes[16:]
    for row in range(2): np.testing.assert_array_equal(picture(large[4 * row]), picture(panel[4 * row]))


def test_a_prediction_is_pasted_into_the_hole_of_the_original(trained, monkeypatch):
    greys = {"mae-mixed-s0": 0.1, "lama-s0": 0.2, "far-s0": 0.3}
    monkeypatch.setattr(figures, "get_method", lambda spec: lambda i, m, names: torch.full_like(i, greys[Path(spec.partition(":")[2]).parent.name]))
    rows = np.array(FIGURES[6].draw(trained, "smoke").axes).reshape(3, 5)
    pictures = figures.figure_pictures(SMOKE, "scenes", Sources(), SMOKE.image_size)
    images, masks = (pictures[key].permute(0, 2, 3, 1).numpy() for key in ("images", "masks"))
    for row, image, mask in zip(rows, images, masks):
        for axis, value in zip(row[1:4], greys.values()): np.testing.assert_allclose(picture(axis), image * (1 - mask) + value * mask, atol=1e-6)   # float32
        np.testing.assert_array_equal(picture(row[4]), image)
        assert (picture(row[0])[mask[..., 0] == 1] == np.float32(figures._GREY)).all()


def test_networks_that_a_preset_does_not_train_are_left_out(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", replace(SMOKE, trains=("mae-mixed", "lama", "far-alpha0", "far")))
    assert titles(FIGURES[4].draw(trained, "smoke")) == ["masked", "MAE", "FAR", "original"]
    about = figure_provenance(4, "smoke")
    assert about["runs"] == ["mae-mixed-s0", "far-s0"] and about["others"].endswith("left out, as the preset does not train them: MAE, partial fine-tuning, FAR on the fine-tuned MAE")
    assert titles(FIGURES[9].draw(trained, "smoke")) == 2 * ["masked", "MAE"] and figure_provenance(9, "smoke")["runs"] == ["mae-mixed-s0"]
    for name in ("lama", "far-alpha0"):
        folder = run_folder(tmp_path, "smoke", name, 0)
        folder.mkdir(parents=True)
        (folder / "eval.csv").write_text("step,psnr,fid_lite0,lpips_lite0\n1,10,3,0.5\n2,11,2,0.4\n")
        (folder / "log.csv").write_text("step,alpha1,alpha2,alpha3,alpha4\n1,0,0,0,0\n2,0.1,0.1,0.1,0.1\n")
    assert [line.get_label() for line in FIGURES[5].draw(tmp_path, "smoke").subfigs[0].axes[0].lines] == ["LaMa", "+0"]


@pytest.mark.parametrize("number", [*SHEETS, 9])
def test_a_missing_model_is_named_with_the_command(tmp_path, number):
    with pytest.raises(FarError, match=rf"the run '[a-z-]+-s3' of preset 'smoke'.* run far reproduce --preset smoke --only figure{number} --seeds 3"):
        FIGURES[number].draw(tmp_path, "smoke", 3)


def test_other_programs_pictures_join_where_they_are_given(trained, tmp_path):
    "They belong to the test set behind the tables, so the sheet takes its rows, holes included, from there."
    sources = Sources(outputs=str(tmp_path))
    evaluated = figures.build_test_set(SMOKE, "scenes", sources)
    (tmp_path / "scenes" / "ctsdg").mkdir(parents=True)
    for name in evaluated["names"]: Image.new("RGB", (SMOKE.image_size,) * 2, (255, 0, 0)).save(tmp_path / "scenes" / "ctsdg" / f"{Path(name).stem}.png")
    rows = np.array(FIGURES[6].draw(trained, "smoke", sources=sources).axes).reshape(3, 6)
    assert [axis.get_title() for axis in rows[0]] == ["masked", "CTSDG", "MAE", "LaMa", "FAR", "original"]
    chosen = [np.flatnonzero([np.array_equal(picture(row[-1]), image.permute(1, 2, 0)) for image in evaluated["images"]])[0] for row in rows]
    for row, k in zip(rows, chosen):
        hole = evaluated["masks"][k, 0].numpy() == 1
        assert (picture(row[1])[hole] == [1, 0, 0]).all() and (picture(row[1])[~hole] == picture(row[-1])[~hole]).all()
    about = figure_provenance(6, "smoke", sources=sources)["others"]
    assert "given: CTSDG" in about and "left out" in about and "EdgeConnect, Co-Mod-GAN, ICT" in about
    (tmp_path / "scenes" / "ctsdg" / f"{Path(evaluated['names'][chosen[0]]).stem}.png").unlink()
    with pytest.raises(FarError, match="ctsdg"): FIGURES[6].draw(trained, "smoke", sources=sources)


@pytest.mark.parametrize("across, count, width", [(1, 3, 6.9), (2, 4, 6.9), (2, 3, 3.4)])
def test_pictures_of_a_sheet_are_square_and_do_not_touch(across, count, width):
    figure = picture_sheet(figures.Panel({"one": torch.rand(count, 3, 16, 16), "two\nlines": torch.rand(count, 3, 16, 16)}, "heading", across), width=width)
    size = figure.get_size_inches()
    boxes = [axis.get_position().get_points() * size for axis in figure.axes]
    assert len(boxes) == 2 * count and size[0] == width
    for (x0, y0), (x1, y1) in boxes: assert np.isclose(x1 - x0, y1 - y0) and -1e-6 <= x0 and x1 <= width + 1e-6 and y0 >= -1e-6
    for (a, b), (c, d) in combinations(boxes, 2): assert (a >= d - 1e-6).any() or (c >= b - 1e-6).any()
    inside(figure)


# Figure 2


def inside(figure):
    "No text overlaps another or leaves the figure."
    FigureCanvasAgg(figure).draw()
    texts = [text for axis in figure.axes for text in (*axis.texts, axis.title) if text.get_text()] + figure.texts
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text, box in boxes: assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    for (one, a), (other, b) in combinations(boxes, 2): assert not a.overlaps(b), (one, other)


@pytest.mark.parametrize("name, mae, acr", [
    ("smoke", {}, {}), ("tiny", {}, {}), ("small", {}, {}), ("smoke", {"partial": True}, {"attention": "contextual", "alpha": "none"}), ("small", None, {"prior_width": None}),
    ("tiny", {}, {"attention": "none", "coordinates": False, "masked_position": True, "prior_stride": 16, "blocks": 1})])
def test_figure_2_draws_every_configuration_without_overlaps(name, mae, acr):
    preset = get_preset(name)
    config = replace(preset.acr, **({"attention": "none"} if mae is None else {}) | acr)
    far = FAR(None if mae is None else MAE(replace(preset.mae, **mae)), ACR(config))
    pictures = figures.figure_pictures(preset, "scenes", Sources(figure_data="sample-scenes"), preset.image_size)
    figure = figures.architecture(far, pictures["images"][:1], pictures["masks"][:1])
    inside(figure)
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert f"{config.blocks} ×\nFFC" in words and (f"{config.attention}\nattention" in words) == (config.attention != "none")
    assert ("encoder" in words) == (mae is not None) and (r"\alpha_1" in words) == (mae is not None and config.alpha != "none")
    size, width = preset.image_size, config.width
    for channels, side in ((width, size), (2 * width, size // 2), (8 * width, size // 8), (3, size)): assert f"{channels}\n{side}×{side}" in words
    if mae is not None: assert f"{preset.mae.decoder_width} × {preset.mae.grid} × {preset.mae.grid}" in words


def test_shapes_of_figure_2_come_from_the_forward_pass(networks):
    image, mask = torch.rand(1, 3, 96, 96), torch.zeros(1, 1, 96, 96)
    mask[..., :24, :24] = 1
    shapes = figures.layer_shapes(networks["far"], image, mask)
    grid, config = SMOKE.mae.grid, SMOKE.acr
    assert shapes["attention"] == (grid ** 2, grid ** 2) and shapes["features"] == (SMOKE.mae.decoder_width, grid, grid)
    assert shapes["encoder"] == (grid ** 2 - 4, SMOKE.mae.width)                                   # a quarter of each side: 2 × 2 tokens are hidden
    assert shapes["prior1 input"] == (config.prior_width + 2, 12, 12) and shapes["prior4"] == (config.width, 96, 96) == shapes["stem"]
    assert shapes["stem input"] == (4, 96, 96) and shapes["head"] == (3, 96, 96)
    assert not any(module._forward_hooks for module in networks["far"].modules())


# Figure 9


def test_colours_of_figure_9_agree_with_the_largest_weight():
    draws = np.random.default_rng(0)
    attention, masked = draws.dirichlet(np.ones(48), size=48), draws.random(48) < 0.4
    colours = attention_colours(attention, masked, 6, 8)
    for k in range(48):
        row, column = divmod(k, 8)
        target = divmod(int(attention[k].argmax()), 8)
        np.testing.assert_array_equal(colours[row, column], palette(6, 8)[target] if masked[k] else 0)
    with pytest.raises(FarError, match="do not fit a grid of 6x6"): attention_colours(attention, masked, 6)


@pytest.mark.parametrize("grid", [1, 8, 16, 32])
def test_the_palette_has_a_colour_of_its_own_for_every_position(grid):
    colours = palette(grid)
    assert colours.shape == (grid, grid, 3) and 0 <= colours.min() and colours.max() <= 1
    assert len(np.unique(colours.reshape(-1, 3).round(6), axis=0)) == grid ** 2 and colours.max(-1).min() > 0.4      # none is black


@pytest.mark.parametrize("kind", ["prior", "before", "after"])
def test_an_attention_map_sums_to_1_over_known_patches_and_is_0_on_hidden_ones(networks, kind):
    pictures = figures.figure_pictures(SMOKE, "scenes", Sources(), SMOKE.image_size)
    images, masks = pictures["images"], pictures["masks"]
    if kind == "prior":
        weights, masked = figures.prior_attention(networks["far"].mae, images, masks)
        hidden = torch.nn.functional.avg_pool2d(masks, SMOKE.mae.patch_size).flatten(1) == 1      # a partly known patch can be looked at
    else:
        weights, masked = figures.contextual_attention(networks["far-contextual"], images, masks)[kind]
        hidden = masked
    assert hidden.any() and (masked | ~hidden).all()
    hidden = hidden[:, None].expand_as(weights)
    assert (weights[hidden] == 0).all() and (weights >= 0).all()
    torch.testing.assert_close((weights * ~hidden).sum(-1), torch.ones(weights.shape[:2]), atol=1e-5, rtol=0)     # float32 sums of 64 weights
    assert not any(module._forward_pre_hooks for module in networks["far-contextual"].modules())


def test_contextual_weights_are_those_that_the_module_applies(networks):
    far = networks["far-contextual"]
    pictures = figures.figure_pictures(SMOKE, "scenes", Sources(), SMOKE.image_size)
    entered = []
    hook = far.acr.attention_before.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    weights, masked = figures.contextual_attention(far, pictures["images"], pictures["masks"])["before"]
    hook.remove()
    module = far.acr.attention_before
    with torch.no_grad():
        module.alpha.value.fill_(1.0)
        added = module(entered[0], pictures["masks"]) - entered[0]
        module.alpha.value.fill_(0.0)
    expected = (entered[0].flatten(2) @ weights.transpose(1, 2)) * masked[:, None]
    torch.testing.assert_close(added.flatten(2), expected, atol=1e-4, rtol=1e-4)                     # a difference of float32 features
    with pytest.raises(FarError, match="prior attention"): figures.contextual_attention(networks["far"], pictures["images"], pictures["masks"])


def test_figure_9_colours_the_holes_of_the_pictures_it_shows(trained):
    figure = FIGURES[9].draw(trained, "smoke")
    axes = np.array(figure.axes).reshape(4, 4)
    pictures = figures.figure_pictures(SMOKE, "ablation", Sources(), SMOKE.image_size)
    touched = torch.nn.functional.max_pool2d(pictures["masks"], 8)[:, 0].numpy() == 1
    for row, hole in zip(axes, touched):
        for axis in row[1:]: np.testing.assert_array_equal(picture(axis).any(-1), hole)            # black exactly where known
    assert [len(axis.child_axes) for axis in axes.flat] == [0, 1, 1, 1] + 12 * [0]                  # palettes on the first instance
    np.testing.assert_array_equal(picture(axes[0, 1].child_axes[0]), palette(8))


# Figures 3 and 5


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
    figure = figures.figure3("runs", "smoke")
    titles = [axis.get_title() for axis in figure.axes]
    assert [title[:3] for title in titles] == ["(a)", "(b)", "(c)", "(d)"] and titles[1].endswith("75%") and titles[3].endswith("75%")
    photograph, random, continuous, mixed = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    assert np.isclose((random != photograph).any(-1).mean(), 0.75, atol=0.01)
    hidden = (continuous != photograph).any(-1)
    assert 0.1 <= hidden.mean() <= 0.4                                  # a brush and an object of 10-20 % each
    assert (mixed[hidden] == continuous[hidden]).all()                  # all of (c) is in (d), in the same grey
    again = figures.figure3("runs", "smoke")
    assert all((np.asarray(a.images[0].get_array()) == np.asarray(b.images[0].get_array())).all() for a, b in zip(figure.axes, again.axes))


def test_labels_move_apart_and_keep_their_order():
    for heights in ([0.0, 0.0, 0.0, 0.0], [0.5, 0.1, 0.12, 0.9], [1.0, 0.0]):
        moved = figures._apart(heights, 0.2)
        assert all(abs(a - b) > 0.199 for a, b in combinations(moved, 2))
        assert all((moved[i] <= moved[j]) for i, j in combinations(range(len(heights)), 2) if heights[i] <= heights[j])


def test_without_faces_figure_7_shows_the_rest_and_says_so(trained, monkeypatch):
    faceless = replace(SMOKE, faces=None)
    monkeypatch.setattr(figures, "get_preset", lambda preset: faceless)
    assert titles(FIGURES[7].draw(trained, "smoke")) == ["masked", "LaMa", "FAR", "original"]
    about = figure_provenance(7, "smoke")
    assert "left out, as no faces were given: (A) faces" in about["others"] and not [name for name in about["runs"] if "faces" in name]


# Files and the index


def test_a_saved_figure_is_a_png_and_a_pdf_that_say_where_they_come_from(trained, tmp_path):
    figure = FIGURES[6].draw(trained, "smoke")
    provenance = {**figure_provenance(6, "smoke"), "git_commit": "0123456789abcdef", "git_dirty": True}
    assert {"mae-mixed-s0", "lama-s0", "far-s0"} == set(provenance["runs"])
    png, pdf = save_figure(figure, tmp_path / "figures" / "figure6", provenance)
    assert (png.name, pdf.name) == ("figure6.png", "figure6.pdf") and pdf.read_bytes().startswith(b"%PDF")
    with Image.open(png) as image:
        about = image.text
        assert image.width == pytest.approx(6.9 * 100, abs=1)         # pictures of 64 px need no more; text stays text in the PDF
    assert about["Title"] == "Figure 6: Qualitative results on scenes"
    for part in ("smoke", "lama-s0", "0123456789", "uncommitted", "EdgeConnect"): assert part in about["Description"] and part.encode() in pdf.read_bytes()
    before = png.read_bytes(), pdf.read_bytes()
    assert tuple(path.read_bytes() for path in save_figure(figure, tmp_path / "figures" / "figure6", provenance)) == before
    assert sorted(path.name for path in png.parent.iterdir()) == ["figure6.pdf", "figure6.png"]


def test_the_list_of_figures_is_the_papers():
    assert list(FIGURES) == list(range(1, 10))
    for number, sheets in SHEETS.items():       # what a sheet shows, the pipeline makes
        columns = {run_name(resolve(SMOKE, name), 0) for sheet in sheets for name in sheet.columns.values() if get_experiment(name).spec != "folder"}
        assert columns == set(figure_provenance(number, "smoke")["runs"])
    with pytest.raises(FarError, match="unknown figure '12'"): figure_provenance(12, "smoke")


@pytest.fixture
def tables(monkeypatch):
    "Tables 1 and 4 with verdicts, 5 with an empty row, the others failed."
    frames = {number: pd.DataFrame({"run": runs, "dataset": "sample-scenes"}) for number, runs in ((1, ["far-s0, far-s1"]), (4, ["far-s0", "lama-s0"]), (5, ["hr-s0"]))}
    frames[5].attrs["absent"] = {"scenes: ICT": "no pictures"}
    pair = lambda agrees, decided: Pair("a", "b", agrees, decided)
    orders = {1: {"PSNR": Ordering((pair(True, True),)), "LPIPS": Ordering((pair(True, False),))},
              4: {"PSNR": Ordering((pair(True, True), pair(False, False))), "FID (lite0)": Ordering((pair(False, None),))}, 5: {}}

    def table(number, runs, preset, seeds):
        if number not in frames: raise FarError(f"table {number} needs the run 'hr-s0', and {Path(runs).resolve() / 'smoke' / 'hr-s0'} does not exist")
        return frames[number].assign(number=number)
    monkeypatch.setattr(figures, "table", table)
    monkeypatch.setattr(figures, "verdicts", lambda frame: orders[frame["number"].iloc[0]])


def test_the_index_says_what_reproduced_what_there_is_and_what_is_missing(tables, tmp_path):
    folder, runs = tmp_path / "figures" / "smoke", tmp_path / "runs"
    save_figure(FIGURES[3].draw(runs, "smoke"), folder / "figure3", figure_provenance(3, "smoke"))
    for suffix in ("md", "csv", "tex"): (folder / f"table4.{suffix}").write_text("")
    path = write_index(folder, runs, "smoke", (0, 1))
    text = path.read_text()
    assert path == folder / "README.md" and sorted(each.name for each in folder.iterdir() if each.name.startswith(".")) == []
    assert str(tmp_path) not in text and "Seeds 0, 1." in text and "Data: sample-scenes." in text
    assert "The order of the rows is the paper's for PSNR (1 of 1 pair); it cannot be told from luck for LPIPS (1 of 1 pair)." in text
    assert "is partly the paper's for PSNR (1 of 2 pairs, 1 may be luck); it is not the paper's for FID (lite0) (0 of 1 pair, untested)" in text
    assert "Nothing was measured that the paper orders. Rows without a measurement: scenes: ICT." in text
    assert "[md](table4.md) [csv](table4.csv) [tex](table4.tex) | far-s0, lama-s0 |" in text and "| not written | far-s0, far-s1 |" in text
    assert '<a href="figure3.pdf"><img src="figure3.png" width="300"' in text and text.count("<img") == 1
    assert "- Table 2: table 2 needs the run 'hr-s0', and runs/smoke/hr-s0 does not exist" in text
    assert "- Figure 9: needs mae-mixed-s0 and far-contextual-s0, which did not finish; run far reproduce --preset smoke --only figure9" in text
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("- Figure")] == [f"- Figure {n}" for n in (1, 2, 4, 5, 6, 7, 8, 9)]


def test_every_link_of_the_index_leads_to_a_file(tables, trained, tmp_path):
    for number in (2, 6): save_figure(FIGURES[number].draw(trained, "smoke"), tmp_path / f"figure{number}", figure_provenance(number, "smoke"))
    text = write_index(tmp_path, trained, "smoke").read_text()
    assert "Left out, as no pictures were given: EdgeConnect, Co-Mod-GAN, CTSDG, ICT." in text       # from the picture's own metadata
    links = [part.split('"')[0] for key in ('href="', 'src="') for part in text.split(key)[1:]] + [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((tmp_path / link).exists() for link in links)


def test_the_index_tells_what_failed(tables, tmp_path):
    text = write_index(tmp_path / "figures" / "smoke", tmp_path / "runs", "smoke", failed={"far-s0": "runs/smoke/far-s0/train.ipynb"}).read_text()
    assert "Failed in the last call" in text and "- far-s0: see runs/smoke/far-s0/train.ipynb" in text
