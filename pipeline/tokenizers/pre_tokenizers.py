"""How byte-level vocabularies cut text into words before merging, by the name that GGUF files give the way.

The names are llama.cpp's (`tokenizer.ggml.pre`, src/llama-vocab.cpp); the patterns are those of the models' own
tokenizer.json files. A wrong way gives ids that look right and aren't, so an unknown name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

DIGIT_BY_DIGIT = "digits"  # a step that isolates every digit

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(letters: str, digits: str, *, other: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*", spaces: str = _SPACES) -> str:
    """Return a pattern of the kind that began with GPT-4's cl100k_base."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{other}|{spaces}"


def _o200k(ending: str, digits: str) -> str:
    """Return a pattern of the kind of GPT-4o's o200k_base: a word is capitals, then small letters."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{ending}|{lead}{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3 = _cl100k(r"\p{L}+", r"\p{N}{1,3}")
_QWEN2 = _cl100k(r"\p{L}+", r"\p{N}")
_QWEN35 = _cl100k(r"[\p{L}\p{M}]+", r"\p{N}", other=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌ"
    "ῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲"
    "𑢠-𑣟𞤀-𞥃"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """Split by each pattern in turn, then spell bytes in GPT-2's alphabet.

    `whole_words`: a word that is in the vocabulary is one token, whatever the merges say. `adds_bos`: a beginning-of-
    text token is added where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == DIGIT_BY_DIGIT
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.patterns
        ]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _named(names: str, pre_tokenizer: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre_tokenizer)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **_named(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling",
        PreTokenizer(patterns=(GPT2_PATTERN,)),
    ),
    **_named(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer(patterns=(DIGIT_BY_DIGIT, GPT2_PATTERN)),
    ),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer(patterns=(_LLAMA3,), whole_words=True, adds_bos=True),
    ),
    **_named("dbrx smaug-bpe chatglm-bpe glm4", PreTokenizer(patterns=(_LLAMA3,))),
    **_named(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer(patterns=(_QWEN2,)),
    ),
    **_named("qwen35", PreTokenizer(patterns=(_QWEN35,))),
    **_named("tekken", PreTokenizer(patterns=(_o200k("", r"\p{N}"),), whole_words=True, adds_bos=True)),
    **_named(
        "gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer(patterns=(_o200k(f"{_CONTRACTION}?", r"\p{N}{1,3}"),))
    ),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(patterns=_DEEPSEEK3)),
    **_named(
        "deepseek-llm",
        PreTokenizer(
            patterns=(
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"(?<!\s)\s+$",  # published as \s+$, which takes time in the square of a run of spaces
                _CJK,
                r"\p{N}+",
            )
        ),
    ),
    **_named("deepseek-coder", PreTokenizer(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))),
    **_named("falcon", PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, r"[0-9][0-9][0-9]"))),
    **_named("default", PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    **_named("bloom poro-chat gpt3-finnish", PreTokenizer(patterns=(_BLOOM,))),
    **_named("viking", PreTokenizer(patterns=(_BLOOM, r"\p{N}"))),
    **_named(
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer(patterns=(_cl100k(r"\p{L}+", r"\p{N}", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),)),
    ),
    **_named("seed-coder", PreTokenizer(patterns=(_cl100k(r"\p{L}+", r"\p{N}", other=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    **_named("minicpm5", PreTokenizer(patterns=(r"\p{N}{1,3}", _cl100k(r"\p{L}+", r"\p{N}+")), whole_words=True)),
    **_named("laguna", PreTokenizer(patterns=(r"[^\n]+|[\n]+", _QWEN2))),
    **_named(
        "exaone-moe",
        PreTokenizer(
            patterns=(
                _cl100k(
                    r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r"\p{N}",
                    other=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    spaces=r"\s*[\r\n]|\s+(?!\S)|\s+",
                ),
            )
        ),
    ),
}
