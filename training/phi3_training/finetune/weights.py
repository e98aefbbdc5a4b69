"""Finds and loads weights: a folder, or a Hugging Face id from the cache or the network.

Reads model folders; downloads into Hugging Face's own cache (HF_HOME).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from peft import LoraConfig, PeftModel
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel

from ..errors import MissingExtraError, StageError, UsageError, first_line
from ..manifests import BaseManifest
from ..models import small
from ..models.folder import check_rope, new_folder, write_model
from ..models.layers import check_adapter
from ..progress import Progress
from ..prompt import ChatFormat
from ..recipe import FinetuneSection, ModelSection, Recipe
from ..run import Run
from .runtime import Runtime

# Makes the tokenizer of the tiny Phi-3: a byte-fallback BPE with Phi-3's control tokens.
# Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into a model folder.

UNKNOWN, BEGIN, CLOSE = "<unk>", "<s>", "</s>"
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"

# Phi-3's own order after the vocabulary. Those that open or close a turn swallow the white
# space after them (the template writes a line feed there); the others do not.
_TURN_TOKENS = (
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    END_OF_TURN,
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)

# Phi-3's turn format; no turn is written for an empty system prompt.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] != 'system' or message['content'] %}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""


def make_tokenizer(
    texts: Iterable[str], folder: Path, *, vocab_size: int, model_max_length: int
) -> int:
    """Train a tokenizer on `texts`, write it into `folder` and return its number of tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Words keep the space before them; digits and punctuation are separate: "Microsoft" is the
    # same token with and without a question mark after it, and a number that was never seen is
    # written digit by digit.
    pattern = Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^▁\p{L}\p{M}\p{N}]|▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(_TURN_TOKENS) - 1,
        special_tokens=[UNKNOWN, BEGIN, CLOSE, *byte_tokens],
        initial_alphabet=[chr(code) for code in range(0x21, 0x7F)],
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer takes tokens that must exist only as special ones; a special byte token would be
    # dropped when an answer is decoded. In Phi-3 they are ordinary ones too.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))

    def control(text: str, *, rstrip: bool) -> AddedToken:
        return AddedToken(text, rstrip=rstrip, normalized=False, special=True)

    plain = [control(text, rstrip=False) for text in (UNKNOWN, BEGIN, CLOSE, END_OF_TEXT)]
    tokenizer.add_special_tokens(plain + [control(text, rstrip=True) for text in _TURN_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return int(tokenizer.get_vocab_size())


# What a causal language model folder consists of; other formats in a repository stay there.
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def base_folder(run: Run) -> Path:
    """The folder of the base model of this run."""
    return run.path / run.require(BaseManifest).path


def chat_format(folder: Path) -> ChatFormat:
    """The chat format of a model folder; StageError when it has none."""
    try:
        return ChatFormat.from_folder(folder)
    except ValueError as error:
        raise StageError(f"This model cannot be used for chats: {error}") from None


def count_weights(folder: Path) -> int:
    """Approximate number of weights in a folder, from its file sizes (four bytes each, or two)."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4


def model_type(folder: Path) -> str:
    """The kind of model of a folder as its config.json names it, such as phi3."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(content.get("model_type", ""))


def find_weights(model: ModelSection, progress: Progress) -> Path:
    """The folder with the weights that the recipe names, downloaded if need be.

    Raises StageError, with what to do, when they are not there or are not a chat model's.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from transformers import AutoConfig

    if model.is_small:
        return small.prepare(progress)
    name = model.name_or_path
    folder = Path(name).expanduser()
    if not folder.is_dir():
        revision = f" (revision {model.revision})" if model.revision else ""
        try:
            folder = Path(
                snapshot_download(name, revision=model.revision, allow_patterns=_WANTED_FILES)
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            what = f"could not be downloaded: {_first_line(error)}"
            if isinstance(error, HFValidationError):
                what = (
                    "is neither a folder nor a Hugging Face id such as "
                    "microsoft/Phi-3-mini-4k-instruct"
                )
            elif isinstance(error, LocalEntryNotFoundError):
                what = "is not on this machine and huggingface.co cannot be reached"
            raise StageError(
                f"model.name_or_path {name!r}{revision} {what}. Either give the folder with the "
                "weights (model.name_or_path=/path/to/folder), or set HF_HOME to a cache that has "
                "them, or connect this machine to the network; a gated model also needs HF_TOKEN."
            ) from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StageError(
            f"model.name_or_path {name!r} is not a model folder: {_first_line(error)}. "
            "Expected config.json, *.safetensors and tokenizer.json."
        ) from None
    kinds = config.architectures or []
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise StageError(
            f"model.name_or_path {name!r} contains {', '.join(kinds) or 'an unknown model'}; "
            f"expected a causal language model, such as microsoft/Phi-3-mini-4k-instruct."
        )
    if not any(folder.glob("*.safetensors")):
        raise StageError(
            f"model.name_or_path {name!r} contains no weights: expected *.safetensors in {folder}."
        )
    check_rope(folder)
    chat_format(folder)
    return folder.resolve()


def load_model(
    folder: Path, dtype: torch.dtype, attention: str | None = None, **options: object
) -> PreTrainedModel:
    """The causal language model of a folder, without running code from the folder.

    It is on the CPU, unless `options` of transformers' loader say otherwise.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if attention is not None:
        options["attn_implementation"] = attention
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise StageError(
            f"The weights in {folder} cannot be loaded: {_first_line(error)}. Expected a causal "
            "language model that transformers knows, as safetensors."
        ) from None


def _first_line(error: BaseException) -> str:
    return first_line(error).rstrip(".")


# The ways to fine-tune: what of the model learns, how it is loaded for that, and how merged.
# Reads model folders; writes nothing.


def check_method(settings: FinetuneSection, device: str) -> None:
    """Raise StageError or MissingExtraError when this machine cannot train that way."""
    count = torch.cuda.device_count()
    if count > 1 and settings.num_processes == 1:  # transformers would use DataParallel
        raise StageError(
            f"{count} GPUs are visible, but one process would train. Use all of them: "
            f"finetune.num_processes={count}; or choose one: CUDA_VISIBLE_DEVICES=0 phi3 train …"
        )
    if settings.method != "qlora":
        return
    if device != "cuda":
        raise StageError(
            "finetune.method qlora needs a CUDA GPU (for bitsandbytes' 4-bit weights); this "
            f"machine trains on: {device}. Set finetune.method=lora, which trains the same kind of "
            "adapter but needs about four times the memory for the weights."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "qlora")


def peft_config(settings: FinetuneSection) -> LoraConfig | None:
    """The adapter added to the weights; None if the weights themselves are trained."""
    if settings.method == "full":
        return None
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        use_dora=settings.method == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_for_training(folder: Path, recipe: Recipe, runtime: Runtime) -> PreTrainedModel:
    """The base model as the method needs it.

    LoRA leaves the weights as they are; when all learn, small steps need all of float32.
    """
    attention = recipe.model.attn_implementation
    if recipe.finetune.method == "full":
        return load_model(folder, torch.float32, attention)
    if recipe.finetune.method != "qlora":
        return load_model(folder, runtime.torch_frozen, attention)
    options = four_bit(runtime.torch_dtype, runtime.device)
    return load_model(folder, runtime.torch_dtype, attention, **options)


def learn_in_float32(model: PreTrainedModel) -> None:
    """Give what learns all of float32.

    TRL makes a QLoRA adapter bfloat16, whose gradients cannot be scaled on a GPU that has only
    float16 (such as a T4).
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def four_bit(dtype: torch.dtype, device: str) -> dict[str, object]:
    """How transformers loads weights as 4-bit normal floats, computing in `dtype`.

    The rest of what QLoRA needs is TRL's: frozen weights, an adapter of bfloat16, and inputs that
    carry gradients to checkpointed layers. peft's prepare_model_for_kbit_training is not called:
    it would make embedding, norms and output matrix float32, which autocast and the norms' own
    arithmetic have made needless (0.4 GB of Phi-3-mini).
    """
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # 4-bit weights cannot be moved later: they go at once to the GPU of this process, whose number
    # torchrun and accelerate give it.
    own_gpu = int(os.environ.get("LOCAL_RANK", "0"))
    return {
        "quantization_config": quantized,
        "device_map": {"": own_gpu if device == "cuda" else device},
    }


def with_adapter(folder: Path, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base model of full precision with a trained adapter: what is merged and served.

    A QLoRA adapter is merged into these weights too: merging into rounded ones would round the
    adapter as well. Raises StageError where a weight of the adapter has no place in the base.
    """
    check_adapter(adapter, folder)
    model = load_model(folder, dtype)
    try:
        with warnings.catch_warnings():
            # Keys that other tools (unsloth) add to the config: peft's advice is to upgrade peft.
            warnings.filterwarnings("ignore", "Unexpected keyword arguments")
            return PeftModel.from_pretrained(model, adapter, local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise StageError(
            f"The adapter in {adapter} cannot be loaded over {folder}: {_first_line(error)}."
        ) from None


# Writes what training leaves: the adapter alone, and the whole model with the adapter merged.
# Reads the base folder's tokenizer files; replaces the target folder when everything is written.


def merge(
    model: PreTrainedModel, chat: ChatFormat, target: Path, tokenizer_from: Path, dtype: torch.dtype
) -> None:
    """Write `model` into `target`, its LoRA adapter (if it has one) merged into the weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    with new_folder(target) as folder:
        write_model(model.to(dtype), chat, folder, tokenizer_from)


@torch.no_grad()
def scale_adapter(model: PreTrainedModel, weight: float) -> None:
    """Let the adapter add only this share of what it learnt: base + weight x difference.

    Weights between those before and after tuning keep nearly all that was learnt and lose less of
    what the base knew (WiSE-FT, https://arxiv.org/abs/2109.01903).
    """
    if weight == 1.0:
        return
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(weight)


def write_adapter(model: PreTrainedModel, target: Path, notes: AdapterNotes) -> None:
    """Write the adapter alone into `target`, with our notes on it."""
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        # A model card full of blanks that peft adds; the run's manifests say what this is.
        (folder / "README.md").unlink(missing_ok=True)
        write_notes(folder, notes)


# The named adapters of a run: run/adapters/NAME, each a plain peft folder over the same base.
# Reads and writes run/adapters/NAME (with our notes in phi3.json) and run/merged/NAME.

FOLDER = "adapters"
MERGED = "merged"
NOTES = "phi3.json"
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AdapterNotes(TypedDict, total=False):
    """What phi3.json says of an adapter; one from elsewhere has none."""

    method: str
    base_id: str | None  # done_id of the base model that it was trained on
    dtype: str
    final_loss: float


@dataclass(frozen=True)
class Adapter:
    """One adapter; `fits` is False if the run's base was recreated after it was trained."""

    name: str
    path: Path
    fits: bool
    notes: AdapterNotes

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {"name": self.name, "path": str(self.path), "fits": self.fits, **self.notes}


def adapter_folder(run: Run, name: str | None) -> Path:
    """Where the adapter of that name is; run/adapter for the one without a name."""
    return run.path / "adapter" if name is None else run.path / FOLDER / name


def list_adapters(run: Run) -> list[Adapter]:
    """The run's named adapters by name; only complete ones."""
    manifest = run.read(BaseManifest)
    base = None if manifest is None else manifest.done_id
    adapters = []
    for folder in sorted((run.path / FOLDER).glob("*")):
        if _NAME.fullmatch(folder.name) and (folder / _WEIGHTS).is_file():
            notes: AdapterNotes = {}  # as of a peft folder from elsewhere
            with suppress(OSError, ValueError):
                content: object = json.loads((folder / NOTES).read_text(encoding="utf-8"))
                notes = cast(AdapterNotes, content) if isinstance(content, dict) else {}
            fits = notes.pop("base_id", base) == base
            adapters.append(Adapter(folder.name, folder, fits, notes))
    return adapters


def find_adapter(run: Run, name: str) -> Adapter:
    """The adapter of that name; UsageError, with the known names, or StageError if it is stale."""
    adapters = list_adapters(run)
    for adapter in adapters:
        if adapter.name == name:
            if not adapter.fits:
                raise StageError(
                    f"The adapter {name!r} was trained on an earlier base model of this run; "
                    f"train it again: phi3 train RECIPE --adapter {name}"
                )
            return adapter
    if (run.path / FOLDER / name).is_dir():
        raise StageError(
            f"{run.path / FOLDER / name} is not a complete adapter: expected adapter_config.json "
            f"and {_WEIGHTS}, as peft's save_pretrained writes them"
        )
    known = ", ".join(adapter.name for adapter in adapters) or "none yet"
    raise UsageError(
        f"The run {run.name!r} has no adapter {name!r}; adapters: {known}. "
        f"Train one: phi3 train RECIPE --adapter {name}"
    )


def merge_adapter(run: Run, name: str) -> Path:
    """Merge a named adapter into the base weights: run/merged/NAME, a whole model folder."""
    import torch

    from .runtime import quiet_libraries

    quiet_libraries()
    adapter = find_adapter(run, name)
    folder = base_folder(run)
    dtype = getattr(torch, str(adapter.notes.get("dtype", "float32")))
    merged = with_adapter(folder, adapter.path, dtype)
    target = run.path / MERGED / name
    merge(merged, chat_format(folder), target, folder, dtype)
    return target


def write_notes(folder: Path, notes: AdapterNotes) -> None:
    """Record next to the weights what they are; peft ignores the file."""
    (folder / NOTES).write_text(json.dumps(notes, indent=2, default=str) + "\n", encoding="utf-8")
