"""Sphinx's configuration: `make docs` builds the site into build/docs, warnings being errors.

The source folder is the repository, not docs/, so that the pages of results, CONTRIBUTING.md and
csrc/README.md are pages of the site as they lie, and every relative link is right on the site and
where the files are read. Nothing is loaded from elsewhere: no web fonts, no scripts; formulas
become MathML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

from fuse_ext import __version__

project = "fuse_ext"
author = "fuse_ext contributors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*/README.md",
    "csrc/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "dist"]

myst_heading_anchors = 4  # links to headings, as code hosts make them
# Not errors: pages of results that are written by a program may begin below the first level.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list, not as entries of their own
napoleon_use_param = False  # several arguments that are told of together stay together
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"fuse_ext {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
templates_path: list[str] = []


def _mathml(latex: str, display: str) -> str:
    return str(convert(latex, display=display))


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    text = node.astext()
    if "\\\\" in text:  # rows, with & where they are aligned
        text = rf"\begin{{align*}}{text}\end{{align*}}"
    translator.body.append(f'<div class="math">{_mathml(text, "block")}</div>\n')
    raise nodes.SkipNode


# A cell of figures up to this long stays on one line; a longer one is text.
SHORT_CELL = 34


def _mark_short_cells(app: Sphinx, tree: nodes.document) -> None:
    for cell in tree.findall(nodes.entry):
        if len(cell.astext()) <= SHORT_CELL:
            cell["classes"].append("short")


def _front_door(app: Sphinx, failed: Exception | None) -> None:
    """The site's own index.html, which leads to that of docs/."""
    if failed is None and app.builder.format == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("doctree-read", _mark_short_cells)
    app.connect("build-finished", _front_door)
