"""The commands of `phi3`, one module per group; a command's module is loaded when it is called."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """Commands that one function of a module registers, each with its line in `phi3 --help`."""

    module: str
    register: str
    commands: dict[str, str]


def _group(module: str, register: str, /, **commands: str) -> Group:
    return Group(module, register, commands)


# In the order of `phi3 --help`, which therefore loads none of the modules (0.3 s at most).
GROUPS = (
    _group(
        "up",
        "register_up",
        up="run every stage that is not done yet, from chats to an answer in Prompt flow",
        plan="show what `up` would do and what would stop it; changes nothing",
    ),
    _group(
        "status",
        "register_status",
        status="show the runs, their stages and endpoints",
        down="stop what `up` started: local endpoints, or endpoint and cluster on Azure",
    ),
    _group(
        "runs",
        "register_runs",
        runs="list the runs, which one is current, and their size on disk",
        use="choose the current run, which chat, env, export and the flow use",
        rm="delete a run that is not serving",
    ),
    _group(
        "up",
        "register_stages",
        train="prepare the chats and fine-tune",
        evaluate="compare the base and the tuned model, and apply the gate",
        register="register the tuned model in the run's MLflow registry",
        deploy="start the endpoint of the tuned model",
        connect="write the Prompt flow connection for the endpoint",
    ),
    _group(
        "models",
        "register_adapters",
        adapters="list the named adapters of a run, or merge one into the base weights",
    ),
    _group(
        "data",
        "register_data",
        data="check, repair, convert, prepare or show chats",
    ),
    _group(
        "rag",
        "register_rag",
        rag="index your documents, search them, turn them into chats, compare RAG with tuning",
    ),
    _group(
        "chat",
        "register_chat",
        chat="talk to the tuned model, in the terminal or with --web in the browser",
        env="print endpoint and key as shell variables for any other client",
        serve="serve the tuned model in the foreground, until Ctrl-C",
    ),
    _group(
        "chat",
        "register_invoke",
        invoke="send a random held-out conversation to the endpoint",
    ),
    _group(
        "batch",
        "register_batch",
        batch="send every line of a JSONL file to the endpoint, many in parallel; can be resumed",
    ),
    _group(
        "flow",
        "register_flow",
        flow="pack a flow for Foundry or Studio, push it, serve it, or build its container",
    ),
    _group(
        "agent",
        "register_agent",
        agent="run the model on Microsoft Agent Framework: chat, serve, DevUI, or pack it for "
        "Foundry's hosted agents",
    ),
    _group(
        "models",
        "register_export",
        export="convert the tuned model to another format and compare it with the original",
    ),
    _group(
        "doctor",
        "register_doctor",
        doctor="check environment, connection, endpoint and flow, and show how to fix each fault",
    ),
    _group(
        "doctor",
        "register_lint",
        lint="find what no longer runs in a tutorial's or your own files",
    ),
    _group(
        "models",
        "register_init",
        init="create a new project: flow, recipe, sample chats, connection templates",
    ),
    _group(
        "models",
        "register_recipes",
        recipes="list the shipped recipes",
    ),
    _group(
        "models",
        "register_models",
        models="list the base models that a recipe can name, or convert a Llama-class folder to "
        "Phi-3",
    ),
    _group(
        "azure",
        "register_azure",
        azure="create what a run on Azure needs, show the GPU quota, cancel a job, move traffic "
        "or an endpoint's deadline",
    ),
    _group(
        "rehearse",
        "register_rehearse",
        rehearse="start, stop or inspect a rehearsed Azure on this machine",
    ),
    _group(
        "completion",
        "register_completion",
        completion="print what a shell needs to complete commands, options and run names",
    ),
)
# For each module's own parser: the line in `phi3 --help` and in `phi3 COMMAND --help` is the same.
HELP = {name: text for group in GROUPS for name, text in group.commands.items()}
