"""Tokenizers of every kind that is read, trained on a few lines, as Hugging Face folders and as GGUF metadata."""

from __future__ import annotations

import json

from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from turbosparse.model.export_metadata import write_tokenizer
from turbosparse.model.pretokenizers import PRE_TOKENIZERS
from turbosparse.model.vocabulary import Vocabulary, merges_from_scores

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 times 3.14159 quicker than I'LL ever be!",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n# über façade naïve coöperate",
    "日本語のテキスト と 한국어 텍스트, emoji 😀😀 👩‍👩‍👧 and   runs   of    spaces\t\ttabs\r\n\r\n",
    "hello hello world world foo_bar foo_bar fooBar FooBar HTTPServer 2024 2025 1999 ½ ²",
] * 5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<unk>"]
OWN = ["<tool_call>", "\n\n\n"]


def _add_tokens(tokenizer):
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in OWN])


def byte_level(name):
    entry = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=entry.ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.normalizer = entry.build(), entry.normalizer()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    _add_tokens(tokenizer)
    return tokenizer


def sentencepiece(prefix, complete):
    """`complete`: every cut of a token into two others is a merge, as in SentencePiece; else what training saw."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS))
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token not in SPECIALS]
    merges = [tuple(merge) for merge in model["merges"]]
    if complete:
        rank = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
        scores = [-float(rank.get(token, len(merges))) for token in tokens]
        merges = merges_from_scores(
            Vocabulary("", "llama", tokens, [1] * len(tokens), scores, []), set(rank) | set(tokens)
        )
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    if not prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    _add_tokens(tokenizer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


KINDS = {
    **{name: (byte_level, (name,)) for name in ("smollm", "gpt-2", "qwen2", "llama-bpe", "tekken")},
    "mistral": (sentencepiece, (True, True)),
    "gemma": (sentencepiece, (False, True)),
    "some merges": (sentencepiece, (False, False)),
}


def save_folder(tokenizer, folder, **options):
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|im_end|>", unk_token="<unk>", **options
    )
    hf.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size() + 3}))
    return hf


def write_gguf(path, metadata):
    """Only metadata, as the export writes it; there are no empty arrays in GGUF."""
    writer = GGUFWriter(path, "llama")
    write_tokenizer(writer, {key: value for key, value in metadata.items() if value != []})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
