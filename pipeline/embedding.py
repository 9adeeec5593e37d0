"""How a text becomes a vector, as plain data: what job files, index.json and engines agree on.

text -> the model's prompt before it -> (echo: said twice) -> token ids, and from which of them on states are pooled
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from pipeline.control_strings import ControlStrings
from pipeline.errors import RowError
from pipeline.prompts import Prompt
from pipeline.tokenizer import Tokenizer

Pooling = Literal["mean", "last", "weighted_mean"]
POOLINGS: Final[tuple[Pooling, ...]] = ("mean", "last", "weighted_mean")

# Springer et al. 2024 (arXiv 2402.15449), section 3.1. The second occurrence begins on a line of its own, so that no
# token lies across its beginning.
ECHO_BEFORE: Final = "Rewrite the following paragraph: "
ECHO_BETWEEN: Final = "\nThe rewritten paragraph:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorForm:
    """What becomes of a text's hidden states. Raises ValueError naming the field that is wrong.

    The pooled states, cut to their first `dimensions` (None: all), have unit length. With a `routing_weight` a above 0
    the router's softmax over experts r, layer by layer and pooled as they are, follows, [h/|h| ; sqrt(a) r/|r|], with
    unit length again, so that inner products are (cos(h) + a cos(r)) / (1 + a) (MoEE, arXiv 2410.10814).
    """

    pooling: str = "mean"
    dimensions: int | None = None
    routing_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, got {self.dimensions}")
        if not 0 <= self.routing_weight < float("inf"):
            raise ValueError(f"routing_weight must be at least 0 and finite, got {self.routing_weight}")

    def width(self, hidden_width: int, router_width: int) -> int:
        """Of a vector, by a model of these widths. ValueError where the model has no such vector."""
        if self.dimensions is not None and self.dimensions > hidden_width:
            raise ValueError(f"dimensions: {self.dimensions}, and the model's hidden states have {hidden_width}")
        if self.routing_weight and not router_width:
            raise ValueError(f"routing_weight: {self.routing_weight}, and the model has no experts; leave it at 0.0")
        return (self.dimensions or hidden_width) + (router_width if self.routing_weight else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextForm:
    """How a text is put before the model: after `prompt`, whose tokens are pooled if `include_prompt`; twice if `echo`.

    With `echo` only the second occurrence is pooled, of prompt and text or of the text.
    """

    prompt: str = ""
    include_prompt: bool = True
    echo: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddedText:
    """A text's token ids. Those before `pooled_from` are read and not pooled."""

    ids: list[int]
    pooled_from: int = 0


class TextEncoder:
    """Texts -> token ids, as `form` says. Control tokens' strings count in the form's own prompt, never in a text."""

    def __init__(self, tokenizer: Tokenizer, form: TextForm) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._prompt_parses = ControlStrings(tokenizer.control_strings).occur_in(form.prompt)
        self._plain = form == TextForm(include_prompt=form.include_prompt)
        self._prompt_tokens = 0 if form.include_prompt or not form.prompt else self._unpooled_prompt()

    def encode(self, prompts: Sequence[Prompt]) -> list[EmbeddedText | RowError]:
        """One for each, `ids` empty where a text has no tokens; the error that the tokenizer gave."""
        if self._plain:
            found = self._tokenizer.encode_batch(prompts)
            return [ids if isinstance(ids, RowError) else EmbeddedText(ids) for ids in found]
        if not self._form.echo:
            found = self._tokenizer.encode_batch([self._framed(prompt, "") for prompt in prompts])
            return [ids if isinstance(ids, RowError) else EmbeddedText(ids, self._prompt_tokens) for ids in found]
        heads = [self._framed(prompt, ECHO_BEFORE, ECHO_BETWEEN) for prompt in prompts]
        wholes = [self._twice(head, prompt) for head, prompt in zip(heads, prompts, strict=True)]
        both = self._tokenizer.encode_batch([*heads, *wholes])
        return [_echoed(head, whole) for head, whole in zip(both[: len(prompts)], both[len(prompts) :], strict=True)]

    def _framed(self, prompt: Prompt, before: str, after: str = "") -> Prompt:
        head = before + self._form.prompt
        return Prompt(
            head + prompt.text + after,
            prompt.add_special_tokens,
            prompt.parse_special or self._prompt_parses,
            () if prompt.parse_special else ((len(head), len(head) + len(prompt.text)),),
        )

    def _twice(self, head: Prompt, prompt: Prompt) -> Prompt:
        said = (self._form.prompt if self._form.include_prompt else "") + prompt.text
        end = len(head.text) + len(said)
        spans = () if prompt.parse_special else (*head.literal, (end - len(prompt.text), end))
        return replace(head, text=head.text + said, literal=spans)

    def _unpooled_prompt(self) -> int:
        """Its tokens as sentence-transformers counts them: the prompt's alone, without a special one at its end."""
        prompt = Prompt(self._form.prompt, add_special_tokens=True, parse_special=True)
        (ids,) = self._tokenizer.encode_batch([prompt])
        if isinstance(ids, RowError):
            return 0
        ends_specially = (
            ids and not self._tokenizer.decode(ids[-1:]) and self._tokenizer.decode(ids[-1:], skip_special_tokens=False)
        )
        return len(ids) - (1 if ends_specially else 0)


def _echoed(head: list[int] | RowError, whole: list[int] | RowError) -> EmbeddedText | RowError:
    """Pooled are the tokens that the first occurrence and what stands around it don't have in common with the whole."""
    if isinstance(head, RowError):
        return head
    if isinstance(whole, RowError):
        return whole
    common = 0
    while common < min(len(head), len(whole) - 1) and head[common] == whole[common]:
        common += 1
    return EmbeddedText(whole, common)


def form_settings(vector: VectorForm, text: TextForm, *, query_prompt: str, centered: bool) -> dict[str, Any]:
    """What index.json says of how its vectors were made besides the pooling: only what is not as it is by default."""
    values: dict[str, tuple[Any, Any]] = {
        "dimensions": (vector.dimensions, None),
        "routing_weight": (vector.routing_weight, 0.0),
        "passage_prompt": (text.prompt, ""),
        "query_prompt": (query_prompt, ""),
        "include_prompt": (text.include_prompt, True),
        "echo": ([ECHO_BEFORE, ECHO_BETWEEN] if text.echo else None, None),
        "centered": (centered, False),
    }
    return {key: value for key, (value, default) in values.items() if value != default}


def query_forms(pooling: str, settings: Mapping[str, Any]) -> tuple[VectorForm, TextForm]:
    """How a query is embedded for an index of this pooling and these `form_settings`. ValueError for another echo."""
    if settings.get("echo") not in (None, [ECHO_BEFORE, ECHO_BETWEEN]):
        raise ValueError("the index was made with other words around its echoes; embed the corpus anew")
    vector = VectorForm(
        pooling=pooling,
        dimensions=settings.get("dimensions"),
        routing_weight=settings.get("routing_weight", 0.0),
    )
    text = TextForm(
        prompt=settings.get("query_prompt", ""),
        include_prompt=settings.get("include_prompt", True),
        echo="echo" in settings,
    )
    return vector, text
