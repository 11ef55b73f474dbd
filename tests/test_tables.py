"""Tables: every number comes from the runs' files or from paper_values.csv, and what is missing is said."""
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from far_nb import tables
from far_nb.core import FarError, read_json, rng, write_json
from far_nb.experiments import EXPERIMENTS
from far_nb.tables import COLUMNS, ordering, paper_value, table, table_runs, write_table

IMAGES = 12


def write_run(folder, experiment, offset=0.0, seed=0, **changes):
    "A made-up metrics.json; the pictures share their difficulty, as real runs on one test set do."
    psnr = rng(1).normal(22, 4, IMAGES) + offset
    values = {"PSNR/standard": psnr, "PSNR/paper": psnr + 1, "SSIM/paper": psnr / 40, "LPIPS (lite0)/standard": 1 - psnr / 40}
    lines = [{"metric": key.split("/")[0], "protocol": key.split("/")[1], "value": float(v.mean()), "ci_low": float(v.mean() - 1 / 3),
              "ci_high": float(v.mean() + 1 / 3), "images": IMAGES, "reason": None} for key, v in values.items()]
    lines += [{"metric": "FID", "protocol": protocol, "value": None, "ci_low": None, "ci_high": None, "images": IMAGES,
               "reason": "Inception weights absent: a_b & 5 %"} for protocol in ("standard", "paper")]
    lines += [{"metric": "FID (lite0)", "protocol": "standard", "value": 50.0 - offset, "ci_low": None, "ci_high": None, "images": IMAGES, "reason": None}]
    result = {"run": f"{experiment}-s{seed}", "experiment": experiment, "preset": "smoke", "dataset": "sample-scenes", "data_hash": "abc",
              "images": IMAGES, "steps": 10, "seed": seed, "provenance": {"git_commit": "0123456789abcdef", "git_dirty": False, "device": "cpu"},
              "metrics": lines, "per_image": {key: v.tolist() for key, v in values.items()}, **changes}
    write_json(folder / "smoke" / f"{experiment}-s{seed}" / "metrics.json", result)
    return result


@pytest.fixture
def runs(tmp_path):
    for number in (3, 4):
        for k, experiment in enumerate(table_runs(number).values()): write_run(tmp_path, experiment, offset=0.1 * k)
    return tmp_path


def cell(frame, row, metric, protocol):
    (_, line), = frame[(frame["row"] == row) & (frame["metric"] == metric) & (frame["protocol"] == protocol)].iterrows()
    return line


# --- the paper's numbers ---

@pytest.mark.parametrize("number, row, metric, value", [
    (1, "with partial fine-tuning", "FID", 26.00), (2, "coordinates, raw pixels", "LPIPS", 0.132),
    (3, "LaMa (no MAE)", "PSNR", 24.12), (3, "MAE, no alpha", "LPIPS", 0.127), (3, "MAE, alpha 0", "FID", 26.83), (3, "MAE, alpha 1", "SSIM", 0.861),
    (4, "mixed, no attention", "FID", 26.84), (4, "mixed, trainable CA", "PSNR", 24.13), (4, "random, prior attention", "FID", 26.25),
    (4, "mixed, prior attention", "SSIM", 0.864), (5, "scenes: CTSDG", "FID", 11.2), (5, "HR scenes: HiFill", "LPIPS", 0.291),
    (5, "faces: FAR", "SSIM", 0.906), (6, "no MAE", "Training (s/batch)", 1.0101), (6, "MAE, prior attention", "Inference (s/image)", 0.0665)])
def test_the_papers_numbers_are_the_papers(number, row, metric, value):
    assert paper_value(number, row, metric) == value


@pytest.mark.parametrize("cell_of, names", [((7, "x", "PSNR"), "table"), ((4, "x", "PSNR"), "mixed, no attention"), ((4, "mixed, no attention", "x"), "LPIPS")])
def test_an_unknown_cell_of_the_paper_lists_the_known_ones(cell_of, names):
    with pytest.raises(FarError, match=names): paper_value(*cell_of)


# --- the table ---

