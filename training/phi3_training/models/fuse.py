"""Turns Llama-class weights into Phi-3's architecture: the same function, in fewer matrices.

Phi-3 is Llama with q, k and v in one matrix (`qkv_proj`) and gate and up in another
(`gate_up_proj`): https://github.com/huggingface/transformers `models/phi3/modeling_phi3.py`.
Reads a loaded model or a folder; writes a model folder.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import StageError
from ..progress import captured_output

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Phi3ForCausalLM, PreTrainedModel

# Prompt tokens on which both readings of the weights are compared, a few ids spread over the
# vocabulary: enough to reach every matrix, and every position offset of a rotary pair.
_PROBE_TOKENS = 48
# Both sum the same products in another order, so float32 may differ in its last digits.
MAX_DIFFERENCE = 1e-3
_PART = re.compile(r"(.*\.)(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight")
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# What Llama's config can say that Phi-3's attention and MLP cannot do.
_UNSUPPORTED = ("attention_bias", "mlp_bias")


def fuse(llama: LlamaForCausalLM) -> Phi3ForCausalLM:
    """The Phi3ForCausalLM that computes what `llama`, a LlamaForCausalLM, computes.

    Weights keep their number type. Raises StageError for what Phi-3's architecture has no place
    for (biases, another activation, scaled rotary embeddings, a head size of its own).
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    given = llama.config
    rope = dict(given.rope_parameters or {})
    unfit = [key for key in _UNSUPPORTED if getattr(given, key, False)]
    if rope.get("rope_type", "default") != "default":
        unfit.append(f"rope_type {rope['rope_type']}")
    if given.hidden_act != "silu":
        unfit.append(f"hidden_act {given.hidden_act}")
    if given.head_dim * given.num_attention_heads != given.hidden_size:
        unfit.append(f"head_dim {given.head_dim}")
    if unfit:
        raise StageError(
            f"This Llama cannot be converted to Phi-3, which has no {', no '.join(unfit)}."
        )
    config = Phi3Config(
        vocab_size=given.vocab_size,
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        num_hidden_layers=given.num_hidden_layers,
        num_attention_heads=given.num_attention_heads,
        num_key_value_heads=given.num_key_value_heads,
        hidden_act=given.hidden_act,
        max_position_embeddings=given.max_position_embeddings,
        # Two different values without longrope stop ONNX Runtime GenAI's builder.
        original_max_position_embeddings=given.max_position_embeddings,
        rms_norm_eps=given.rms_norm_eps,
        rope_parameters={**rope, "partial_rotary_factor": 1.0},
        tie_word_embeddings=given.tie_word_embeddings,
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id,
        pad_token_id=given.pad_token_id,
        sliding_window=None,
        dtype=given.dtype,
    )
    with torch.device("meta"):  # no second set of weights is ever allocated
        phi3 = Phi3ForCausalLM(config)
    states = dict(llama.state_dict())
    fused: dict[str, torch.Tensor] = {
        name: tensor for name, tensor in states.items() if not _PART.fullmatch(name)
    }
    for layer in range(config.num_hidden_layers):
        for target, parts in _FUSED.items():
            prefix = f"model.layers.{layer}."
            matrices = [states[f"{prefix}{part}.weight"] for part in parts]
            fused[f"{prefix}{target}.weight"] = torch.cat(matrices)
    phi3.load_state_dict(fused, assign=True)
    phi3.tie_weights()
    # Rotary tables are no weights: made again, off the meta device.
    phi3.model.rotary_emb = type(phi3.model.rotary_emb)(config)
    phi3.generation_config = llama.generation_config
    return phi3.eval()


def largest_difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """The largest difference of two models' logits on the same prompt, in logits."""
    size = first.config.vocab_size
    step = max(1, size // _PROBE_TOKENS)
    ids = torch.arange(0, size, step)[:_PROBE_TOKENS].unsqueeze(0)
    with torch.inference_mode():
        return float((first(ids).logits - second(ids).logits).abs().max())


def convert(source: Path, target: Path) -> float:
    """Write the Llama-class folder `source` as a Phi-3 folder; the largest difference of logits.

    The tokenizer's files are copied as they are. Raises StageError when `source` is no such
    folder, or when both folders do not compute the same.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from ..prompt import ChatFormat
    from .folder import copy_tokenizer, new_folder

    try:
        kind = AutoConfig.from_pretrained(source, local_files_only=True).model_type
    except (OSError, ValueError) as error:
        raise StageError(f"{source} is not a model folder: {str(error).splitlines()[0]}") from None
    if kind != "llama":
        raise StageError(
            f"{source} contains a model of type {kind!r}; only Llama-class models (SmolLM2, "
            f"TinyLlama, …) can be converted to Phi-3, because their layers compute the same."
        )
    try:
        chat = ChatFormat.from_folder(source)
        llama = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise StageError(f"{source} cannot be converted: {str(error).splitlines()[0]}") from None
    phi3 = fuse(llama)
    difference = largest_difference(llama, phi3)
    check_difference(difference, str(source))
    phi3.generation_config = GenerationConfig(
        eos_token_id=list(chat.stop_token_ids), pad_token_id=chat.pad_token_id
    )
    with new_folder(target) as folder:
        with captured_output(io.StringIO()):  # transformers' progress bar
            phi3.save_pretrained(folder)
        copy_tokenizer(source, folder)
    return difference


def check_difference(difference: float, source: str) -> None:
    """Raise StageError when the fused model does not compute what `source` computes."""
    if not difference <= MAX_DIFFERENCE:  # also if it is NaN
        raise StageError(
            f"{source} converted to Phi-3 gives different results: logits differ by "
            f"{difference:.2g}, at most {MAX_DIFFERENCE:g} was expected. Nothing was written."
        )
