"""A GGUF file as llama.cpp runs it: its tokenizer, its logits, greedy text, its chat template, its stop tokens.

Source: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h through llama-cpp-python's ctypes.
"""

import ctypes
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from steps.frame.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH = 512
_LEVELS = {3: logging.WARNING, 4: logging.ERROR}
"""`enum ggml_log_level`; the lower levels tell of every buffer."""


class GgufModel:
    """An open GGUF file with one context; a context manager, because its memory is not Python's.

    Args:
        path: the file.
        context: most tokens in one sequence, prompt and answer together.
        threads: cores to use; llama.cpp's own choice when None.

    Raises:
        UserError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, *, context: int = 2048, threads: int | None = None) -> None:
        import llama_cpp

        start_backend()
        self._api: Any = llama_cpp
        self._model: Any = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load this file; it is damaged or of an unknown architecture")
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        """Number of tokens, the width of the logits."""
        self.context = context
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = min(_BATCH, context)
        if threads:
            params.n_threads = params.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"{path}: llama.cpp cannot make a context of {context} tokens; is there memory for it?")
        self._batch: Any = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._chunk: int = params.n_batch

    def __enter__(self) -> "GgufModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context; safe to call twice."""
        if self._model:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)
            self._model = self._context = None

    @property
    def template(self) -> str | None:
        """The chat template's text, as it stands in the file."""
        text = self._api.llama_model_chat_template(self._model, None)
        return None if text is None else text.decode()

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors in the file over their number of elements."""
        return 8 * self._api.llama_model_size(self._model) / self._api.llama_model_n_params(self._model)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens at which llama.cpp ends an answer: the file's own, and those it knows by their text."""
        is_end = self._api.llama_vocab_is_eog
        return frozenset(token for token in range(self.vocabulary) if is_end(self._vocab, token))

    def tokenize(self, text: str) -> list[int]:
        """Tokenise a templated text: special tokens in it are read as such, none is added."""
        raw = text.encode()
        size = len(raw) + 8
        tokens = (self._api.llama_token * size)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), tokens, size, False, True)
        if count < 0:
            raise RuntimeError(f"llama.cpp needs {-count} tokens for a text of {len(raw)} bytes")
        return list(tokens[:count])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens are left out, broken UTF-8 is replaced."""
        tokens = (self._api.llama_token * len(ids))(*ids)
        size = 16 * len(ids) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._api.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, False, False)
            if count >= 0:
                return buffer.raw[:count].decode(errors="replace")
            size = -count

    def logits(self, ids: Sequence[int], start: int = 0) -> "NDArray[np.float32]":
        """Return the logits after each token from `start` on, shape (len(ids) - start, vocabulary), float32.

        Raises:
            ValueError: the sequence is longer than the context.
        """
        import numpy as np

        self._forget()
        parts = [
            self._decode(ids[at : at + self._chunk], at, first=max(0, start - at))
            for at in range(0, len(ids), self._chunk)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.vocabulary), np.float32)

    def generate(self, ids: Sequence[int], max_tokens: int, stops: Collection[int] = ()) -> list[int]:
        """Continue a prompt greedily until a stop token, which is left out, or `max_tokens` or a full context.

        Args:
            ids: the prompt.
            max_tokens: longest answer.
            stops: tokens that end it; without any, those at which llama.cpp itself would end it.
        """
        answer: list[int] = []
        if not ids or max_tokens < 1:
            return answer
        row = self.logits(ids, start=len(ids) - 1)
        while True:
            token = int(row[-1].argmax())
            if token in stops if stops else self._api.llama_vocab_is_eog(self._vocab, token):
                return answer
            answer.append(token)
            if len(answer) == max_tokens or len(ids) + len(answer) >= self.context:
                return answer
            row = self._decode([token], len(ids) + len(answer) - 1, first=0)

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], position: int, first: int) -> "NDArray[np.float32]":
        """Feed tokens that begin at `position`; return a copy of the logits from the `first` of them on."""
        import numpy as np

        if position + len(ids) > self.context:
            raise ValueError(f"{position + len(ids)} tokens do not fit into a context of {self.context}")
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= first
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        rows = max(0, len(ids) - first)
        if rows == 0:
            return np.empty((0, self.vocabulary), np.float32)
        values = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, (rows, self.vocabulary)).copy()


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect every piece of text that llama.cpp logs meanwhile, at any level; join them to read whole lines."""
    start_backend()
    pieces: list[str] = []
    _captures.append(pieces)
    try:
        yield pieces
    finally:
        _captures.remove(pieces)


@cache
def start_backend() -> None:
    """Start llama.cpp once in this process, its warnings and errors going to the logger `posttrain.llama_cpp`."""
    import llama_cpp

    log = logging.getLogger("posttrain.llama_cpp")

    @llama_cpp.llama_log_callback
    def forward(level: int, raw: bytes, _data: Any) -> None:
        text = raw.decode(errors="replace")
        for pieces in _captures:
            pieces.append(text)
        if level in _LEVELS and text.strip():
            log.log(_LEVELS[level], text.strip())

    _callbacks.append(forward)
    llama_cpp.llama_log_set(forward, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


_captures: list[list[str]] = []

# llama.cpp holds a bare pointer to the callback: Python must never collect it.
_callbacks: list[Any] = []
