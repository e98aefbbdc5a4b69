"""One distribution: phi3_tool (light), phi3_training, phi3_agent and phi3_rehearsal."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "tools/phi3_tool/__init__.py").read_text("utf-8"), re.M
).group(1)

# 3.30 forbids inherited locks: Prompt flow's chat page dies of it.
FILELOCK = "filelock>=3.20,<3.30"
# What reads chats at speed.
DATA = ["numpy>=2", "orjson>=3.10", "xxhash>=3.4"]
# What every `phi3` command needs: recipe checks, YAML, progress, process identity, run lock.
CLI = ["pydantic>=2.11", "PyYAML>=6.0", "rich>=13", "psutil>=5.9", "packaging>=23", FILELOCK, *DATA]
# What `phi3 completion` writes for the shell; Prompt flow asks for it as well.
CLI += ["argcomplete>=3"]

# Each upper bound has its reason; constraints/*.txt hold the exact set that was tested.
FLOW = [
    "promptflow>=1.18.5,<2",  # below: known holes in its local service; 2 does not exist
    "promptflow-tools>=1.6.1",
    FILELOCK,
    "keyrings.alt>=5",  # a headless Linux has no system keyring; Prompt flow needs one
    "uvicorn>=0.30",  # `pf flow serve --engine fastapi` needs it and does not ask for it
    # uvicorn takes them where they are: a request costs a seventh less CPU. Not for Windows.
    'uvloop>=0.21; sys_platform != "win32"',
    'httptools>=0.6; sys_platform != "win32"',
]
LOCAL = [
    *CLI,
    "torch==2.13.0",  # one tested version; a range would fetch gigabytes of CUDA builds
    "transformers>=5.23,<6",  # 6 is not tested: tokenizer and Trainer names change by major
    "trl>=1.16,<2",  # renames its arguments between majors, silently for some
    "peft>=0.21",
    "accelerate>=1.15",
    "datasets>=5",
    "tokenizers>=0.22",
    "jinja2>=3.1",
    "gguf>=0.17",  # reads the weights of `model.name_or_path: small`
    "onnxruntime>=1.24",
    "onnxruntime-genai>=0.18,<0.19",  # its builder converts; called in process, by its own names
    "onnx-ir>=1",  # used by onnxruntime-genai's builder, which does not ask for it
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "httpx>=0.27",
    "sacrebleu>=2.6,<3",  # the bootstrap resamples its per-sentence counts, an inner method
    "optuna>=5,<6",  # a search goes on from its database, whose form changes by major
    "mlflow>=3.10,<4",  # 4 is not tested
    "pypdf>=6",
    "mammoth>=1.9",  # reads DOCX, with its headings
    "semchunk>=4,<5",  # cuts at sentences; its offsets are taken as its version 4 gives them
    "matplotlib>=3.9",  # draws a search; mlflow asks for it as well
]
BITSANDBYTES = "bitsandbytes>=0.46"
QLORA = [*LOCAL, BITSANDBYTES]  # made for CUDA; on a CPU the tests alone use it
TENSORBOARD = ["tensorboard>=2.16"]
AZURE = [
    *CLI,
    "azure-ai-ml>=1.30,<1.33",  # 1.33 dropped a module that promptflow-azure imports
    "azure-identity>=1.19",
    "azure-mgmt-authorization>=4,<5",  # 5 renames the role assignment models
    "azure-mgmt-msi>=7",
    "azure-mgmt-quota>=3",
    "azure-mgmt-resource>=24",
    "azure-storage-blob>=12.20",
    "promptflow-azure>=1.18.5,<2",  # goes with promptflow
]
# An Azure of one's own to try `--on azure` against; no job and no model ever needs it.
REHEARSAL = [
    "trustme>=1.2",  # below: its certificates lack what Python 3.13 checks by default
    "cryptography>=42",  # seals the secrets in its state
    "psutil>=5.9",
    "PyYAML>=6.0",
    FILELOCK,
]
# Another environment (make agent): it needs opentelemetry-api 1.39, where Prompt flow ends.
AGENT = [
    "agent-framework-core>=1.13,<2",  # below: workflows and their errors had other names
    "starlette>=0.40",  # `phi3 agent serve`
    "uvicorn>=0.30",
    'uvloop>=0.21; sys_platform != "win32"',
    'httptools>=0.6; sys_platform != "win32"',
]
# `phi3 agent ui`. Microsoft publishes it as a preview only.
AGENT_UI = [*AGENT, "agent-framework-devui>=1.0.0b261022,<2"]
# The question's vector, for `--rag` with an index that has vectors.
AGENT_RAG = [*AGENT, "numpy>=2", "onnxruntime>=1.24", "tokenizers>=0.22"]
# The prompt nodes of a converted flow.
AGENT_FLOWS = [*AGENT, "jinja2>=3.1"]
DEV = [
    "pytest>=8",
    "pytest-cov>=6",
    "pytest-xdist>=3.6",  # two processes: the suite waits more than it computes
    "ruff>=0.14",
    "mypy>=1.15",
    "import-linter>=2.1",
    "types-PyYAML",
    "types-requests",
    "openai>=1.60",  # a client we did not write, for the endpoint's tests
    "playwright>=1.50",  # drives an installed Chromium; it downloads nothing
    "build>=1.2",
    BITSANDBYTES,
    *TENSORBOARD,
]

# The project's own files travel inside the package, in the tree that a clone has, so that an
# installed wheel needs no clone (phi3_training/project.py finds them in either).
SHIPPED = {
    "training/recipes": ["*.yaml", "olive/*"],
    "training/data": ["*.jsonl", "*.json", "README.md"],
    "training/data/handbook": ["*.md", "*.pdf", "*.docx"],
    "flows": ["*/*.py", "*/*.yaml", "*/*.jsonl", "*/*.txt", "*/README.md"],
    "connections": ["*.yaml", "README.md"],
    "agents/phi3_agent": ["*.py", "py.typed"],
    "tools/phi3_tool": ["*.py", "py.typed", "yamls/*", "icons/*"],
}
SHIPPED_PACKAGES = {f"phi3_training.shipped.{name.replace('/', '.')}": name for name in SHIPPED}

setup(
    name="phi3-promptflow",
    version=VERSION,
    description="Fine-tune Phi-3 on your own chats and talk to it in Prompt flow.",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9",
    package_dir={
        "phi3_tool": "tools/phi3_tool",
        "phi3_agent": "agents/phi3_agent",
        "phi3_training": "training/phi3_training",
        "phi3_rehearsal": "training/phi3_rehearsal",
        **SHIPPED_PACKAGES,
    },
    packages=find_packages("tools", include=["phi3_tool*"])
    + find_packages("agents", include=["phi3_agent*"])
    + find_packages("training", include=["phi3_training*", "phi3_rehearsal*"])
    + list(SHIPPED_PACKAGES),
    package_data={
        "phi3_tool": ["py.typed", "yamls/*.yaml", "icons/*.png"],
        "phi3_agent": ["py.typed"],
        "phi3_rehearsal": ["py.typed"],
        "phi3_training": [
            "py.typed",
            "agent/hosted_files/*",
            "evaluate/report.css",
            "evaluate/report.html",
            "flow/image_files/*",
            "project_files/*",
            "rag/comparison.html",
            "targets/azure/trainer.txt",
        ],
        **{package: SHIPPED[name] for package, name in SHIPPED_PACKAGES.items()},
    },
    install_requires=["requests>=2.28"],
    extras_require={
        "flow": FLOW,
        "local": LOCAL,
        "qlora": QLORA,
        "tensorboard": TENSORBOARD,
        "azure": AZURE,
        "agent": AGENT,
        "agent-ui": AGENT_UI,
        "agent-rag": AGENT_RAG,
        "agent-flows": AGENT_FLOWS,
        "rehearsal": REHEARSAL,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["phi3 = phi3_training.cli:main"],
        "package_tools": ["phi3_tool = phi3_tool.registry:list_package_tools"],
        "phi3_training.losses": ["contrastive = phi3_training.finetune.losses:contrastive"],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
    ],
)
