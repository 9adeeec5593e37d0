"""What a tokenizer says of itself, whichever library it runs in."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.tokenizers.added_tokens import AddedTokens
from pipeline.tokenizers.checkpoint import CheckpointFacts


class DescribedTokenizer:
    """The part of a `pipeline.tokenizer.Tokenizer` that a checkpoint's files and added tokens settle."""

    _facts: CheckpointFacts
    _added: AddedTokens

    @property
    def bos_id(self) -> int | None:
        return self._facts.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._facts.eos_ids

    @property
    def chat_template(self) -> str | None:
        return self._facts.chat_template

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self._facts.special_tokens

    @property
    def control_strings(self) -> frozenset[str]:
        return self._added.control_strings

    @property
    def digest(self) -> str:
        return self._facts.digest
