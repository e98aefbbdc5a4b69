"""What will not run any more in somebody's YAML, notebook, Markdown or Python; reads only.

Every rule is a known fact with its date (docs/sunset.md), not a matter of style. A file is read
line by line, so that a broken notebook or template is read as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import UsageError
from .recipe.azure import GPU_SIZE
from .targets.azure.pipeline_job import ARCHIVED
from .targets.azure.sizes import RETIRED

SUFFIXES = frozenset({".yaml", ".yml", ".ipynb", ".md", ".py"})
_SKIPPED_FOLDERS = frozenset({"node_modules", "site-packages", "__pycache__", "venv"})


@dataclass(frozen=True)
class Outdated:
    """One place in a file; `what` never holds a key."""

    file: str
    line: int
    kind: str
    what: str
    why: str
    cure: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.what}: {self.why}. Fix: {self.cure}"

    def as_dict(self) -> dict[str, str | int]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """A pattern, why what it finds is outdated, and what to write instead.

    `only_with`: the rule holds in files that have this pattern somewhere.
    """

    kind: str
    pattern: re.Pattern[str]
    why: str
    cure: str
    only_with: re.Pattern[str] | None = None


def _rule(kind: str, pattern: str, why: str, cure: str, only_with: str | None = None) -> Rule:
    file_has = None if only_with is None else re.compile(only_with, re.IGNORECASE)
    return Rule(kind, re.compile(pattern, re.IGNORECASE), why, cure, file_has)


_PYPI_V1 = r"azureml[-.](?:core|sdk|train|pipeline)\b"
_TRL = r"\b(?:SFTTrainer|SFTConfig)\b"
RULES = (
    # Not retired by any notice that is known, but on no Phi model's list for fine-tuning.
    _rule(
        "size",
        r"\b(?:standard_)?nd40rs_v2\b",
        "a V100 size that is on no Phi model's list for fine-tuning",
        f"use {GPU_SIZE}",
    ),
    _rule(
        "parameter",
        r"\*\*\s*model_specific_defaults\b",
        "has held learning_rate_min and _max since 2025-02, which the pipeline does not accept: "
        "UnexpectedKeywordError",
        "pass only the keys that the component has as inputs, or use: phi3 up --on azure",
    ),
    _rule(
        "parameter",
        r"\blearning_rate_m(?:in|ax)\b",
        "no input of chat_completion_pipeline: UnexpectedKeywordError",
        "remove it; set learning_rate",
    ),
    _rule(
        "parameter",
        r"\b(?:finetune_compute_allow_list|inference_compute_allow_list)\b",
        "the catalogue's models lost this tag in 2026-06",
        "name the size yourself; check it with: phi3 plan --on azure",
    ),
    _rule(
        "parameter",
        r"\boutputs\.evaluation_result\b",
        "chat_completion_pipeline has no such output any more",
        "evaluate with: phi3 evaluate",
    ),
    _rule(
        "parameter",
        r"\bmax_seq_length\s*=",
        "TRL renamed it; some versions ignore it silently",
        "write max_length=",
        _TRL,
    ),
    _rule(
        "parameter",
        r"\btokenizer\s*=\s*tokenizer\b",
        "TRL renamed the trainer's argument",
        "write processing_class=tokenizer",
        r"\bSFTTrainer\b",
    ),
    _rule(
        "parameter",
        r"\btrust_remote_code\s*[=:]\s*[\"']?true\b",
        "Phi-3's remote code breaks on new transformers, which has the model itself",
        "remove it",
        r"phi-?3",
    ),
    _rule(
        "import",
        rf"\b(?:from|import)\s+azureml\.(?:core|train|pipeline)\b|(?<![\w./-]){_PYPI_V1}",
        "Azure ML SDK v1, support ended on 2026-06-30",
        "use azure-ai-ml (from azure.ai.ml import MLClient)",
    ),
    _rule(
        "import",
        r"\bpromptflow[_-]vectordb\b",
        "does not import on a fresh install: it pins numpy<2, its pyarrow needs numpy 2",
        "index and search with: phi3 rag",
    ),
    _rule(
        "import",
        r"\bazure\.ai\.inference\b|\bazure-ai-inference\b",
        "retired on 2026-08-26",
        "use the openai package",
    ),
    _rule(
        "import",
        r"\bazure\.mgmt\.machinelearningservices\b|\bazure-mgmt-machinelearningservices\b",
        "abandoned: its newest version speaks an API of 2020",
        "use azure-ai-ml",
    ),
    _rule(
        "import",
        r"\b(?:from|import)\s+ragas\b",
        "ragas 0.4.3 does not import with today's langchain-community",
        "measure with: phi3 rag",
    ),
    _rule(
        "name",
        r"\bfrom\s+promptflow\s+import\s+(?:\w+\s*,\s*)*tool\b",
        "moved; an ImportError where only promptflow-core is installed",
        "from promptflow.core import tool",
    ),
    _rule(
        "name",
        r"\bfrom\s+promptflow\.core\s+import\s+.*\bCustomConnection\b",
        "promptflow.core has no CustomConnection",
        "from promptflow.connections import CustomConnection",
    ),
    _rule(
        "name",
        r"\bfrom\s+agent_framework\.azure\s+import\s+.*\bAzureOpenAIChatClient\b",
        "agent-framework has no such name any more: ImportError",
        "write a chat client of your own on BaseChatClient",
    ),
    _rule(
        "name",
        r"\.(?:register_executor|set_start_executor)\s*\(",
        "WorkflowBuilder has no such method any more",
        "pass start_executor= to WorkflowBuilder and use add_edge or add_chain",
        r"\bWorkflowBuilder\b",
    ),
    _rule(
        "pin",
        r"\bdatasets\s*==\s*2\.9\.0\b",
        "too old for current versions of Python",
        "pip install datasets, without this pin",
    ),
)
# A Hugging Face id (microsoft/Phi-3-…) and a converted copy (…-onnx, ….gguf) are not the
# catalogue's model: those weights are still there.
_GONE_MODELS = {**ARCHIVED, "phi-3.5-vision-instruct": next(iter(ARCHIVED.values()))}
_MODEL = re.compile(
    rf"(?:(?<=models/)|(?<![\w/.-]))(?:{'|'.join(map(re.escape, _GONE_MODELS))})(?![\w-]|\.\w)",
    re.IGNORECASE,
)
_SIZE = re.compile(
    # The first generations' names (NC6) are words of their own only with the prefix.
    "|".join(
        rf"\b{'(?:standard_)?' if '_v' in name else 'standard_'}{name.removeprefix('standard_')}\b"
        for name in sorted(RETIRED, key=len, reverse=True)
    ),
    re.IGNORECASE,
)
_KEY = re.compile(
    r"(?P<name>\b[\w.-]*(?:key|secret|token|password|pwd))[\"'\]]*\s*(?:[:=]|,\s*(?=[\"']))\s*"
    r"[\"']?(?P<value>[A-Za-z0-9+/_=.-]{20,})",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(?P<name>Bearer)\s+(?P<value>[A-Za-z0-9+/_=.-]{20,})")
_PLACEHOLDER = re.compile(
    r"your|example|placeholder|change|x{4}|\.\.\.|^0+$|[._/-](?:key|name|id)$", re.IGNORECASE
)
_KEY_WHY = "a key in clear text: whoever reads the file can use it"
_KEY_CURE = "replace it with ${env:NAME} or a connection, and regenerate the key"


def lint_text(text: str, file: str, suffix: str) -> Iterator[Outdated]:
    """What is outdated in one file's text; `file` is how it is named in the findings."""
    rules = [rule for rule in RULES if rule.only_with is None or rule.only_with.search(text)]
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw
        if suffix == ".ipynb":  # JSON that keeps each line of a cell on a line of its own
            try:
                value = json.loads(raw.strip().rstrip(","))
            except ValueError:
                line = raw.replace('\\"', '"').replace("\\n", " ")
            else:
                line = value if isinstance(value, str) else raw
        # In comments too: a key that is commented out is still a key.
        for match in (*_KEY.finditer(line), *_BEARER.finditer(line)):
            if _looks_like_key(match["value"]):
                yield Outdated(file, number, "key", match["name"], _KEY_WHY, _KEY_CURE)
        if suffix in {".py", ".yaml", ".yml"} and line.lstrip().startswith("#"):
            continue  # a remark runs nothing, but shows a key all the same
        for match in _MODEL.finditer(line):
            name = match[0].lower()
            new = "Phi-4" if "medium" in name else "Phi-4-mini-instruct"
            cure = f"use {new}, or the weights of Hugging Face's microsoft/{match[0]}"
            yield Outdated(file, number, "model", match[0], _GONE_MODELS[name], cure)
        for match in _SIZE.finditer(line):
            name = match[0].lower()
            why = RETIRED[name if name in RETIRED else f"standard_{name}"]
            yield Outdated(file, number, "size", match[0], why, f"use {GPU_SIZE}")
        for rule in rules:
            for match in rule.pattern.finditer(line):
                yield Outdated(file, number, rule.kind, match[0].strip(), rule.why, rule.cure)


