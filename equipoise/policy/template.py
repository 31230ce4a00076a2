"""The begun answer, as the model's own chat template writes it."""

import datetime
import re
from collections.abc import Container
from typing import Any, NamedTuple

from equipoise.errors import UserError

DATE = datetime.date(2024, 7, 26)
"""What templates that write today's date are given instead, on every day: the one that Llama 3's template names where
it cannot ask. Else the same command would give other sentences tomorrow."""

_FORMS = tuple(f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ")
"""Those that any template may build; others, with flags of the C library, are looked for in its text."""
_FORM = re.compile(r"%[-_0^#]?[EO]?[A-Za-z]")
_MACRO = "{% macro strftime_now(format) %}"
_PRINTED = re.compile(r"""['"]type['"]: ?['"]text['"]""")
_MARK = "CONTINUE_FINAL_MESSAGE_TAG"  # transformers writes it behind the answer's beginning, and cuts the text there


def asks_for_date(template: str) -> bool:
    """Whether a chat template may write the day on which it is used."""
    return "strftime_now" in template


def with_fixed_date(template: str) -> str:
    """The template with `DATE` for today; as it is where it does not ask, or has been given it before."""
    return template if not asks_for_date(template) or template.startswith(_MACRO) else _fixed_date(template) + template


def _fixed_date(template: str) -> str:
    """A macro that hides the function of its name, with the same parameter. Jinja takes off the line break at the end,
    and the template begins at the beginning of a line as before."""
    forms = dict.fromkeys((*_FORMS, *_FORM.findall(template)))
    table = ", ".join(f"('{form}', '{_written(form)}')" for form in forms)
    each = (
        "{% for part in format.split('%%') %}{% set ns = namespace(text=part) %}"
        f"{{% for form, text in [{table}] %}}{{% set ns.text = ns.text | replace(form, text) %}}{{% endfor %}}"
        "{% if not loop.first %}%{% endif %}{{ ns.text }}{% endfor %}"
    )
    return f"{_MACRO}{each}{{% endmacro %}}\n"


def _written(form: str) -> str:
    """`DATE`, at midnight, in one form, as it is written between quotes in a template."""
    if form.endswith("s"):  # seconds since 1970: of UTC, as the C library would take the machine's own time zone
        return str(round(datetime.datetime.combine(DATE, datetime.time(), datetime.UTC).timestamp()))
    return DATE.strftime(form).replace("\n", "\\n").replace("\t", "\\t")


_PARTS = ((), ("system", "user", "assistant"), ("user",), ("system", "user"))
"""Of which roles the message is a list of parts, in the order in which that is tried."""


class Begun(NamedTuple):
    text: str
    turns: list[dict[str, Any]]
    """The messages that the template made the text of."""


def begun_turn(tokenizer: Any, user: str, begun: str, system: str) -> Begun:
    """A system and a user turn, and an assistant turn that `begun` begins, up to its last character.

    The system message is empty rather than absent: where it is absent many templates put their own, and SmolLM2's
    contains one of the terms the reward pays for. A template without a system role gets none. Messages are strings, or
    lists of parts for templates that read nothing else. Raises UserError where the text would lack the instruction, a
    system message that is not empty, or `begun` at its end.
    """
    template = tokenizer.get_chat_template()
    tried = [(has_system, parts) for parts in _PARTS for has_system in (True, False)]
    first, dropped = "", False
    for has_system, parts in tried:
        given = system if has_system else ""
        turns = turns_of(user, begun, given if has_system else None, parts)
        text, problem = _render(tokenizer, template, turns)
        problem = problem or _lacking(text, user, begun, given)
        if parts and _PRINTED.search(text):  # a template of strings, which prints whatever it is given
            problem = problem or "it writes lists as Python does"
        if not problem and given == system:
            return Begun(text, turns)
        dropped = dropped or not problem
        first = first or problem
    if dropped:
        raise UserError(
            f"the model's chat template has no place for a system message, so {system[:60]!r} would be dropped: "
            "leave out --system, or write it into an instruction of your own with --prompt NAME=INSTRUCTION"
        )
    raise UserError(f"the model's chat template cannot begin the answer: {first}; use --prompt raw, or another model")


def turns_of(user: str, begun: str, system: str | None, parts: Container[str] = ()) -> list[dict[str, Any]]:
    """The messages; `parts` has the roles of which the template reads lists."""
    contents = [("user", user), ("assistant", begun)]
    if system is not None:
        contents.insert(0, ("system", system))
    return [{"role": role, "content": [{"type": "text", "text": x}] if role in parts else x} for role, x in contents]


def _render(tokenizer: Any, template: str, turns: list[dict[str, Any]]) -> tuple[str, str]:
    """The rendered text, and what went wrong if anything did."""
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=with_fixed_date(template), tokenize=False, continue_final_message=True
        )
    except Exception as error:  # a template is a program of its own, and fails in any way
        if "continue_final_message" not in str(error):
            return "", _said(error)
        try:  # transformers looks for the message before the template has had its say
            tokenizer.apply_chat_template(turns, chat_template=with_fixed_date(template), tokenize=False)
        except Exception as own:
            return "", _said(own)
        return "", "it leaves out what the answer begins with"
    return str(text), "it writes the answer's beginning twice" if _MARK in text else ""


def _said(error: Exception) -> str:
    return f"it says {(str(error).strip() or type(error).__name__).splitlines()[0][:160]!r}"


def _lacking(text: str, user: str, begun: str, system: str) -> str:
    """What is not in the rendered text that must be; empty if all is."""
    if not text.endswith(begun):
        return f"the text does not end with {begun!r}"
    before = text.removesuffix(begun)
    if user.strip() not in before:
        return "the text does not hold the instruction"
    if system.strip() not in before.replace(user.strip(), "", 1):
        return "the text does not hold the system message"
    return ""
