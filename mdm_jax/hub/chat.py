"""Chat templates of other models: jinja2 programs from elsewhere, run in a sandbox.

A template sees JSON values only and reaches neither Python's objects nor files. What it multiplies,
counts and prints is bounded, but it may still take time and memory.
"""

import datetime
import functools
import json
import re
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mdm_jax.checks import missing_package

Messages = Sequence[Mapping[str, Any]]
MOST_CHARACTERS = 10**7
_FILE = "<template>"  # jinja2's name of a template without one


class Rendered(NamedTuple):
    """A conversation as text, and where the assistant speaks: (start, end) in characters.

    ``spans`` are the ``{% generation %}`` blocks of the template, none if it has none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(
    template: str,
    messages: Messages,
    add_generation_prompt: bool = False,
    *,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation by a chat template, as transformers' ``apply_chat_template``.

    Args:
        messages: [{"role": ..., "content": ...}, ...]; JSON values, as all ``variables``.
        add_generation_prompt: whether the text ends where the assistant is to speak.
        now: what the template's ``strftime_now`` tells; None: this moment.
        variables: ``bos_token``, ``tools``, ``enable_thinking``, ... as the template knows them.

    ValueError, with the line, for a template that is no jinja2, does what the sandbox forbids,
    refuses the messages (``raise_exception``) or fails; for messages without a role, or not JSON.
    """
    return render_spans(template, messages, add_generation_prompt, now=now, **variables).text


def render_spans(
    template: str,
    messages: Messages,
    add_generation_prompt: bool = False,
    *,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> Rendered:
    """:func:`render`, with the places where the assistant speaks."""
    jinja2 = _import_jinja2()
    # Templates ask whether tools are none, which what is undefined is not.
    values = _plain({"tools": None, "documents": None, **variables, "messages": list(messages)})
    for number, message in enumerate(values["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {number} of a chat must be an object with a role, such as "
                f'{{"role": "user", "content": "Hello"}}, got {message!r}'
            )
    token = uuid.uuid4().hex  # in no message
    begin, end = f"<{token}>", f"</{token}>"
    values |= {
        "add_generation_prompt": bool(add_generation_prompt),
        "raise_exception": _refuse,
        "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form),
        "_mdm_jax_mark": lambda text: f"{begin}{text}{end}",
    }
    pieces, size = [], 0
    try:
        for piece in _environment().from_string(template).generate(values):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                raise jinja2.exceptions.SecurityError(f"more than {MOST_CHARACTERS} characters")
    except Exception as error:  # a template may raise whatever Python's operators raise
        raise ValueError(_message(error, jinja2)) from error
    text, spans, start = "", [], 0
    for piece in re.split(f"({re.escape(begin)}|{re.escape(end)})", "".join(pieces)):
        if piece == begin:
            start = len(text)
        elif piece == end:
            spans.append((start, len(text)))
        else:
            text += piece
    return Rendered(text, tuple(spans))


def answer_spans(
    render: Callable[..., Rendered], messages: Messages, last: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and (start, end) in characters of each answer in it.

    An answer is what the assistant is to generate: from where a rendering of the messages before it
    ends, generation prompt included, to where one of those through it ends, with whatever the
    template ends a turn. ``{% generation %}`` blocks win, if there is one for each answer.

    Args:
        render: ``render(messages, add_generation_prompt) -> Rendered``.
        last: the last answer alone.

    ValueError if there is no answer, or a rendering of the beginning is not the beginning of the
    whole, so that it is unknown where answers stand.
    """
    whole = render(messages, False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no message of the assistant")
    if len(whole.spans) == len(turns):
        return whole.text, [*whole.spans][-1 if last else 0 :]
    spans = []
    for turn in turns[-1 if last else 0 :]:
        before = render(messages[:turn], True).text
        through = whole.text
        if turn + 1 < len(messages):
            through = render(messages[: turn + 1], False).text
        for start, end in ((before, through), (through, whole.text)):
            if not end.startswith(start):
                at = next((i for i, (a, b) in enumerate(zip(start, end)) if a != b), len(end))
                raise ValueError(
                    "the chat template does not render the beginning of a conversation as the "
                    f"beginning of the whole, up to message {turn}: it has {start[at:][:30]!r} "
                    f"where the longer one has {end[at:][:30]!r}, at character {at}. So it is "
                    "unknown where answers stand; take data.loss_on=last, or a template that "
                    "marks answers by {% generation %} and {% endgeneration %}"
                )
        spans.append((len(before), len(through)))
    return whole.text, spans


class _Refused(Exception):
    """``raise_exception`` of a template."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _message(error: Exception, jinja2: Any) -> str:
    if isinstance(error, _Refused):
        return f"the chat template refuses these messages: {error}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == _FILE]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    place = f" in line {line}" if line else ""
    if isinstance(error, jinja2.exceptions.SecurityError):
        return f"the chat template does what the sandbox forbids{place}: {error}"
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return f"the chat template is not valid jinja2{place}: {error}"
    return f"the chat template fails{place}: {type(error).__name__}: {error}"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as plain JSON values, through which no template reaches an object of Python."""
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"messages and variables of a chat template must be JSON values ({error}); tools are "
            "given by their JSON schemas"
        ) from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own filter would write ``<`` as an escape."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _environment() -> Any:
    """jinja2's immutable sandbox with what templates of transformers use."""
    jinja2 = _import_jinja2()
    from jinja2 import ext, sandbox

    class Generation(ext.Extension):
        """``{% generation %} ... {% endgeneration %}`` around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  as in the base

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = self.call_method("_mark", [jinja2.nodes.Name("_mdm_jax_mark", "load")])
            return jinja2.nodes.CallBlock(mark, [], [], body).set_lineno(line)

        def _mark(self, mark: Any, caller: Any) -> str:
            return mark(caller())

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """Refuses private attributes at once, and products that would fill the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            kind = type(obj).__name__
            raise jinja2.exceptions.SecurityError(f"attribute {attribute!r} of a {kind} is unsafe")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
                large = sizes != [left, right] and sizes[0] * sizes[1] > MOST_CHARACTERS
            else:
                large = any(abs(x) > 1000 for x in (left, right))
            if large:
                raise jinja2.exceptions.SecurityError(f"a large result of {operator}")
            return super().call_binop(context, operator, left, right)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.filters["tojson"] = _to_json
    return made


def _import_jinja2() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise missing_package("a chat template", "hub", error) from error
    return jinja2
