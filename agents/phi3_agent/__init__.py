"""The chat flows on Microsoft Agent Framework: a chat client, agents and workflows for a Phi-3.

What is sent is built by the same code as in Prompt flow (phi3_tool), so the requests are equal byte
for byte. Needs agent-framework-core and phi3_tool; `serve` needs starlette and uvicorn as well.
"""

from .agent import Documents, create_agent
from .client import Phi3ChatClient, Phi3ChatOptions
from .conversation import FileConversations, MemoryConversations, TurnsProvider
from .workflow import FlowInputs, RagInputs, create_rag_workflow, create_workflow, run_flow

__all__ = [
    "Documents",
    "FileConversations",
    "FlowInputs",
    "MemoryConversations",
    "Phi3ChatClient",
    "Phi3ChatOptions",
    "RagInputs",
    "TurnsProvider",
    "create_agent",
    "create_rag_workflow",
    "create_workflow",
    "run_flow",
]
