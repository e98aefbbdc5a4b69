"""Models of a few hundred thousand random weights in the shapes of Phi-3.5-mini and Phi-4-mini.

Their config.json is written as the published ones are: rope_scaling (not rope_parameters), a
window wider than the context, more rows in the vocabulary than the tokenizer has tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, Phi3ForCausalLM

from phi3_training.finetune.weights import make_tokenizer

CHATS = Path(__file__).resolve().parents[2] / "training" / "data" / "outdoor_chats.jsonl"
# Both switch from short to long factors here; the real ones at 4096 of 131072.
BORDER, CONTEXT = 64, 256
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"

# Turns follow one another without line feeds; a system message may bring a list of tools.
PHI4_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'system' and message['tools'] %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% endif %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
# Words with their apostrophe, digits by threes, punctuation with the line feeds behind it.
_WORDS = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_TURNS = ("<|assistant|>", END_OF_TURN, "<|user|>", "<|system|>")
_TOOLS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>")


@dataclass(frozen=True)
class Family:
    """One shape: which of a model's sizes and habits make it different from Phi-3-mini-4k."""

    name: str
    config: dict[str, Any]
    rotary_width: int
    newlines: bool

    def write(self, folder: Path) -> Path:
        """A model folder with random weights."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = [message["content"] for chat in chats(24) for message in chat]
        make = _phi3_tokenizer if self.newlines else _phi4_tokenizer
        size = make(texts, folder)
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
        end = ids(END_OF_TEXT)
        half = self.rotary_width // 2
        config = {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "vocab_size": size + 36,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.01 * n for n in range(half)],
                "long_factor": [1.0 + 0.3 * n for n in range(half)],
            },
            "max_position_embeddings": CONTEXT,
            "original_max_position_embeddings": BORDER,
            "sliding_window": 262144,
            "bos_token_id": ids("<s>") if self.newlines else end,
            "eos_token_id": end,
            "pad_token_id": end,
            # Ten times the usual: attention must look at something, or positions would not matter.
            "initializer_range": 0.2,
            "torch_dtype": "bfloat16",
            **self.config,
        }
        torch.manual_seed(0)
        loaded = AutoConfig.for_model(**json.loads(json.dumps(config)))
        Phi3ForCausalLM(loaded).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        stops = {"eos_token_id": [ids(END_OF_TURN), end], "pad_token_id": end}
        (folder / "generation_config.json").write_text(json.dumps(stops), "utf-8")
        return folder


# Head 32, all of it rotated; real: 32 heads of 96.
PHI35 = Family(
    "phi3.5-mini",
    {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    rotary_width=32,
    newlines=True,
)
# Three queries share a key; three quarters of a head are rotated; real: 24 heads of 128 over 8.
PHI4 = Family(
    "phi4-mini",
    {
        "hidden_size": 384,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    rotary_width=48,
    newlines=False,
)


def chats(count: int) -> list[list[dict[str, str]]]:
    """The first shipped chats."""
    lines = CHATS.read_text("utf-8").splitlines()[:count]
    return [json.loads(line)["messages"] for line in lines]


def _phi3_tokenizer(texts: list[str], folder: Path) -> int:
    return make_tokenizer(texts, folder, vocab_size=620, model_max_length=CONTEXT)


def _phi4_tokenizer(texts: Iterable[str], folder: Path) -> int:
    """Bytes as letters, no unknown token; tool tokens are not special, turn tokens are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    tokenizer.add_special_tokens(
        [AddedToken(text, rstrip=True, normalized=False, special=True) for text in _TURNS]
    )
    tokenizer.add_tokens([AddedToken(text, rstrip=True, normalized=False) for text in _TOOLS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT),
        "model_max_length": CONTEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": PHI4_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    return int(tokenizer.get_vocab_size())
