"""The MLflow side of a tuned model: loads the model folder, answers `{"messages": […]}` rows.

MLflow runs this file by itself when the registered model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from pydantic import BaseModel


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class Row(BaseModel):
    """One conversation to answer. MLflow reads the input schema from these classes."""

    messages: list[Message]


class TunedPhi3(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Answers chats greedily."""

    # MLflow passes `context` by keyword: another name is a TypeError at load.
    def load_context(self, context: Any) -> None:
        """Load tokenizer, template and weights from the artifact `model`."""
        import torch
        from transformers import AutoModelForCausalLM

        from phi3_training.prompt import ChatFormat

        folder = Path(context.artifacts["model"])
        self._torch = torch
        self._format = ChatFormat.from_folder(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def predict(
        self, context: Any, model_input: list[Row], params: dict[str, Any] | None = None
    ) -> list[str]:
        """One answer per row; `params` may hold `max_new_tokens` (64)."""
        del context
        limit = int((params or {}).get("max_new_tokens", 64))
        answers: list[str] = []
        for row in model_input:
            messages = [message.model_dump() for message in row.messages]
            ids = self._torch.tensor([self._format.encode_prompt(messages, any_order=True)])
            with self._torch.inference_mode():
                output = self._model.generate(
                    ids,
                    attention_mask=self._torch.ones_like(ids),
                    max_new_tokens=limit,
                    do_sample=False,  # the same answer each time, as evaluated
                    eos_token_id=list(self._format.stop_token_ids),
                    pad_token_id=self._format.pad_token_id,
                )
            answers.append(self._format.decode(output[0, ids.shape[1] :].tolist()).strip())
        return answers


mlflow.models.set_model(TunedPhi3())
