"""Texts to vectors: MiniLM in ONNX on this machine, or any endpoint that speaks /v1/embeddings.

Imports numpy, onnxruntime and tokenizers only when vectors are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .errors import AuthenticationError, ConfigurationError, ServiceError
from .index import Embedder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: What MiniLM was trained to read; a longer text is cut, in its vector alone.
MAX_TOKENS = 256
#: Names the folder of an ONNX embedder; next to the index it is called `embedder`.
FOLDER_VARIABLE = "PHI3_EMBEDDER"
_BATCH = 32
_TRIES = 5


class OnnxEmbedder:
    """A sentence-transformers model exported to ONNX: model.onnx and tokenizer.json in a folder.

    Mean of the last hidden states over the text's tokens, scaled to length 1, as MiniLM was
    trained. Raises ConfigurationError when a package or a file is missing.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigurationError(
                f"Vectors need the package {error.name}; install it with: "
                "pip install onnxruntime tokenizers numpy"
            ) from None
        model, tokenizer = folder / "model.onnx", folder / "tokenizer.json"
        for file in (model, tokenizer):
            if not file.is_file():
                raise ConfigurationError(
                    f"{folder} is no embedder: {file.name} is missing. It needs the files of a "
                    "sentence-transformers model in ONNX form: model.onnx and tokenizer.json"
                )
        # Both files: another tokenizer makes other vectors of the same weights.
        digest = hashlib.sha256(model.read_bytes() + tokenizer.read_bytes()).hexdigest()
        self.identity = f"onnx:{digest[:16]}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Between two questions of a chat, spinning threads would burn a neighbour's core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        # Truncation is a state of a tokenizer, so counting has one of its own.
        self._counter = Tokenizer.from_file(str(tokenizer))
        self._counter.no_truncation()
        self._counter.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()
        self.dimension = int(self._session.get_outputs()[0].shape[-1])

    def count(self, text: str) -> int:
        """Tokens of a text, without the two that the model puts around it."""
        return len(self._counter.encode(text, add_special_tokens=False).ids)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of shape (texts, dimension), each of length 1."""
        import numpy as np

        vectors = np.empty((len(texts), self.dimension), np.float32)
        # Texts of one length together: padding is computed as well.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            encoded = self._tokenizer.encode_batch([texts[number] for number in batch])
            mask = np.array([item.attention_mask for item in encoded], np.int64)
            given = {
                "input_ids": np.array([item.ids for item in encoded], np.int64),
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(mask),
            }
            wanted = {name: value for name, value in given.items() if name in self._inputs}
            states = self._session.run(None, wanted)[0]
            weights = mask[:, :, None].astype(np.float32)
            # The mean over the text's own tokens: padding must not count.
            means = (states * weights).sum(1) / np.maximum(weights.sum(1), 1)
            vectors[batch] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors


class EndpointEmbedder:
    """An endpoint that speaks OpenAI's embeddings: Azure OpenAI, Foundry, Ollama, vLLM.

    `POST {base}/embeddings` with {model, input}; answers are put in order by `data[].index`.
    Throttling (429) and 5xx are tried again, up to five times, after Retry-After where it is sent.
    """

    def __init__(self, base: str, model: str, key: str | None = None, dimension: int = 0) -> None:
        from .connection import Address, is_loopback
        from .transport import new_session

        self.base = re.sub(r"/(embeddings/?)?$", "", base)
        if not re.match(r"https?://", self.base):
            raise ConfigurationError(
                f"The embeddings endpoint {base!r} is not an address; "
                "expected something like https://HOST/v1"
            )
        loopback = is_loopback(urlsplit(self.base).hostname or "")
        if key and self.base.startswith("http://") and not loopback:
            raise ConfigurationError(f"The key would go over plain http to {self.base}; use https")
        self.model, self._key = model, key
        self.identity = f"endpoint:{model}"
        # Neither a netrc entry in place of the key, nor this machine through a proxy.
        self._session = new_session(Address(self.base, self.base, "openai", loopback))
        self.dimension = dimension or len(self._ask(["dimension"])[0])

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of shape (texts, dimension), each of length 1."""
        import numpy as np

        rows: list[Sequence[float]] = []
        for start in range(0, len(texts), _BATCH):
            rows += self._ask(texts[start : start + _BATCH])
        vectors = np.array(rows, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ServiceError(
                f"{self.base} sent vectors of another length than {self.dimension}: "
                f"is {self.model} still the same model?"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
        return unit

    def _ask(self, texts: Sequence[str]) -> list[Sequence[float]]:
        from .transport import request_with_retries, said_by

        # Azure OpenAI reads `api-key`, everybody else the bearer.
        headers = (
            {"Authorization": f"Bearer {self._key}", "api-key": self._key} if self._key else {}
        )
        answer = request_with_retries(
            self._session,
            "POST",
            f"{self.base}/embeddings",
            f"{self.base} gave no vectors",
            tries=_TRIES,
            json={"model": self.model, "input": list(texts)},
            headers=headers,
            timeout=(5, 120),
        )
        if answer.status_code in (401, 403):
            raise AuthenticationError(
                f"{self.base} refused the key; set PHI3_EMBEDDINGS_KEY", status=answer.status_code
            )
        if not answer.ok:
            reason = f"status {answer.status_code}: {said_by(answer)}"
            raise ServiceError(f"{self.base} gave no vectors: {reason}")
        try:
            # By index: the API does not promise the order of the question.
            items = sorted(answer.json()["data"], key=lambda item: item["index"])
            vectors: list[Sequence[float]] = [
                [float(value) for value in item["embedding"]] for item in items
            ]
        except (ValueError, KeyError, TypeError):
            raise ServiceError(
                f"{self.base} answered in another form than data[].embedding; is it an embeddings "
                "endpoint?"
            ) from None
        if len(vectors) != len(texts):
            raise ServiceError(f"{self.base} sent {len(vectors)} vectors for {len(texts)} texts")
        return vectors


_open: dict[str, Embedder] = {}
_open_lock = threading.Lock()


def embedder_of(facts: Mapping[str, str], index: Path) -> Embedder | None:
    """The embedder that an index was made with, once per process; None where it has no vectors.

    An ONNX folder is looked for at $PHI3_EMBEDDER, in `embedder/` next to the index, and where
    the index was made. Raises ConfigurationError when it is nowhere.
    """
    if facts["embedder"] == "none":
        return None
    settings = json.loads(facts["embedder_settings"])
    with _open_lock:
        if facts["embedder"] not in _open:
            if settings["kind"] == "endpoint":
                key = os.environ.get("PHI3_EMBEDDINGS_KEY")
                embedder: Embedder = EndpointEmbedder(
                    settings["base"], settings["model"], key, int(facts["dimension"])
                )
            else:
                # What is named first, then what travels with the index, then where the index was
                # made.
                places = [os.environ.get(FOLDER_VARIABLE), index.parent / "embedder"]
                places.append(Path(settings["folder"]).expanduser())
                here = [Path(place) for place in places if place and Path(place).is_dir()]
                if not here:
                    raise ConfigurationError(
                        f"{index} was made with an embedder whose folder is missing here; put "
                        f"it at {index.parent / 'embedder'}, or name it in ${FOLDER_VARIABLE}"
                    )
                embedder = OnnxEmbedder(here[0])
            _open[facts["embedder"]] = embedder
        return _open[facts["embedder"]]
