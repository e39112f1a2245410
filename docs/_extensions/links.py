"""Links of the pages, which are made for GitHub, as a site wants them.

One to a file of the repository that is no page leads to where the source is kept. One whose words are a file's name, such as
`[noise.md](noise.md)`, shows the title of what it leads to.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

OUTSIDE = re.compile(r"(?<!!)(\[[^\]]*\])\((\.\./[^)\s#]*)(#[^)\s]*)?\)")
NAMED = re.compile(r"\[[\w./-]+\.md\](\((?!\w+:)[^)\s]+\))")


def _as_a_site_wants(app: Sphinx, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    page = docs / docname

    def outside(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        file = (page.parent / path).resolve()
        if file.is_relative_to(docs):
            return link[0]
        if not file.exists():
            raise ExtensionError(f"{docname}: there is no {path}")
        return f"{text}({app.config.repository_url}{file.relative_to(docs.parent).as_posix()}{anchor})"

    source[0] = NAMED.sub(r"[]\1", OUTSIDE.sub(outside, source[0]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("repository_url", "", "html")
    app.connect("source-read", _as_a_site_wants)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