@pytest.mark.parametrize("number", [3, 4])
def test_a_table_has_the_columns_and_one_line_per_row_metric_and_protocol(runs, number):
    frame = table(number, runs, "smoke")
    assert list(frame.columns) == COLUMNS == "table,row,metric,paper,measured,spread,ci_low,ci_high,images,preset,dataset,steps,seed,protocol,run".split(",")
    assert list(frame["row"].unique()) == list(table_runs(number))
    assert not frame.duplicated(["row", "metric", "protocol"]).any()
    first = read_json(runs / "smoke" / f"{table_runs(number)[frame['row'][0]]}-s0" / "metrics.json")
    absent = 1                                                        # the paper's LPIPS, which these runs do not measure
    assert len(frame) == 4 * (len(first["metrics"]) + absent)


def test_every_measured_number_is_the_runs(runs):
    frame = table(4, runs, "smoke")
    for row, experiment in table_runs(4).items():
        result = read_json(runs / "smoke" / f"{experiment}-s0" / "metrics.json")
        for line in result["metrics"]:
            found = cell(frame, row, line["metric"], line["protocol"])
            for column, key in (("measured", "value"), ("ci_low", "ci_low"), ("ci_high", "ci_high")):
                assert pd.isna(found[column]) if line[key] is None else found[column] == line[key]
            assert (found["images"], found["steps"], found["seed"], found["dataset"], found["run"]) == (IMAGES, 10, 0, "sample-scenes", result["run"])


def test_another_number_in_the_run_is_another_number_in_the_files(runs, tmp_path):
    path = runs / "smoke" / "far-s0" / "metrics.json"
    changed = read_json(path)
    next(line for line in changed["metrics"] if (line["metric"], line["protocol"]) == ("PSNR", "paper"))["value"] = 31.4159
    write_json(path, changed)
    csv, markdown, tex = write_table(table(4, runs, "smoke"), 4, tmp_path / "out")
    assert "31.4159" in csv.read_text() and "31.42" in markdown.read_text() and "31.42" in tex.read_text()


def test_the_papers_number_stands_beside_its_protocol_only(runs):
    frame = table(4, runs, "smoke")
    assert cell(frame, "mixed, prior attention", "PSNR", "paper")["paper"] == 24.51
    assert pd.isna(cell(frame, "mixed, prior attention", "PSNR", "standard")["paper"])
    assert frame[frame["metric"].str.contains("lite0")]["paper"].isna().all()
    for row, lines in frame.groupby("row"):
        assert sorted(lines["paper"].dropna()) == sorted(paper_value(4, row, metric) for metric in ("PSNR", "SSIM", "FID", "LPIPS"))


def test_a_metric_without_weights_is_blank_and_says_why(runs, tmp_path):
    frame = table(3, runs, "smoke")
    assert pd.isna(cell(frame, "LaMa (no MAE)", "FID", "paper")["measured"]) and cell(frame, "LaMa (no MAE)", "FID", "paper")["paper"] == 28.01
    _, markdown, tex = (path.read_text() for path in write_table(frame, 3, tmp_path / "out"))
    assert "FID is empty: Inception weights absent: a_b & 5 %" in markdown and r"a\_b \& 5 \%" in tex
    assert "LPIPS is empty: no run measured it" in markdown


def test_a_missing_run_names_itself_and_what_to_do(runs):
    (runs / "smoke" / "far-random-s0" / "metrics.json").unlink()
    (runs / "smoke" / "far-random-s0" / "train.ipynb").touch()
    with pytest.raises(FarError, match=r"far-random-s0.*train\.ipynb.*--preset smoke --only table4 --seeds 0"): table(4, runs, "smoke")
    assert len(table(3, runs, "smoke"))                                # the other table does not need it
    with pytest.raises(FarError, match="lama-s5"): table(3, runs, "smoke", seeds=(5,))


@pytest.mark.parametrize("change, message", [
    ({"preset": "tiny"}, "preset 'tiny'"), ({"seed": 3}, "seed 3"), ({"data_hash": "other"}, "different pictures")])
def test_runs_that_do_not_belong_together_are_refused(runs, change, message):
    path = runs / "smoke" / "far-s0" / "metrics.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(FarError, match=message): table(4, runs, "smoke")


def test_a_torn_or_foreign_file_is_refused(runs):
    path = runs / "smoke" / "far-s0" / "metrics.json"
    for content in ('{"metrics": [', "[]", '{"metrics": []}'):
        path.write_text(content)
        with pytest.raises(FarError, match="metrics.json"): table(4, runs, "smoke")


