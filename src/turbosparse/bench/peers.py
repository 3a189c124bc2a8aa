"""Other engines as contestants, each in a process of its own: one that crashes takes no figures of ours with it.

They run the dense twin, which is what their users run. They are fed a fixed token instead of sampling one, so that no
Python of ours is in their time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from turbosparse.bench.compare import Sample
from turbosparse.errors import UserError

PEERS = ("llama.cpp", "transformers")
_PATIENCE = 1800.0  # seconds for one pass; transformers decodes a large model at a token in seconds


class _Evaluator(Protocol):
    """What a peer can do: forget everything, then read tokens."""

    def reset(self) -> None: ...
    def read(self, tokens: Sequence[int]) -> None: ...


class _LlamaCpp:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=batch, verbose=False
        )

    def reset(self) -> None:
        self._llama.reset()

    def read(self, tokens: Sequence[int]) -> None:
        self._llama.eval(list(tokens))


class _Transformers:
    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        folder, name = os.path.split(os.path.abspath(path))
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16).eval()
        self._cache: Any = None

    def reset(self) -> None:
        self._cache = None

    def read(self, tokens: Sequence[int]) -> None:
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            self._cache = self._model(
                ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).past_key_values


_EVALUATORS: dict[str, Callable[[str, int, int, int], _Evaluator]] = {
    "llama.cpp": _LlamaCpp,
    "transformers": _Transformers,
}
_MODULES = {"llama.cpp": "llama_cpp", "transformers": "transformers"}


def _serve(connection: Any, peer: str, path: str, threads: int, context: int, batch: int) -> None:
    """The child: time the passes that it is sent, as (seconds to read, seconds to decode)."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # warnings of others would tear our progress bar
    evaluator = _EVALUATORS[peer](path, threads, context, batch)
    connection.send("ready")
    while True:
        try:
            prompt, decode_tokens = connection.recv()
        except EOFError:
            return
        evaluator.reset()
        started = time.perf_counter()
        evaluator.read(prompt)
        read = time.perf_counter()
        for _ in range(decode_tokens):
            evaluator.read(prompt[-1:])
        connection.send((read - started, time.perf_counter() - read))


class Peer:
    """Another engine on a dense GGUF file; a contestant of `compare`.

    Args:
        peer: one of `PEERS`.
        path: the file.
        threads: of the peer.
        context: tokens of the longest pass.

    Raises:
        UserError: the peer is not installed, cannot read the file, or crashes.
    """

    def __init__(self, peer: str, path: Path, threads: int, context: int) -> None:
        import importlib.util

        if importlib.util.find_spec(_MODULES[peer]) is None:
            extra = "bench" if peer == "llama.cpp" else "train"
            raise UserError(f"--against {peer} needs a package: pip install 'turbosparse[{extra}]'.")
        self._peer, self._arguments = peer, (str(path), threads, context)
        # Some builds of llama.cpp crash in their batched kernels: those are fed token by token.
        batches = (512, 1) if peer == "llama.cpp" else (512,)
        works = next((batch for batch in batches if self._start(batch) and self._answers([1] * min(context, 64))), None)
        if works is None:
            raise UserError(f"{peer} cannot run {path}; leave out --against {peer}, or give another --dense-twin.")
        self.batched = works > 1

    @property
    def mode(self) -> str:
        return self._peer

    def measure(self, prompt: Sequence[int], decode_tokens: int) -> Sample:
        if not self._connection.poll(0) and self._send(prompt, decode_tokens) and self._connection.poll(_PATIENCE):
            try:
                read, decode = self._connection.recv()
            except EOFError:
                pass
            else:
                return Sample(len(prompt), read, decode_tokens, decode)
        raise UserError(f"{self._peer} stopped in the middle of a pass; run again without --against {self._peer}.")

    def close(self) -> None:
        """End the child."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _start(self, batch: int) -> bool:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._peer, *self._arguments, batch)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        return self._received()

    def _received(self) -> bool:
        try:
            return self._connection.poll(_PATIENCE) and self._connection.recv() is not None
        except EOFError:
            return False

    def _send(self, prompt: Sequence[int], decode_tokens: int) -> bool:
        try:
            self._connection.send((list(prompt), decode_tokens))
        except OSError:
            return False
        return True

    def _answers(self, prompt: Sequence[int]) -> bool:
        return self._send(prompt, 1) and self._received()
