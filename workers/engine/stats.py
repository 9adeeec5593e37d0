"""What an engine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counts and seconds since the engine was made; the difference of two `as_dict` tells about the time between.

    A token is computed once where all goes well; `found_tokens` were taken from the cache instead of being computed.
    Seconds of the decoder (with the logits) are told apart by whether the step held any prompt tokens, so
    decode_tokens_alone / decode_s is the speed of decoding proper.
    """

    steps: int = 0
    requests: int = 0  # answered, with or without an error
    errors: int = 0  # of them with an error
    prefill_tokens: int = 0  # computed: prompts, and generated tokens again after a preemption
    decode_tokens: int = 0  # chosen by the sampler
    decode_tokens_alone: int = 0  # of them in steps without prompt tokens
    found_tokens: int = 0  # prompt positions found in the cache
    preemptions: int = 0
    schedule_s: float = 0.0
    prefill_s: float = 0.0  # decoder, steps that held prompt tokens
    decode_s: float = 0.0  # decoder, steps that did not
    sample_s: float = 0.0
    finish_s: float = 0.0  # stop conditions, text, answers

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
