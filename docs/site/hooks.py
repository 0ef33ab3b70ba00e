"""MkDocs hooks: pages from elsewhere in the repository, the API reference, links between them."""

import logging
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.mdm_jax")
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "results.md": "experiments/RESULTS.md",
    "benchmark_results.md": "experiments/benchmarks/RESULTS.md",
    "small_model.md": "experiments/models/small/README.md",
}
"""Pages of the site and the files of the repository that they are."""
CORE = "api/mdm_jax.md"
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*>")


def on_files(files, *, config):
    """Add the pages that do not lie in ``docs``."""
    for uri, path in PAGES.items():
        text = (ROOT / path).read_text("utf-8")
        files.append(File.generated(config, uri, content=text))
    for uri, text in api_pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown, *, page, **_):
    """Point links between files of the repository at pages of the site, where they are pages."""
    here = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    uris = {path: uri for uri, path in PAGES.items()}

    def moved(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        inside = path.removeprefix("docs/") if path.startswith("docs/") else None
        uri = uris.get(path, inside)
        if uri is None:
            LOG.warning("%s links to %s, which is no page of the site", here, match[2])
            return match[0]
        start = posixpath.dirname(page.file.src_uri)
        return f"{match[1]}{posixpath.relpath(uri, start or '.')}{match[3] or ''}{match[4]}"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def on_post_page(output, *, page, **_):
    """Warn of anything that a page loads from elsewhere: the site has to work without the net."""
    for tag in LOADED.findall(output):
        if "canonical" not in tag:
            LOG.warning("%s loads from the net: %s", page.file.src_uri, tag)


def on_config(config):
    """List the pages of the reference in the navigation."""
    pages = sorted(api_pages(), key=lambda uri: (uri != CORE, uri))
    config.nav.append({"API reference": pages})
    return config


def api_pages():
    """Texts of the reference by page: one per package, one of the modules beside the packages."""
    package = ROOT / "mdm_jax"
    folders = sorted(p.parent.name for p in package.glob("*/__init__.py"))
    modules = sorted(p.stem for p in package.glob("*.py") if p.stem != "__init__")
    pages = {f"api/{name}.md": f"::: mdm_jax.{name}\n" for name in folders}
    parts = [f"::: mdm_jax.{name}\n    options: {{heading_level: 2}}\n" for name in modules]
    return {CORE: "# mdm_jax\n\n" + "\n".join(parts), **pages}
