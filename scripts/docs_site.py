"""Hook of MkDocs (mkdocs.yml): adds CONTRIBUTING.md and CHANGELOG.md, which are outside of docs/, to the site.

Links between them and the pages of docs/ are those of the repository, so that they work on GitHub, too. They
are rewritten here.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Page of the repository -> page of the site. README.md is not copied: the site has its own home page.
ADDED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SITE_PAGES = {**ADDED, "README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(?=[#)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/."""
    for name, uri in ADDED.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point relative links at pages of the site."""
    uri = page.file.src_uri
    source = next((name for name, added in ADDED.items() if added == uri), f"docs/{uri}")
    return LINK.sub(lambda match: site_link(match[1], source, uri), markdown)


def site_link(link: str, source: str, uri: str) -> str:
    """The link from page `uri` of the site that `link` in file `source` of the repository means."""
    target = os.path.normpath(os.path.join(os.path.dirname(source), link))
    target_uri = SITE_PAGES.get(target, target.removeprefix("docs/"))
    return os.path.relpath(target_uri, os.path.dirname(uri) or ".")
