# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Configuration of Sphinx."""

import logging
from importlib import metadata, util
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

project = "cellmw"
author = "the cellmw developers"
copyright = "the cellmw developers"  # noqa: A001  # the name Sphinx wants
version = release = metadata.version("cellmw")

extensions = [
    "oslo_config.sphinxext",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
]

html_theme = "furo"
html_title = f"cellmw {version}"
html_static_path: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# Examples are what is marked as such (testcode), and nothing else.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import logging
logging.disable(logging.WARNING)
"""

# reno reads the notes out of git's history: a release unpacked from an sdist
# has none.
HAS_NOTES = (
    util.find_spec("reno") and (Path(__file__).parents[2] / ".git").exists()
)
if HAS_NOTES:
    extensions.append("reno.sphinxext")
    # It tells of each note.
    logging.getLogger("reno").setLevel(logging.WARNING)


class NoNotes(Directive):
    """Stands for reno's directive."""

    def run(self) -> list[nodes.Node]:
        text = (
            "The changelog needs reno and a clone: "
            "pip install '.[docs]', then build the documentation there."
        )
        return [nodes.paragraph(text, text)]


def setup(app: Sphinx) -> None:
    if not HAS_NOTES:
        app.add_directive("release-notes", NoNotes)