def test_an_unknown_table_is_refused(runs, tmp_path):
    with pytest.raises(FarError, match="unknown table '9'"): table(9, runs, "smoke")
    with pytest.raises(FarError, match="columns"): write_table(pd.DataFrame({"a": [1]}), 4, tmp_path)


# --- several seeds ---

def test_seeds_give_their_mean_and_spread(runs):
    for k, experiment in enumerate(table_runs(4).values()):
        for seed, more in ((1, 0.3), (2, -0.6)): write_run(runs, experiment, offset=0.1 * k + more, seed=seed)
    one, three = table(4, runs, "smoke"), table(4, runs, "smoke", seeds=(0, 1, 2))
    for row in table_runs(4):
        single, found = (cell(frame, row, "PSNR", "paper") for frame in (one, three))
        assert found["measured"] == pytest.approx(single["measured"] - 0.1) and found["spread"] == pytest.approx(np.std([0, 0.3, -0.6], ddof=1))
        assert pd.isna(single["spread"]) and found["seed"] == "0, 1, 2" and found["run"].count("-s") == 3
        assert found["ci_low"] < found["measured"] < found["ci_high"]                              # over the pictures, of the mean over the seeds
        assert pd.isna(cell(three, row, "FID", "paper")["measured"]) and cell(three, row, "FID (lite0)", "standard")["spread"] > 0
    text = tables._markdown(three, 4)
    assert "± 0.46 [" in text and "± the standard deviation over the seeds" in text and "seed 0, 1, 2" in text


# --- Table 5: groups, and rows that cannot be filled ---

@pytest.fixture
def five(tmp_path):
    for k, experiment in enumerate(table_runs(5).values()):
        name = {"far-full": "far", "lama-full": "lama"}.get(experiment, experiment)             # smoke trains its ablations in full
        which = EXPERIMENTS[experiment].data
        if EXPERIMENTS[experiment].spec != "folder": write_run(tmp_path, name, 0.1 * k, dataset=f"my {which}", data_hash=which, steps=10 if k % 2 else None)
    return tmp_path


def test_table_5_orders_within_each_group(five, tmp_path):
    frame = table(5, five, "smoke")
    assert [row for row in frame["row"].unique() if row.startswith("faces")] == [f"faces: {name}" for name in
                                                                                 ("Co-Mod-GAN", "LaMa", "FAR", "MAE alone", "Telea", "biharmonic")]
    assert list(dict.fromkeys(map(tables.group, frame["row"]))) == ["faces", "scenes", "HR scenes"]
    found = tables.verdicts(frame)
    assert found["faces: PSNR"].verdict == "reproduced" and {(pair.low, pair.high) for pair in found["faces: PSNR"].pairs} == {("faces: LaMa", "faces: FAR")}
    assert {tables.group(row) for name, order in found.items() for pair in order.pairs for row in (pair.low, pair.high) if name.startswith("HR")} == {"HR scenes"}
    psnr = tables._grid(frame, "paper")["PSNR"]["here"]
    assert sum(best for _, best in psnr) == 3                                                   # one best row in each group


def test_a_row_that_nobody_can_fill_is_blank_and_says_why(five, tmp_path):
    _, markdown, tex = (path.read_text() for path in write_table(table(5, five, "smoke"), 5, tmp_path / "out"))
    blank = next(line for line in markdown.splitlines() if "scenes: EdgeConnect" in line)
    assert "23.30 | – " in blank and re.search(r"\) scenes: EdgeConnect is empty: .*--outputs", markdown)
    assert next(line for line in markdown.splitlines() if "scenes: ICT" in line).count("–") >= 8     # the paper has no numbers for it either
    assert "scenes: EdgeConnect" in tex and tex.count(r"\midrule") == 2 * 3


def test_the_plan_says_which_rows_stay_empty(five):
    write_json(five / "smoke" / "plan.json", {"absent": {"far-faces": "no faces were given (--faces)"}})
    with pytest.raises(FarError, match="co-mod-gan-faces-s0"): table(5, five, "smoke")       # planned now, and not there
    write_json(five / "smoke" / "plan.json", {"absent": {name: "no faces" if experiment.data == "faces" else "no pictures" for name, experiment in EXPERIMENTS.items()
                                                         if experiment.data == "faces" or experiment.spec == "folder"}})
    frame = table(5, five, "smoke")
    assert frame[frame["row"].str.startswith("faces")]["measured"].isna().all() and frame.attrs["absent"]["faces: FAR"] == "no faces"
    assert "faces: PSNR" not in tables.verdicts(frame)


