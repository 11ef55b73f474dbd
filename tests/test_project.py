"""The project holds together: notebooks run and match the package, imports go one way, the README says what CI does."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def run(*command: str, timeout: int = 600, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_every_notebook_runs():
    "nbdev_test executes all of them, two at a time with a thread each; it prints the seconds of each and the traceback of a failed one."
    result = run(TOOLS / "nbdev_test", "--n_workers", "2", "--timing", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-6000:]
    print(report)


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", "far_nb", "settings.ini", "pyproject.toml", "setup.py", "README.md"):
        subprocess.run(["cp", "-r", ROOT / name, tmp_path], check=True)
    result = subprocess.run([TOOLS / "nbdev_export"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for module in (ROOT / "far_nb").glob("*.py"):
        assert (tmp_path / "far_nb" / module.name).read_text() == module.read_text(), f"{module.name}: run nbdev_export, or nbdev_update after editing it"


def test_imports_go_one_way():
    result = run(TOOLS / "lint-imports", "--no-cache")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_show_and_stay_small(notebook):
    assert notebook.stat().st_size < 1_000_000
    outputs = [output for cell in cells(notebook) for output in cell.get("outputs", [])]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "a notebook shows pictures"
    assert len(outputs) >= 4
    exported = ["".join(cell["source"]) for cell in cells(notebook) if "".join(cell["source"]).startswith("#| export")]
    assert all(source.count("\n") < 50 for source in exported)


def test_ci_runs_the_readme_s_test_command():
    commands = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    script = (ROOT / ".ci" / "run").read_text()
    tests = [line for block in commands for line in block.splitlines() if "pytest" in line]
    assert len(tests) >= 1 and tests[0] in script.splitlines()


def test_readme_links_exist():
    for page in (ROOT / "README.md", *NOTEBOOKS):
        text = page.read_text(encoding="utf-8") if page.suffix == ".md" else "".join("".join(cell["source"]) for cell in cells(page) if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_can_travel():
    files = run("git", "ls-files").stdout.split("\n")[:-1]
    sizes = {name: (ROOT / name).stat().st_size for name in files if (ROOT / name).exists()}
    assert sum(sizes.values()) < 36_000_000
    assert sum(size for name, size in sizes.items() if name.startswith("tests/fixtures/")) < 4_000_000
    assert sum(size for name, size in sizes.items() if name.startswith("figures/")) < 8_000_000
