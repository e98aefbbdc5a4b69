"""`phi3 lint`: every kind of dead thing is found on its line, and a clean file has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.cli import main
from phi3_training.lint import lint_text

KEY = "9fK2mQ7xLp4Rt8Zw1Yb6Vc3Nd5Hs0Gj"


@pytest.mark.parametrize(
    ("line", "suffix", "kind", "what"),
    [
        ("model: azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/15",
         ".yaml", "model", "Phi-3-mini-4k-instruct"),
        ('model_name = "Phi-3.5-mini-instruct"', ".py", "model", "Phi-3.5-mini-instruct"),
        ("Choose Phi-3-medium-4k-instruct.", ".md", "model", "Phi-3-medium-4k-instruct"),
        ("instance_type: Standard_NC6s_v3", ".yaml", "size", "Standard_NC6s_v3"),
        ("Choose the size NC24rs_v3", ".md", "size", "NC24rs_v3"),
        ("vm_size = 'STANDARD_NC6'", ".py", "size", "STANDARD_NC6"),
        ('compute = "Standard_ND40rs_v2"', ".py", "size", "Standard_ND40rs_v2"),
        ("    **model_specific_defaults,", ".py", "parameter", "**model_specific_defaults"),
        ("learning_rate_min: 5e-7", ".yaml", "parameter", "learning_rate_min"),
        ('tags["finetune_compute_allow_list"]', ".py", "parameter", "finetune_compute_allow_list"),
        ("job.outputs.evaluation_result", ".py", "parameter", "outputs.evaluation_result"),
        ("SFTConfig(max_seq_length=1024)", ".py", "parameter", "max_seq_length="),
        ("SFTTrainer(tokenizer=tokenizer)", ".py", "parameter", "tokenizer=tokenizer"),
        ("load('microsoft/Phi-3-mini-4k-instruct', trust_remote_code=True)",
         ".py", "parameter", "trust_remote_code=True"),
        ("from azureml.core import Workspace", ".py", "import", "from azureml.core"),
        ("pip install azureml-core", ".md", "import", "azureml-core"),
        ("  - azureml-sdk==1.50", ".yaml", "import", "azureml-sdk"),
        ("import promptflow_vectordb", ".py", "import", "promptflow_vectordb"),
        ("  module: promptflow_vectordb.tool.common_index_lookup", ".yaml", "import",
         "promptflow_vectordb"),
        ("from azure.ai.inference import ChatCompletionsClient", ".py", "import",
         "azure.ai.inference"),
        ("import ragas", ".py", "import", "import ragas"),
        ("from promptflow import tool", ".py", "name", "from promptflow import tool"),
        ("from promptflow.core import CustomConnection", ".py", "name",
         "from promptflow.core import CustomConnection"),
        ("from agent_framework.azure import AzureOpenAIChatClient", ".py", "name",
         "from agent_framework.azure import AzureOpenAIChatClient"),
        ("WorkflowBuilder().set_start_executor(a)", ".py", "name", ".set_start_executor("),
        ("%pip install datasets==2.9.0", ".md", "pin", "datasets==2.9.0"),
    ],
)  # fmt: skip
def test_what_is_dead_is_named_on_its_line(line: str, suffix: str, kind: str, what: str) -> None:
    found = list(lint_text(f"\n{line}\n", "a", suffix))
    assert [(each.line, each.kind, each.what) for each in found] == [(2, kind, what)]
    assert found[0].why
    assert found[0].cure


@pytest.mark.parametrize(
    ("line", "suffix"),
    [
        (f"  key: {KEY}", ".yaml"),
        (f'API_KEY = "{KEY}"', ".py"),
        (f'# api_key = "{KEY}"', ".py"),
        (f"os.environ['AZURE_OPENAI_KEY'] = '{KEY}'", ".py"),
        (f"curl -H 'Authorization: Bearer {KEY}'", ".md"),
        (f'    "headers = {{\\"api-key\\": \\"{KEY}\\"}}\\n",', ".ipynb"),
    ],
)
def test_a_key_is_found_and_never_shown(line: str, suffix: str) -> None:
    found = list(lint_text(line, "a", suffix))
    assert [each.kind for each in found] == ["key"]
    assert KEY not in str(found[0])
    assert KEY not in json.dumps(found[0].as_dict())


@pytest.mark.parametrize(
    ("line", "suffix"),
    [
        ("key: ${env:PHI3_ENDPOINT_KEY_OF_2026}", ".yaml"),
        ("api_key: <your-key-of-32-signs-here-1234>", ".yaml"),
        ("api_key: your_own_api_key_0123456789", ".yaml"),
        ('key = os.environ["PHI3_ENDPOINT_KEY_12"]', ".py"),
        ("model_name_or_path: microsoft/Phi-3-mini-4k-instruct", ".yaml"),
        ("ollama run Phi-3-mini-4k-instruct-q4.gguf", ".md"),
        ("instance_type: Standard_NC24ads_A100_v4", ".yaml"),
        ("size: Standard_NC64as_T4_v3", ".yaml"),
        ("# Standard_NC6s_v3 was retired", ".py"),
        ("pipeline(max_seq_length=2048)", ".py"),
        ("from promptflow.core import tool", ".py"),
        ("from azureml.fsspec import AzureMachineLearningFileSystem", ".py"),
    ],
)
def test_what_still_runs_is_left_alone(line: str, suffix: str) -> None:
    assert list(lint_text(line, "a", suffix)) == []


def test_a_folder_with_a_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["job = chat_completion_pipeline(\n", "    **model_specific_defaults,\n", ")"]
    cell = {"cell_type": "code", "source": source, "outputs": []}
    notebook = tmp_path / "tutorial" / "chat.ipynb"
    notebook.parent.mkdir()
    notebook.write_text(json.dumps({"cells": [cell]}, indent=1), "utf-8")
    line = (
        notebook.read_text("utf-8").splitlines().index('    "    **model_specific_defaults,\\n",')
    )

    assert main(["lint", str(tmp_path)]) == 1
    assert f"{notebook}:{line + 1}: parameter" in capsys.readouterr().out

    assert main(["lint", str(notebook), "-o", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["files"], len(told["findings"])) == (False, 1, 1)


def test_a_clean_file_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("compute: Standard_NC24ads_A100_v4\n", "utf-8")
    assert main(["lint", str(tmp_path)]) == 0
    assert "Nothing outdated was found; 1 file read" in capsys.readouterr().out


def test_paths_that_cannot_be_read_are_all_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["lint", str(tmp_path / "none.md"), str(tmp_path / "a.png"), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("none.md") == 1
    assert "a.png: expected a file with" in said
    assert "no file with" in said