# --- Table 6: seconds ---

@pytest.fixture
def timed(tmp_path):
    rows, seconds = {}, {"Training (s/batch)": (0.4, 0.5, 0.51), "Inference (s/image)": (0.01, 0.02, 0.019)}
    for k, row in enumerate(table_runs(6)):
        rows[row] = []
        for metric, values in seconds.items():
            readings = values[k] * (1 + 0.01 * np.arange(11))                                     # a machine that slows down, for all rows alike
            rows[row].append({"metric": metric, "protocol": "speed", "value": float(np.median(readings)), "ci_low": float(np.quantile(readings, 0.25)),
                              "ci_high": float(np.quantile(readings, 0.75)), "images": 8, "reason": None, "ratio": values[k] / values[0],
                              "ratio_low": values[k] / values[0], "ratio_high": values[k] / values[0], "repeats": 11, "warmup": 2,
                              "peak_memory": 10_000_000 * (k + 1), "readings": readings.tolist()})
    write_json(tmp_path / "smoke" / "speed-s0" / "metrics.json",
               {"run": "speed-s0", "experiment": "speed", "preset": "smoke", "dataset": "sample-scenes", "data_hash": "", "images": 8, "steps": None, "seed": 0,
                "provenance": {}, "rows": rows, "conditions": {"device": "a machine", "batch": 8}})
    return tmp_path


def test_table_6_sets_ratios_beside_the_papers(timed, tmp_path):
    frame = table(6, timed, "smoke")
    assert list(frame["metric"].unique()) == ["Training (s/batch)", "Training (ratio)", "Inference (s/image)", "Inference (ratio)", "Training (MB)", "Inference (MB)"]
    training = frame[frame["metric"] == "Training (ratio)"]
    assert training["measured"].tolist() == pytest.approx([1, 1.25, 1.275]) and training["paper"].tolist() == pytest.approx([1, 1.2510 / 1.0101, 1.2604 / 1.0101])
    assert frame[frame["metric"] == "Training (MB)"]["measured"].tolist() == [10, 20, 30] and frame[frame["metric"] == "Training (MB)"]["paper"].isna().all()
    assert cell(frame, "no MAE", "Training (s/batch)", "speed")["paper"] == 1.0101
    found = tables.verdicts(frame)
    assert set(found) == {"Training (s/batch)", "Inference (s/image)"}
    assert found["Training (s/batch)"].verdict == "reproduced" and not found["Training (s/batch)"].undecided       # round by round, the drift cancels
    assert found["Inference (s/image)"].verdict == "partly reproduced"
    text = write_table(frame, 6, tmp_path / "out")[1].read_text()
    assert "device a machine" in text and "warm-up calls 2, rounds 11 (training), 11 (inference)" in text and "round by round" in text and "bootstrap interval over the test images" not in text


# --- the three files ---

def test_the_csv_keeps_every_digit(runs, tmp_path):
    frame = table(4, runs, "smoke")
    again = pd.read_csv(write_table(frame, 4, tmp_path / "out")[0])
    assert list(again.columns) == COLUMNS and len(again) == len(frame)
    for column in COLUMNS: assert again[column].isna().equals(frame[column].isna()) and (again[column].dropna() == frame[column].dropna()).all()


