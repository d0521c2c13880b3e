"""The documentation site, ``make docs``: the Markdown beside this file and the docstrings, built without a network."""

import logging
import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "eva-kernels"
author = copyright = "The eva-kernels authors"
version = release = installed("eva-kernels")

extensions = ["myst_parser", "sphinx.ext.autodoc", "api", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"eva-kernels {version}"
html_static_path = ["_static"]
html_css_files = ["eva.css"]
html_copy_source = html_domain_indices = html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "wandb"]  # installed by those who use them
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|dist|numpy|np|npt|collections|contextlib|pathlib|matplotlib|transformers|typing)\..*"),
    ("py:class", r"Figure|Tensor|eva_kernels\.streaming_svd\.statistics\.(S|Sketch)"),
    ("py:class", r"eva_lora\.(adapters|reporting\.facts)\.F"),
]

# A pattern of the index may match nothing yet; Sphinx gives that warning no type to suppress it by.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(lambda record: "toctree glob" not in str(record.msg))
