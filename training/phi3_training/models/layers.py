"""A model's matrices by name, without loading them: do LoRA targets and an adapter's weights fit?

Reads config.json and the headers of *.safetensors; never weights, never the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import StageError, shortened
from .catalogue import known, weights_folder

ALL_LINEAR = "all-linear"
Shapes = dict[str, tuple[int, ...]]

# Phi-3 has q, k and v in one matrix, and gate and up in another.
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_WHOLE = {part: whole for whole, parts in _PARTS.items() for part in parts}
PHI3 = tuple(
    f"model.layers.0.{name}"
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
)


def weight_shapes(folder: Path) -> Shapes:
    """The shape of each weight in a folder's safetensors files."""
    from safetensors import safe_open

    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                shapes[name] = tuple(weights.get_slice(name).get_shape())
    return shapes


def matrices(folder: Path) -> list[str]:
    """The names of the modules of a model folder that hold a matrix."""
    shapes = weight_shapes(folder).items()
    return [n.removesuffix(".weight") for n, s in shapes if n.endswith(".weight") and len(s) == 2]


def matrices_of(name_or_path: str) -> Sequence[str] | None:
    """Those of what a recipe names as its model; None where they are not known on this machine."""
    folder = None if known(name_or_path) else weights_folder(name_or_path)
    if folder is None:  # every model of the catalogue is of Phi-3's architecture
        return PHI3 if known(name_or_path) else None
    return matrices(folder) or None


@dataclass(frozen=True)
class Targets:
    """LoRA targets as a model has them, and what was replaced, in words."""

    names: str | list[str]
    choices: list[str]


def targets_in(wanted: str | Sequence[str], modules: Collection[str]) -> Targets:
    """`finetune.target_modules` in the names of a model with these modules.

    Names of separate matrices become that of the fused one, and the other way round. Raises
    ValueError, with the names that the model has, where one matches nothing.
    """
    if wanted == ALL_LINEAR:
        return Targets(ALL_LINEAR, [])
    if isinstance(wanted, str) and not re.fullmatch(r"[\w.]+", wanted):
        return Targets(_checked_pattern(wanted, modules), [])
    # peft itself would train fewer layers without a word where only some of the names match.
    names, wrong, replaced = [], [], {}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        found = [name]  # else what the model calls it, where it has all of that
        if not _matches(name, modules):
            found = _elsewhere(name)
            found = found if all(_matches(other, modules) for other in found) else []
        if not found:
            wrong.append(name)
        elif found != [name]:
            replaced[name] = found
        names += found
    if wrong or not names:
        what = f"no layer of this model is named {', '.join(wrong)}" if wrong else "is empty"
        raise ValueError(f"finetune.target_modules: {what}; {_has(modules)}")
    whole = sorted({name for found in replaced.values() for name in found})
    is_fused = len(whole) < 3 and any(name.rpartition(".")[2] in _PARTS for name in whole)
    choices = [
        f"target_modules: {', '.join(replaced)} trained as {', '.join(whole)}, because this model "
        f"has {'these in one matrix' if is_fused else 'them apart'}"
    ] if replaced else []  # fmt: skip
    return Targets(list(dict.fromkeys(names)), choices)


def _matches(name: str, modules: Collection[str]) -> bool:
    """As peft compares a name of a list."""
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _checked_pattern(pattern: str, modules: Collection[str]) -> str:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"finetune.target_modules: {pattern!r} is no regular expression ({error}); several "
            "names are written [o_proj, down_proj]"
        ) from None
    if not any(expression.fullmatch(module) for module in modules):
        raise ValueError(
            f"finetune.target_modules: the regular expression {pattern!r} matches no layer of this "
            f"model; {_has(modules)}; several names are written [o_proj, down_proj], and an "
            f"expression is for whole names such as {next(iter(modules), 'none')}"
        )
    half = {
        other: module
        for module in modules
        for other in _elsewhere(module)
        if expression.fullmatch(other) and not expression.fullmatch(module)
    }
    if half:
        raise ValueError(
            f"finetune.target_modules: the regular expression {pattern!r} means "
            f"{_lasts(half)} as well, which this model has as {_lasts(half.values())}: name that"
        )
    return pattern


