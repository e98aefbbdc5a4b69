"""The commands of `phi3`, one module per group; a command's module is loaded when it is called."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """Commands that one function of a module registers, each with its line in `phi3 --help`."""

    module: str
    register: str
    commands: dict[str, str]


# In the order of `phi3 --help`, which therefore loads none of the modules.
GROUPS = (
    Group(
        "up",
        "register_up",
        {
            "up": "run every stage that is not done yet, from chats to an answer in Prompt flow",
            "plan": "show what `up` would do and what would stop it; changes nothing",
        },
    ),
    Group(
        "status",
        "register_status",
        {
            "status": "show the runs, their stages and endpoints",
            "down": "stop what `up` started: local endpoints, or endpoint and cluster on Azure",
        },
    ),
    Group(
        "runs",
        "register_runs",
        {
            "runs": "list the runs, which one is current, and their size on disk",
            "use": "choose the current run, which chat, env, export and the flow use",
            "rm": "delete a run that is not serving",
        },
    ),
    Group(
        "up",
        "register_stages",
        {
            "train": "prepare the chats and fine-tune",
            "evaluate": "compare the base and the tuned model, and apply the gate",
            "register": "register the tuned model in the run's MLflow registry",
            "deploy": "start the endpoint of the tuned model",
            "connect": "write the Prompt flow connection for the endpoint",
        },
    ),
    Group(
        "models",
        "register_adapters",
        {"adapters": "list the named adapters of a run, or merge one into the base weights"},
    ),
    Group("data", "register_data", {"data": "check, repair, convert, prepare or show chats"}),
    Group(
        "rag",
        "register_rag",
        {"rag": "index your documents, search them, turn them into chats, compare RAG with tuning"},
    ),
    Group(
        "chat",
        "register_chat",
        {
            "chat": "talk to the tuned model, in the terminal or with --web in the browser",
            "env": "print endpoint and key as shell variables for any other client",
            "serve": "serve the tuned model in the foreground, until Ctrl-C",
        },
    ),
    Group(
        "chat", "register_invoke", {"invoke": "send a random held-out conversation to the endpoint"}
    ),
    Group(
        "batch",
        "register_batch",
        {
            "batch": "send every line of a JSONL file to the endpoint, many in parallel; "
            "can be resumed"
        },
    ),
    Group(
        "flow",
        "register_flow",
        {"flow": "pack a flow for Foundry or Studio, push it, serve it, or build its container"},
    ),
    Group(
        "agent",
        "register_agent",
        {
            "agent": "run the model on Microsoft Agent Framework: chat, serve, DevUI, or pack "
            "it for Foundry's hosted agents"
        },
    ),
    Group(
        "models",
        "register_export",
        {"export": "convert the tuned model to another format and compare it with the original"},
    ),
    Group(
        "doctor",
        "register_doctor",
        {
            "doctor": "check environment, connection, endpoint and flow, and show how to "
            "fix each fault"
        },
    ),
    Group(
        "lint",
        "register_lint",
        {"lint": "find what no longer runs in a tutorial's or your own files"},
    ),
    Group(
        "models",
        "register_init",
        {"init": "create a new project: flow, recipe, sample chats, connection templates"},
    ),
    Group("models", "register_recipes", {"recipes": "list the shipped recipes"}),
    Group(
        "models",
        "register_models",
        {
            "models": "list the base models that a recipe can name, or convert a "
            "Llama-class folder to Phi-3"
        },
    ),
    Group(
        "azure",
        "register_azure",
        {
            "azure": "create what a run on Azure needs, show the GPU quota, cancel a job, move "
            "traffic or an endpoint's deadline"
        },
    ),
    Group(
        "rehearse",
        "register_rehearse",
        {"rehearse": "start, stop or inspect a rehearsed Azure on this machine"},
    ),
    Group(
        "completion",
        "register_completion",
        {"completion": "print what a shell needs to complete commands, options and run names"},
    ),
)
HELP = {name: text for group in GROUPS for name, text in group.commands.items()}
