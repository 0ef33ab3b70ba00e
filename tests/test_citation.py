"""CITATION.cff and the BibTeX entry in docs/install.md agree with the package."""

import pathlib
import re

import yaml

import mdm_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Of the schema of the Citation File Format 1.2.0: required keys, and those that we may use.
REQUIRED = {"cff-version", "message", "title", "authors"}
ALLOWED = REQUIRED | {"type", "version", "license", "keywords", "url", "repository-code", "doi"}
ALLOWED |= {"abstract", "date-released", "references", "preferred-citation"}


def test_citation_file_keeps_to_the_schema_and_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {*citation} >= REQUIRED and {*citation} <= ALLOWED
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert str(citation["version"]) == mdm_jax.__version__ and citation["license"] == "Apache-2.0"
    assert citation["authors"] and all(
        {"name"} <= {*author} or {"family-names", "given-names"} <= {*author}
        for author in citation["authors"]
    )
    assert all(isinstance(word, str) for word in citation["keywords"])


def test_bibtex_says_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    page = (ROOT / "docs/install.md").read_text("utf-8")
    (entry,) = re.findall(r"```bibtex\n(.*?)```", page, re.S)
    fields = dict(re.findall(r"(\w+)\s*= \{+(.*?)\}+,\n", entry.replace("\\_", "_")))
    assert fields == {
        "author": citation["authors"][0]["name"],
        "title": citation["title"],
        "version": mdm_jax.__version__,
        "license": citation["license"],
    }
