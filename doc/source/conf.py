# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Configuration of Sphinx."""

from importlib import metadata

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
