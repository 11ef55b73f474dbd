"""The notebook of differences between the paper's text and the released code runs, and its overview lists every one of them."""
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "nbs" / "paper"
ERRATA = FOLDER / "errata.ipynb"
EXPECTED = ["Size of the resized features", "Downsampling convolutions", "Range of the coordinates", "Masked positions", "Distance code outside the hole",
            "Class token", "Layer of the prior features", "Partly masked patches, re-encoded", "Clamp of that α", "Continuous masks above 75 %",
            "Masked keys of Eq. 3", "Softmaxes of the decoder", "d and heads of Eq. 3 and 4", "Overlap-add of the aggregation", "Odd rates",
            "Where the aggregate is added", "Temperature of contextual attention", "Adversarial loss", "Gradient penalty", "R1's norm",
            "Feature matching", "L1 region", "Known patches of a painted picture", "PSNR", "SSIM", "uint8", "FID's resize", "The paper's own numbers"]


@pytest.fixture(scope="module")
def executed():
    "A copy in memory, run where the notebook lies."
    notebook = nbformat.read(ERRATA, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.outputs = []
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try: return NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    finally:
        if before is None: del os.environ["OMP_NUM_THREADS"]
        else: os.environ["OMP_NUM_THREADS"] = before


def overview(notebook) -> dict[str, list[str]]:
    "Difference -> the four cells after it."
    tables = [output["data"]["text/markdown"] for cell in notebook.cells for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {})]
    assert len(tables) == 1
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in tables[0].splitlines()[2:]]
    assert [int(line[0]) for line in lines] == list(range(1, len(lines) + 1))
    return {line[1]: line[2:] for line in lines}


def test_every_difference_has_its_line_with_a_measured_effect(executed):
    rows = overview(executed)
    assert list(rows) == EXPECTED
    for name, (text, code, ours, effect) in rows.items():
        assert text and code and ours and re.search(r"\d", effect), name
    headings = re.findall(r"^### (\d+)\. ", "\n".join(cell.source for cell in executed.cells if cell.cell_type == "markdown"), re.M)
    assert list(map(int, headings)) == list(range(1, len(rows) + 1))


def test_stored_outputs_are_those_of_the_notebook(executed):
    stored = nbformat.read(ERRATA, 4)
    assert ERRATA.stat().st_size < 1_000_000
    assert not [output for cell in stored.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert all(cell.outputs for cell in stored.cells if cell.cell_type == "code" and "record(" in cell.source and "def record" not in cell.source)
    ours, theirs = overview(executed), overview(stored)
    assert list(theirs) == EXPECTED and all(ours[name][:3] == theirs[name][:3] for name in EXPECTED)


def test_every_named_option_exists():
    "What the overview calls a switch is a field, an argument or a file."
    from dataclasses import fields
    from inspect import signature

    from far_nb import acr, evaluation, losses, mae, priors
    owners = {"ACRConfig": acr, "MAEConfig": mae, "LossWeights": losses}
    source = "\n".join(cell.source for cell in nbformat.read(ERRATA, 4).cells)
    named = set(re.findall(r"`(\w+)\.(\w+)`", source)) - {("paper_values", "csv")}
    assert {owner for owner, _ in named} >= set(owners)
    for owner, field in named:
        if owner in owners: assert field in {f.name for f in fields(getattr(owners[owner], owner))}, f"{owner}.{field}"
    assert "scale" in signature(priors.ContextualAttention).parameters and "protocol" in signature(evaluation.psnr).parameters
