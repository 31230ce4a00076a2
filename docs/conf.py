"""How sphinx makes pages of the Markdown files (`make docs`). They are the same files that a reader of the source sees.

The folder of sources is the repository's root, since README.md and others link to one another across folders.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "equipoise"
author = "The equipoise contributors"
copyright = "The equipoise contributors"
release = version = re.findall(r'^__version__ = "(.+)"$', (ROOT / "equipoise/__init__.py").read_text("utf-8"), re.M)[0]

extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/*.md", "examples/*.md"]
html_static_path: list[str] = []
html_show_sourcelink = False
html_theme_options = {"page_width": "70em", "fixed_sidebar": True}

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # the log begins with a level below its title in places

PAGES = (
    "docs/TRAINING", "docs/TASKS", "docs/METHODS", "docs/METRICS", "docs/EVALUATION", "docs/FRONTIER", "docs/API",
    "docs/PLUGINS", "docs/MODELS_OUT", "examples/README", "docs/CLUSTER", "docs/SECURITY", "docs/ARCHITECTURE",
    "CONTRIBUTING", "CHANGELOG", "docs/LOG", "benchmarks/RESULTS",
)  # fmt: skip
"""The order in the margin."""


def setup(app):
    """README.md has no list of pages in sphinx's words, so it is given one."""
    app.add_config_value("PAGES", (), "env")  # another order reads all pages again
    app.connect("source-read", _with_contents)


def _with_contents(app, name, source):
    if name == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(app.config.PAGES) + "\n```\n"
