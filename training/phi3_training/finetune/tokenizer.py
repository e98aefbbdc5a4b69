"""Makes the tokenizer of the tiny Phi-3: a byte-fallback BPE with Phi-3's control tokens.

Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into a model folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

UNKNOWN, BEGIN, CLOSE = "<unk>", "<s>", "</s>"
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"

# Phi-3's own order behind the vocabulary. Those that open or close a turn swallow the white
# space behind them (the template writes a line feed there); the others do not.
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
    tokenizer.pre_tokenizer = _word_splitter()
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
    tokenizer = _without_byte_specials(tokenizer)
    tokenizer.add_special_tokens(_control_tokens())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_settings(folder, model_max_length)
    return int(tokenizer.get_vocab_size())


def _word_splitter() -> pre_tokenizers.PreTokenizer:
    """Words keep the space before them; digits and punctuation stand alone.

    So "Microsoft" is the same token with and without a question mark behind it, and a number
    that was never seen is written digit by digit.
    """
    pattern = Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^▁\p{L}\p{M}\p{N}]|▁")
    return pre_tokenizers.Split(pattern, behavior="isolated")


def _without_byte_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer whose byte tokens are ordinary ones, as in Phi-3.

    The trainer takes tokens that must exist only as special ones; a special byte token would
    be dropped when an answer is decoded.
    """
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(content))


def _control_tokens() -> list[AddedToken]:
    def control(text: str, *, rstrip: bool) -> AddedToken:
        return AddedToken(text, rstrip=rstrip, normalized=False, special=True)

    plain = [control(text, rstrip=False) for text in (UNKNOWN, BEGIN, CLOSE, END_OF_TEXT)]
    return plain + [control(text, rstrip=True) for text in _TURN_TOKENS]


def _write_settings(folder: Path, model_max_length: int) -> None:
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
