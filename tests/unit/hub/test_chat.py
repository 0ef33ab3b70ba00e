"""Chat templates: what transformers' templates use works, what a sandbox forbids is refused."""

import datetime

import pytest

from mdm_jax.hub import chat

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yes."}]


def test_templates_use_what_transformers_gives_them():
    """Blocks are trimmed; loop controls, tojson without escapes, a clock, variables."""
    template = """
    {%- for m in messages %}
        {%- if m.role == 'system' %}{% continue %}{% endif %}
        {{- m | tojson }}
        {%- if loop.index == stop %}{% break %}{% endif %}
    {%- endfor %}
    {% if add_generation_prompt %}
{{ strftime_now('%d %B %Y') }} {{ tools[0].name }}{{ unknown }}
    {% endif %}
"""
    text = chat.render(
        template,
        [{"role": "system", "content": ""}, *MESSAGES, *MESSAGES],
        True,
        now=datetime.datetime(2025, 3, 2),
        tools=[{"name": "é"}],
        stop=3,
    )
    assert text == (
        '{"role": "user", "content": "Hi <b>"}{"role": "assistant", "content": "Yes."}'
        "02 March 2025 é\n"
    )


def test_tools_and_documents_are_none_unless_given():
    """As in transformers; what is undefined would not be none."""
    template = "{{ tools is none }}{{ documents is none }}{{ other is none }}"
    assert chat.render(template, MESSAGES) == "TrueTrueFalse"
    assert chat.render(template, MESSAGES, tools=[]) == "FalseTrueFalse"


def test_spans_are_what_the_assistant_says():
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    rendered = chat.render_spans(template, MESSAGES * 2)
    assert rendered.text == "[user]Hi <b>[assistant]Yes.!" * 2
    assert [rendered.text[slice(*span)] for span in rendered.spans] == ["Yes.!", "Yes.!"]
    assert chat.render_spans("a", MESSAGES).spans == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("\n\n{% if %}", "not valid jinja2 in line 3"),
        ("\n{{ 1 / 0 }}", "fails in line 2: ZeroDivisionError"),
        ("{{ messages[0].name.first }}", "fails in line 1: UndefinedError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "fails in line 1: TypeError: no loader"),
    ],
)
def test_a_template_that_fails_says_where(template, message):
    with pytest.raises(ValueError, match=message):
        chat.render(template, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ '' | attr('__class__') }}",
        "{{ ''['__class__'] }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ self.__init__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role=1) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * messages[0].content | length * 100000000 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}a{% endfor %}{% endfor %}",
    ],
)
def test_escapes_from_the_sandbox_are_refused(template, monkeypatch):
    monkeypatch.setattr(chat, "MOST_CHARACTERS", 10**5)
    with pytest.raises(ValueError, match="the sandbox forbids"):
        chat.render(template, MESSAGES)


def test_products_of_usual_size_are_allowed():
    assert chat.render("{{ '-' * 3 }}{{ 3 * 10 ** 9 }}{{ 2 ** 10 }}", MESSAGES) == (
        "---30000000001024"
    )


def test_a_template_sees_values_and_changes_none():
    class Secret:
        key = "secret"

    with pytest.raises(ValueError, match="must be JSON values"):
        chat.render("{{ tool.key }}", MESSAGES, tool=Secret())
    for messages in (["Hi"], [{"content": "Hi"}], [{"role": 1}]):
        with pytest.raises(ValueError, match="message 0 of a chat must be an object with a role"):
            chat.render("", messages)
