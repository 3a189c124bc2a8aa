"""The tokenizers of the real models give the ids of llama.cpp and of transformers."""

import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizer_files import CORPUS, OWN, SPECIALS, write_gguf
from transformers import AutoTokenizer

from turbosparse.model.gguf import GGUFFile
from turbosparse.model.tokenizer import Tokenizer as OurTokenizer
from turbosparse.model.tokenizer import tokenizer_metadata

REAL = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen": "qwen2.5-coder-0.5b-instruct.gguf",
    "gemma": "gemma-3-270m-q4_k_m.gguf",
}


@pytest.fixture(scope="module", params=REAL)
def real(request):
    folder = os.environ.get("TURBOSPARSE_TEST_MODELS")
    if not folder:
        pytest.skip("TURBOSPARSE_TEST_MODELS does not name the folder of the real models")
    path = Path(folder) / REAL[request.param]
    if not path.is_file():
        pytest.skip(f"{path.name} is not in TURBOSPARSE_TEST_MODELS")
    return path


def _random_texts():
    generator = random.Random(0)
    alphabet = "abcXYZ 019 \n\t.,'!?<>|_éßÅ日😀\u200d▁\u00a0½²"
    texts = [*CORPUS[:4], *SPECIALS, *OWN, "<eos>a", " " * 100 + "x", "\n" * 40, "a" * 300, "<0x0A>", ""]
    texts += ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(800)]
    for _ in range(300):
        ranges = [(0x20, 0x2FF), (0x370, 0x2FFF), (0x3000, 0xD7FF), (0x1F300, 0x1FAFF)]
        texts.append("".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(20)))
    # llama.cpp does not normalise, Qwen's own tokenizer does: in normal form both must agree.
    return [unicodedata.normalize("NFC", text) for text in texts]


@pytest.mark.models
def test_ids_equal_llama_cpp(real):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra bench)")
    peer = llama_cpp.Llama(str(real), vocab_only=True, verbose=False)
    ours = OurTokenizer.from_gguf(GGUFFile.open(real))
    for text in _random_texts():
        for special in (False, True):
            expected = peer.tokenize(text.encode(), add_bos=False, special=special)
            assert ours.encode(text, add_bos=False, parse_special=special) == expected, text


@pytest.mark.models
def test_a_real_tokenizer_goes_to_a_folder_and_back(real, tmp_path):
    ours = OurTokenizer.from_gguf(GGUFFile.open(real))
    ours.save_hf(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": ours.vocab_size}))
    metadata = tokenizer_metadata(tmp_path)
    again = OurTokenizer.from_gguf(GGUFFile.open(write_gguf(tmp_path / "a.gguf", metadata)))
    assert (again.eos_ids, again.bos_id, again.add_bos) == (ours.eos_ids, ours.bos_id, ours.add_bos)
    for text in _random_texts():
        ids = ours.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True) == ids == hf.encode(text)
