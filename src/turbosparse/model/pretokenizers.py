"""How byte-level BPE models cut text into words before merging: one entry per GGUF name of `tokenizer.ggml.pre`.

A name fixes the cuts (the regular expression that the model was trained with), the Unicode normalisation, whether a
word that is a token as a whole skips the merges, and whether a text starts with BOS when the file does not say. The
table reads both ways: a name from a GGUF file gives a pre-tokenizer, and a tokenizer.json gives a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

# One step of a pre-tokenizer: ("split", regular expression), ("digits", "one") or ("words", "") for GPT-2's words.
Step = tuple[str, str]

_GPT2: Step = ("words", "")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CASELESS_SUFFIXES + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_LLAMA3 = _CASELESS_SUFFIXES + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES
)


@dataclass(frozen=True)
class PreTokenizer:
    """The cuts of one `tokenizer.ggml.pre` name.

    Attributes:
        steps: applied in order, each to the pieces of the one before.
        nfc: the text is brought to Unicode normal form C first, as the original tokenizer of the name does.
        ignore_merges: a word that is a token as a whole is taken without merging.
        add_bos: what holds when the file has no `tokenizer.ggml.add_bos_token`.
    """

    steps: tuple[Step, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The steps, followed by the mapping of bytes to printable characters."""
        parts: list[pre_tokenizers.PreTokenizer] = []
        for kind, pattern in self.steps:
            if kind == "split":
                parts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
            elif kind == "digits":
                parts.append(pre_tokenizers.Digits(individual_digits=True))
        words = _GPT2 in self.steps
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
        return pre_tokenizers.Sequence(parts)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


# The first name of equal entries is the one that is written.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "smollm": PreTokenizer((("digits", "one"), _GPT2)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "qwen2": PreTokenizer((("split", _QWEN2),), nfc=True),
    "llama-bpe": PreTokenizer((("split", _LLAMA3),), ignore_merges=True, add_bos=True),
    "tekken": PreTokenizer((("split", _TEKKEN),), ignore_merges=True, add_bos=True),
    # llama.cpp's own cuts, for files whose name it does not know or that were written before there were names.
    "default": PreTokenizer(
        (
            ("split", r"[\p{P}\$\+<=>\^~\|]+"),
            ("split", _GPT2_WORDS),
            ("split", r"\p{N}+"),
            ("split", r"[0-9][0-9][0-9]"),
        )
    ),
}
_RELATIVES = {
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": ("gpt2", "phi-2", "olmo", "mpt", "jais", "gigachat"),
    "qwen2": ("deepseek-r1-qwen",),
    "llama-bpe": ("llama3", "llama-v3", "falcon3"),
}
PRE_TOKENIZERS |= {alias: PRE_TOKENIZERS[name] for name, aliases in _RELATIVES.items() for alias in aliases}


def detect(spec: dict[str, Any]) -> str | None:
    """The `tokenizer.ggml.pre` name of a tokenizer.json, or None where no name cuts text as it does."""
    steps = _steps(spec.get("pre_tokenizer"))
    normalizer = flat_parts(spec.get("normalizer"), "normalizers")
    if steps is None or normalizer not in ([], [{"type": "NFC"}]):
        return None
    nfc = bool(normalizer)
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    for name, entry in PRE_TOKENIZERS.items():
        if (entry.steps, entry.nfc, entry.ignore_merges) == (steps, nfc, ignore_merges):
            return name
    return None


def flat_parts(part: Any, key: str) -> list[dict[str, Any]]:
    """The leaves of a normalizer, pre-tokenizer or post-processor of tokenizer.json, in order; [] for null.

    `key` is where a Sequence keeps its parts.
    """
    leaves, waiting = [], [part]  # not recursive: a file may nest as deep as it likes
    while waiting:
        item = waiting.pop()
        if not isinstance(item, dict):
            continue
        inner = item.get(key)
        if item.get("type") == "Sequence" and isinstance(inner, list):
            waiting += reversed(inner)
        else:
            leaves.append(item)
    return leaves


def _steps(pre_tokenizer: Any) -> tuple[Step, ...] | None:
    """The steps of a pre_tokenizer of tokenizer.json; None where it is not ours to express."""
    *parts, last = flat_parts(pre_tokenizer, "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    steps: list[Step] = []
    for part in parts:
        if part.get("type") == "Digits" and part.get("individual_digits"):
            steps.append(("digits", "one"))
        elif part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            pattern = part.get("pattern")
            steps.append(("split", str(pattern.get("Regex")) if isinstance(pattern, dict) else ""))
        else:
            return None
    if last.get("use_regex", True):
        steps.append(_GPT2)
    return tuple(steps)
