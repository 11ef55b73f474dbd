"""What the package says of itself: docstrings, the command line's help, and the site's configuration (the site itself is not built here)."""
import importlib
import inspect
import json
import pkgutil
import re
import runpy
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import far_nb
from far_nb.cli import app

ROOT = Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.iter_modules(far_nb.__path__) if not module.name.startswith("_"))


def undocumented(module_name: str) -> list[str]:
    "Public functions, classes and public methods and properties of a module without a docstring of their own or of what they override."
    module = importlib.import_module(f"far_nb.{module_name}")
    missing = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        doc = inspect.getdoc(thing) or ""
        if not doc or doc.startswith(f"{name}("): missing.append(name)                # dataclasses get their signature
        if not inspect.isclass(thing): continue
        for member, value in vars(thing).items():
            if member.startswith("_") or not (inspect.isroutine(value) or isinstance(value, property)): continue
            if not inspect.getdoc(getattr(thing, member)): missing.append(f"{name}.{member}")
    return missing


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    assert undocumented(module) == []


def test_a_missing_docstring_is_found(monkeypatch):
    import far_nb.masks as masks
    monkeypatch.setattr(masks.brush_mask, "__doc__", None)
    monkeypatch.setattr(masks.MaskSampler, "extra", lambda self: None, raising=False)
    assert undocumented("masks") == ["brush_mask", "MaskSampler.extra"]


def commands(group=None, path=()):
    group = group or typer.main.get_command(app)
    yield list(path)
    for name, command in getattr(group, "commands", {}).items(): yield from commands(command, (*path, name))


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_reads_well_at_80_columns(command):
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0 and max(map(len, shown.stdout.splitlines())) <= 80
    assert "…" not in shown.stdout, "a word is cut: shorten it"
    assert len([line for line in shown.stdout.splitlines() if line.strip(" │╭╰─╮╯")]) >= 3


@pytest.fixture(scope="module")
def site() -> dict:
    return runpy.run_path(str(ROOT / "docs/conf.py"))


def test_the_site_has_every_notebook_and_every_module(site):
    notebooks = [path.relative_to(ROOT).as_posix() for folder in ("nbs", "nbs/paper") for path in (ROOT / folder).glob("*.ipynb")]
    pages = [line.partition("<")[2].rstrip(">") or line for line in (ROOT / "docs/index.md").read_text(encoding="utf-8").splitlines()]
    for notebook in notebooks:
        assert any(fnmatch(notebook, pattern) for pattern in site["include_patterns"])
        assert any(line.startswith("/") and fnmatch(f"/{notebook.removesuffix('.ipynb')}", line) for line in pages), notebook
    assert sorted(site["modules"]()) == MODULES


def test_the_site_hides_what_only_nbdev_reads(site):
    notebook = {"cells": [{"source": ["#| hide\n", "import secret"]}, {"source": ["#| export\n", "def shown(): pass"]}, {"source": ["a = 1  #| b"]}]}
    assert [cell["source"] for cell in json.loads(site["without_directives"](json.dumps(notebook)))["cells"]] == ["def shown(): pass", "a = 1  #| b"]
    link = {"cells": [{"cell_type": "markdown", "source": ["see [there](16_training.ipynb#Many-processes,-one-network), [x](http://a.b/#C)"]}]}
    assert "(16_training.ipynb#many-processes-one-network), [x](http://a.b/#C)" in site["without_directives"](json.dumps(link))
    assert site["as_rst"]("`x_` is (B,L,patch*patch*C); |a_1|") == r"``x_`` is (B,L,patch\*patch\*C); \|a\_1\|"


def test_the_site_finds_the_figures(site):
    for page in (ROOT / "figures").glob("*/README.md"):
        shown = site["with_pictures"](page.read_text(encoding="utf-8"))
        named = re.findall(r"\[!\[Figure \d\]\((\S+)\)\{width=\d+px\}\]\((\S+)\)", shown)
        assert named and "<img" not in shown and all((page.parent / file).exists() for pair in named for file in pair), page
