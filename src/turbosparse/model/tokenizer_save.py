"""A tokenizer as the files that transformers loads: the way back from GGUF to a Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, processors

from turbosparse.model.segmenters import Segmenter, SentencePieceBPE
from turbosparse.model.vocabulary import SPACE


def save_pipeline(
    folder: Path, segmenter: Segmenter, texts: dict[str, str], bos: tuple[str, int] | None, chat_template: str | None
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

    Args:
        folder: exists.
        segmenter: the tokenizer.
        texts: {"bos_token": "<s>", ...}.
        bos: text and id of the token that is put in front of every text, or None.
        chat_template: Jinja source.
    """
    pipeline = Pipeline.from_str(segmenter.pipeline.to_str())  # ours stays as it is
    sentencepiece = isinstance(segmenter, SentencePieceBPE)
    if sentencepiece:
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if segmenter.space_prefix:
            parts.append(decoders.Strip(" ", 1, 0))
        pipeline.decoder = decoders.Sequence(parts)
    else:
        pipeline.decoder = decoders.ByteLevel()
    if bos is not None:
        pipeline.post_processor = processors.TemplateProcessing(
            single=[bos[0], "$A"], pair=[bos[0], "$A", "$B"], special_tokens=[bos]
        )
    elif not sentencepiece:
        pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bos is not None,
        **texts,
    }
    _write(folder / "tokenizer.json", pipeline.to_str(pretty=True))
    _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    if chat_template is not None:
        _write(folder / "chat_template.jinja", chat_template)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