def test_the_markdown_is_one_wide_table_per_protocol(runs, tmp_path):
    lines = write_table(table(4, runs, "smoke"), 4, tmp_path / "out")[1].read_text().splitlines()
    heads = [line for line in lines if line.startswith("|  |")]
    assert len(heads) == 2 and "PSNR ↑ paper | PSNR ↑ here" in heads[0] and "FID (lite0) ↓ here" in heads[1] and "paper" not in heads[1]
    rows = [line for line in lines if line.startswith("| (")]
    assert len(rows) == 8 and all(line.count("|") == heads[k // 4].count("|") for k, line in enumerate(rows))
    assert "**24.51**" in rows[3]                                       # the paper's best, as in the paper
    text = "\n".join(lines)
    for part in ("Preset smoke", "sample-scenes", f"{IMAGES} test images", "10 training steps", "seed 0", "0123456789", "biased"): assert part in text


def test_every_metric_gets_its_sentence_on_the_ordering(runs, tmp_path):
    text = write_table(table(4, runs, "smoke"), 4, tmp_path / "out")[1].read_text()
    psnr, fid, surrogate = (re.search(rf"- {re.escape(name)} \(.*", text)[0] for name in ("PSNR", "FID", "FID (lite0)"))
    # offsets 0, 0.1, 0.2, 0.3 on the same pictures: only the paper's (2) < (1) is turned round, and nothing is left to luck
    assert "paper (2) < (1) < (3) < (4); here (1) < (2) < (3) < (4); partly reproduced: 5 of 6" in psnr and "against it: (1)–(2)." in psnr
    assert "not measured" in fid
    assert "the paper's FID, which it stands for," in surrogate and "no pair can be tested" in surrogate


def test_latex_is_escaped_and_balanced(runs, tmp_path):
    frame = table(4, runs, "smoke")
    frame["dataset"] = r"my_photos 100% & #1 {~^\} <new>"
    tex = write_table(frame, 4, tmp_path / "out")[2].read_text()
    assert r"my\_photos 100\% \& \#1 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\} $<$new$>$" in tex
    assert tex.isascii()
    bare = re.sub(r"\\[\\{}%&#_$]", "", tex)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    for block in re.findall(r"\\begin\{tabular\}\{(l c*|lc*)\}(.*?)\\end\{tabular\}", tex, re.S):
        columns = len(block[0])
        for line in block[1].splitlines():
            if line.endswith(r"\\") and "multicolumn" not in line: assert len(re.findall(r"(?<!\\)&", line)) == columns - 1, line
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 2


def test_a_table_read_back_from_its_csv_can_be_written_again(runs, tmp_path):
    csv = write_table(table(4, runs, "smoke"), 4, tmp_path / "out")[0]
    again = write_table(pd.read_csv(csv), 4, tmp_path / "again")
    assert again[0].read_bytes() == csv.read_bytes() and "no pair can be tested" in again[1].read_text()


# --- the ordering ---

def test_an_ordering_counts_pairs():
    paper = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert ordering(paper, {"a": 5, "b": 6, "c": 7}).verdict == "reproduced"
    assert ordering(paper, {"a": 7, "b": 6, "c": 5}).verdict == "not reproduced"
    partly = ordering(paper, {"a": 5, "b": 7, "c": 6})
    assert (partly.verdict, partly.agreeing, len(partly.pairs)) == ("partly reproduced", 2, 3)
    assert all(pair.decided is None for pair in partly.pairs)


def test_ties_and_blanks_make_no_pair():
    paper = {"a": 1.0, "b": 1.0, "c": 3.0}
    assert {(pair.low, pair.high) for pair in ordering(paper, {"a": 1, "b": 2, "c": 3}).pairs} == {("a", "c"), ("b", "c")}
    assert len(ordering(paper, {"a": 1, "c": 3}).pairs) == 1
    assert ordering(paper, {"a": 1, "b": 2}).verdict == ordering(paper, {}).verdict == "nothing to compare"
    assert not ordering(paper, {"a": 2, "c": 2}).pairs[0].agrees         # equal here is not the paper's order


def test_a_pair_is_decided_by_the_paired_difference():
    difficulty = rng(0).normal(20, 5, 80)
    better, noisy = difficulty + rng(1).normal(0.2, 0.1, 80), difficulty + rng(2).normal(0, 1, 80)
    values = {"a": difficulty, "b": better, "n": noisy}
    means = {name: float(v.mean()) for name, v in values.items()}
    found = ordering({"a": 1, "b": 2}, means, values)
    assert found.verdict == "reproduced" and found.undecided == ()       # 0.2 dB, far below the spread between pictures
    assert ordering({"b": 1, "a": 2}, means, values).verdict == "not reproduced"
    assert ordering({"a": 1, "n": 2}, means, values).verdict == "undecided"
    assert len(ordering({"a": 1, "n": 2, "b": 3}, means, values).undecided) < 3


def test_unpaired_values_are_refused():
    with pytest.raises(FarError, match="same ones"): ordering({"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": [1, 2], "b": [1, 2, 3]})


