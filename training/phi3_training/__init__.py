"""Fine-tunes Phi-3 on chats, serves it and connects it to Prompt flow; `phi3` is its command."""

import os

# The libraries below report usage to their vendors unless disabled, and read this when they are
# imported: nothing leaves a user's machine because of us. Users can still set them otherwise.
for _name, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("DO_NOT_TRACK", "true"),
):
    os.environ.setdefault(_name, _value)
