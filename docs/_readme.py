"""mkdocs hook: the start page is the README, its links made relative to docs/.

Links to files outside docs/, which the site does not have, become plain text.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown, page, **kwargs):
    if page.file.src_uri != "index.md":
        return markdown
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](./")
    return re.sub(r"\[([^\]]+)\]\([A-Z]+\.[a-z]+\)", r"\1", readme)