def _looks_like_key(value: str) -> bool:
    """Letters and digits in a mix that no word has, and nothing that says "your key here"."""
    return (
        sum(sign.isdigit() for sign in value) >= 2
        and any(sign.isalpha() for sign in value)
        and len(set(value)) >= 8
        and not _PLACEHOLDER.search(value)
    )


def files_in(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those of SUFFIXES in the folders named; hidden folders are left out.

    UsageError for everything that cannot be read, all at once.
    """
    files: dict[Path, None] = {}
    faults = []
    for path in paths:
        if path.is_dir():
            inside = []
            for root, folders, names in os.walk(path):
                # In place: os.walk goes down into what is left.
                folders[:] = [
                    name
                    for name in folders
                    if not name.startswith(".") and name not in _SKIPPED_FOLDERS
                ]
                inside += [Path(root, n) for n in names if Path(n).suffix.lower() in SUFFIXES]
            if not inside:
                faults.append(f"{path}: no file with {', '.join(sorted(SUFFIXES))} in it")
            files.update(dict.fromkeys(sorted(inside)))
        elif not path.is_file():
            faults.append(f"{path}: no such file or folder")
        elif path.suffix.lower() not in SUFFIXES:
            faults.append(f"{path}: expected a file with {', '.join(sorted(SUFFIXES))}")
        else:
            files[path] = None
    if faults:
        raise UsageError("\n".join(faults))
    return list(files)


def lint(files: Sequence[Path]) -> list[Outdated]:
    """What is outdated in these files, each place once, by file and line."""
    # A dict keeps their order, and names each place once.
    findings: dict[Outdated, None] = {}
    for path in files:
        try:
            # Whatever its encoding: the patterns are ASCII.
            text = path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        findings.update(dict.fromkeys(lint_text(text, str(path), path.suffix.lower())))
    return list(findings)
