"""Chat templates, held against transformers. published/ has what checkpoints publish; odd/ has traps for frames."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RowError, UserError
from pipeline.templates.chat import ChatTemplate
from pipeline.templates.limits import TemplateLimits

TEMPLATES = {path.stem: path.read_text() for path in sorted(Path(__file__).parent.glob("*/*.jinja"))}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": " Be  terse. "}
EXAMPLE = [{"role": "user", "content": " one "}, {"role": "assistant", "content": "<think>hm</think>\n two "}]
BEFORE: dict[str, list[dict[str, str]]] = {
    "nothing": [],
    "system": [SYSTEM],
    "example": EXAMPLE,
    "all": [SYSTEM, *EXAMPLE],
}
PIECES = [
    " ",
    "\n",
    "a",
    "B",
    "é",
    "'",
    '"',
    "<",
    "\u00a0",
    "\u2028",
    "\ue000",
    "\U000f0000",
    "\\",
    "&amp;",
    "{{ x }}",
    "{%",
]
PIECES += ["</think>", "<|im_end|>", "<tool_response>", "</tool_response>", "secret"]
TEXTS = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))


def made(source: str, before: Sequence[dict[str, str]] = (), **limits: Any) -> ChatTemplate:
    return ChatTemplate(
        source,
        messages=before,
        special_tokens=SPECIAL_TOKENS,
        now=datetime.now(),
        limits=TemplateLimits(**limits),
    )


@functools.cache
def once_made(name: str, before: str) -> ChatTemplate:
    return made(TEMPLATES[name], BEFORE[before])


def reference(source: str, messages: list[dict[str, str]]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **SPECIAL_TOKENS
    )
    return str(rendered[0])


@pytest.mark.parametrize("before", list(BEFORE))
@pytest.mark.parametrize("name", list(TEMPLATES))
@settings(max_examples=15, deadline=None)
@given(text=TEXTS)
def test_prompts_are_those_of_transformers_byte_for_byte(name: str, before: str, text: str) -> None:
    messages, source = BEFORE[before], TEMPLATES[name]
    try:
        template = once_made(name, before)
    except UserError:
        with pytest.raises(Exception, match="System role not supported"):
            reference(source, [*messages, {"role": "user", "content": text}])
        return
    expected = reference(source, [*messages, {"role": "user", "content": text}])
    assert template.render(text) == expected
    if template.frame is not None and text.strip() and template.frame.fits(text):
        assert template.frame.around(text) == expected


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama_2", "llama_3", "llama_3_1", "macros", "qwen_3"])
def test_published_templates_have_a_frame_so_that_rows_need_no_rendering(name: str) -> None:
    assert made(TEMPLATES[name]).frame is not None


@pytest.mark.parametrize(
    "name",
    ["compared", "filtered", "iterated", "joined", "json", "length", "searched", "sliced", "tested", "twice", "upper"],
)
def test_a_template_that_looks_at_the_text_has_no_frame(name: str) -> None:
    assert made(TEMPLATES[name], BEFORE["example"]).frame is None


def test_a_template_that_asks_a_question_has_a_frame_for_one_answer() -> None:
    frame = made(
        "{% for m in messages %}{{ 'x' if '</think>' in m.content else 'y' }}{{ m.content }}{% endfor %}"
    ).frame
    assert frame is not None
    assert frame.fits("plain")
    assert not frame.fits("a </think> b")
    assert (
        made("{% for m in messages %}{{ m.content if 'a' not in m.content.strip() else '' }}{% endfor %}").frame is None
    )


def test_trimmed_text_is_trimmed_in_its_frame() -> None:
    frame = made(TEMPLATES["llama_3"]).frame
    assert frame is not None
    assert frame.around(" a\n").lstrip().startswith("<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>")


def test_the_date_is_the_jobs() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
        messages=[],
        special_tokens={},
        now=datetime(2001, 2, 3),
        limits=TemplateLimits(),
    )
    assert template.render("x") == "03 Feb 2001 x"


def test_a_refused_conversation_is_the_users_to_mend() -> None:
    with pytest.raises(
        UserError, match="chat template refuses this conversation: TemplateError: System role not supported"
    ):
        made(TEMPLATES["gemma"], [SYSTEM])


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages | nosuchfilter }}", "{% include 'x' %}", "{{ 1 +"])
def test_a_broken_template_is_the_users_to_mend(source: str) -> None:
    with pytest.raises(UserError, match="the model's chat template, line 1: "):
        made(source)


def test_a_template_that_refuses_one_text_costs_that_row() -> None:
    template = made(
        "{% if 'x' in messages[0].content %}{{ raise_exception('no x!') }}{% endif %}{{ messages[0].content }}"
    )
    assert template.render("abc") == "abc"
    assert template.render("xyz") == RowError("template_error", "TemplateError: no x!")


@pytest.mark.parametrize(
    "attack",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ messages[0].content * 10**10 }}",
    ],
)
def test_a_template_that_never_ends_is_refused(attack: str) -> None:
    with pytest.raises(UserError, match=r"the template (takes|makes) more than"):
        made(attack, max_steps=20_000)


def test_templates_do_not_get_out_of_the_sandbox() -> None:
    for attack in (
        "{{ ''.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context }}",
    ):
        with pytest.raises(UserError, match=r"unsafe|undefined|SecurityError"):
            made(attack + "{{ x.y.z }}")


def test_the_template_of_a_real_checkpoint_renders_as_transformers_does(tiny_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    template = ChatTemplate(
        tokenizer.chat_template,
        messages=BEFORE["all"],
        special_tokens=tokenizer.special_tokens_map,
        now=datetime.now(),
        limits=TemplateLimits(),
    )
    messages = [*BEFORE["all"], {"role": "user", "content": " What is é? "}]
    assert template.render(" What is é? ") == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
