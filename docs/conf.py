"""Sphinx: an HTML site of the executed notebooks and the docstrings. `sphinx-build -c docs . _docs/html` in the root of the checkout."""
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project, author = "far_nb", "the far_nb authors"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "nbs/*.ipynb", "nbs/paper/*.ipynb", "figures/*/*.md", "far_nb/weights/*/README.md"]
exclude_patterns = ["_docs", ".*", "runs", "build", "dist", "tests", "**/.ipynb_checkpoints"]
html_theme, html_title = "furo", "far_nb"
html_static_path = html_css_files = ["site.css"]

nb_execution_mode = "off"                        # the outputs are in the notebooks, which the tests execute
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "toc.not_included"]      # a page may begin below the first level; a table belongs to its index

autodoc_member_order = "bysource"
autodoc_typehints = "signature"


def modules() -> list[str]:
    "All modules, in the order in which they may import each other: the layers of pyproject.toml, from the bottom."
    contract, = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return contract["layers"][::-1]


def slug(heading: str) -> str:
    "GitHub's anchor of a heading, in which Jupyter has put dashes for spaces."
    return re.sub(r"[^\w-]", "", heading.lower())


def without_directives(notebook: str) -> str:
    "A notebook as readers want it: no hidden cells, no nbdev directives, links to headings that lead there."
    content = json.loads(notebook)
    content["cells"] = [cell for cell in content["cells"] if not re.match(r"#\| (hide|default_exp)", "".join(cell["source"]))]
    for cell in content["cells"]:
        cell["source"] = re.sub(r"\A(#\|.*\n?)+", "", "".join(cell["source"]))
        if cell.get("cell_type") == "markdown":              # Jupyter's anchors are the headings as they are, MyST's are GitHub's
            cell["source"] = re.sub(r"\]\((?!http)([^)\s#]*)#([^)]+)\)", lambda link: f"]({link[1]}#{slug(link[2])})", cell["source"])
    return json.dumps(content)


def with_pictures(page: str) -> str:
    "HTML pictures that lead to their PDF, as GitHub shows them, in MyST's words: Sphinx copies the files that those name."
    return re.sub(r'<a href="([^"]+)"><img src="([^"]+)" width="(\d+)" alt="([^"]+)"></a>', r"[![\4](\2){width=\3px}](\1)", page)


def read(app, document: str, source: list[str]) -> None:
    "Notebooks without directives; figures that are found; the modules into the page docs/api."
    if document.startswith("figures/"): source[0] = with_pictures(source[0])
    if document.startswith("nbs/"): source[0] = without_directives(source[0])
    if document == "docs/api":
        source[0] += "".join(f"\n## {name}\n\n```{{eval-rst}}\n.. automodule:: far_nb.{name}\n   :members:\n```\n" for name in modules())


def as_rst(docstring: str) -> str:
    "Docstrings are plain text with `code`: reStructuredText is to read nothing else into them."
    parts = docstring.split("`")
    return "".join(f"``{part}``" if number % 2 and part else re.sub(r"([\\*_|])", r"\\\1", part) for number, part in enumerate(parts))


def docstring(app, kind: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    lines[:] = as_rst("\n".join(lines)).split("\n")


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring)
