"""A Griffe extension: docstrings as they are written here, in reStructuredText, as Markdown."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`(~?)\.?([\w.]+)`")
CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
LABEL = re.compile(r"([A-Z][a-z]+):(?=\s|$)")
INLINE = re.compile(r"(?<=[.)]) (?=(?:Keeps|Couples|Costs|Removes|Bias|References?|Raises):)")
ENTRY = re.compile(r"    (\w[\w, ]*): ")


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text):
    """References as links; labelled lines ("Keeps: ...") and entries of "Args:" as lists."""
    parts = CODE.split(text)
    parts[::2] = [_escaped(part) for part in parts[::2]]
    text = ROLE.sub(_link, INLINE.sub("\n", "".join(parts)))
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # before an indented block
    lines, entries = [], False  # entries: within those of "Args:"
    for number, line in enumerate(text.split("\n")):
        entries = bool(line.strip()) and (entries or bool(LABEL.fullmatch(line)))
        if number and LABEL.match(line):
            lines += ["", LABEL.sub(r"* **\1:**", line, count=1)]
        else:
            lines.append(ENTRY.sub(r"    * `\1`: ", line) if entries else line)
    return "\n".join(lines)


def _link(match):
    shown = match[2].rpartition(".")[2] if match[1] else match[2]
    if shown.rpartition(".")[2].startswith("_"):  # not on any page
        return f"`{shown}`"
    return f"[`{shown}`][{match[2]}]"


def _escaped(text):
    """Stars that are products, powers or arguments; "[a][b]", which is a shape and no link."""
    return re.sub(r"(?<=\S)\*|\*(?=[\w*])", r"\*", re.sub(r"\](?=\[\w)", r"]\\", text))