def _elsewhere(module: str) -> list[str]:
    """What models with these matrices apart, or in one, call this one."""
    before, dot, last = module.rpartition(".")
    others = (_WHOLE[last],) if last in _WHOLE else _PARTS.get(last, ())
    return [f"{before}{dot}{other}" for other in others]


def _lasts(modules: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def _has(modules: Collection[str]) -> str:
    inner = dict.fromkeys(m.rpartition(".")[2] for m in modules if ".layers." in m or ".h." in m)
    return f"it has: {', '.join(inner) or ', '.join(modules)} ({ALL_LINEAR}: all of them)"


# Whether an adapter fits a base model: peft loads one that does not without an error, and leaves
# out what has no place. Form of the files: https://huggingface.co/docs/peft/developer_guides/
# checkpoint, "PEFT checkpoint format".

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEARNT = re.compile(r"(.+)\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.weight)?")
_SHOWN = 4


def check_adapter(adapter: Path, base: Path) -> None:
    """Raise StageError unless every weight of the adapter has its place in the base model.

    Both are folders. Named are the weights without a place, and what to do about them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        settings = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise StageError(f"{adapter} is not an adapter: its {CONFIG} is missing or not JSON.")
    kind = str(settings.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise StageError(
            f"The adapter in {adapter} is of the type {kind}; phi3 merges and serves LoRA and DoRA "
            "adapters only."
        )
    if not (adapter / WEIGHTS).is_file():
        raise StageError(
            f"{adapter} has no {WEIGHTS}. An adapter_model.bin is written in this form by loading "
            "it with peft and calling save_pretrained(FOLDER)."
        )
    there = weight_shapes(base)
    try:
        with safe_open(adapter / WEIGHTS, framework="np") as weights:
            given = {n: tuple(weights.get_slice(n).get_shape()) for n in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StageError(f"{adapter / WEIGHTS} cannot be read: {error}") from None
    saved = settings.get("modules_to_save") or []
    faults: dict[str, str] = {}
    halves: dict[str, set[str]] = {}
    for name, shape in given.items():
        inner = name.removeprefix(_PREFIX)
        match = _LEARNT.fullmatch(inner)
        module = match[1] if match else inner.removesuffix(".weight")
        weight = there.get(f"{module}.weight")
        if match:
            halves.setdefault(module, set()).add(match[2])
        is_kept = match or any(_matches(name, [module]) for name in saved)
        if not name.startswith(_PREFIX) or weight is None or not is_kept:
            faults[module] = "no such layer in the base model"
        elif not _fits(match[2] if match else "", shape, weight):
            faults[module] = f"of shape {list(shape)}, for a base weight of {list(weight)}"
    for module, found in halves.items():
        if len(found & {"lora_A", "lora_B"}) == 1:
            faults.setdefault(module, "only one of lora_A and lora_B is in the file")
    if not given:
        faults["(none)"] = "the file has no weights"
    if faults:
        raise StageError(_refusal(adapter, base, faults, there))


def _fits(part: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if part == "lora_A":
        return shape[-1] == weight[1]
    if part in ("lora_B", "lora_magnitude_vector"):
        return shape[0] == weight[0] or shape[-1] == weight[0] == max(shape)
    return shape == weight if not part else True


def _refusal(adapter: Path, base: Path, faults: dict[str, str], there: Collection[str]) -> str:
    shown = shortened([f"{module}: {why}" for module, why in faults.items()], _SHOWN)
    lasts = {module.rpartition(".")[2] for module in faults}
    modules = [name.removesuffix(".weight") for name in there]
    apart = sorted(last for last in lasts if last in _WHOLE and _matches(_WHOLE[last], modules))
    fix = "Use it with the base model that it was trained on, or train it here: phi3 train RECIPE"
    if apart:
        fix = (
            f"It was trained on a model that has {', '.join(apart)} apart (Llama-class, as unsloth "
            "writes Phi-3); this one has them in one matrix. Merge it into the model it was "
            "trained on (peft: merge_and_unload), then: phi3 models convert FOLDER --to FOLDER"
        )
    return "\n".join(
        [
            f"The adapter in {adapter} does not fit the base model in {base}, so nothing was "
            f"loaded or written. Of its layers {len(faults)} have no place:",
            *(f"  {line}" for line in shown),
            fix + ".",
        ]
    )
