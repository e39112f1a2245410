"""How the pages of docs/ become a site: `make docs`.

The pages are plain Markdown that reads on GitHub as it is. What the site adds is here and in `_extensions/`: a navigation, the
API from the docstrings, the command line from its own help, and a search that needs no network.
"""

import sys
from pathlib import Path

import fedkseed

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "fedkseed"
author = "The fedkseed developers"
project_copyright = f"2026 {author}"
version = release = fedkseed.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "links", "command_line"]
exclude_patterns = ["_build", "_extensions"]
repository_url = "https://github.com/fedkseed/fedkseed/blob/main/"

myst_heading_anchors = 4
highlight_language = "text"

# docstrings are Google's style, with code in single backticks
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 100
nitpicky = True
# types of other projects have no page here
nitpick_ignore_regex = [("py:.*", r"(?!fedkseed\.).*"), ("py:.*", r"fedkseed\.\w+\..*")]

pygments_dark_style = "monokai"
html_theme = "furo"
html_title = "fedkseed"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "source_repository": "https://github.com/fedkseed/fedkseed/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view"],
}
