"""The stage `deploy`: a new deployment, asked through its header, then given the traffic.

Reads the manifests `model` and `registration`; writes `endpoint` and <run>/azure/serve, copies of
the package's sources that Azure ML uploads once per content. An endpoint that exists is never
deleted to make room, and keeps its traffic until the new deployment has answered. The key stays in
memory.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_tool.client import ChatReply
from phi3_tool.credentials import SCOPE
from phi3_tool.errors import (
    EndpointNotFoundError,
    EndpointTimeoutError,
    ModelError,
    Phi3Error,
    ServiceError,
    ThrottledError,
)

from ... import console
from ...carried import copy_carried
from ...data import question_of
from ...errors import StageError
from ...manifests import EndpointManifest, ModelManifest, RegistrationManifest
from ...progress import Progress, note
from ...recipe import Recipe
from ...recipe.azure import AzureSection
from ...run import Run
from ..base import Access
from .clients import Clients
from .deadline import hold_deadline, settle_removals
from .environments import serving_environment
from .failures import explained, scrub
from .operations import (
    Outcome,
    create,
    delete,
    find,
    state_of,
    wait_until_ready,
    within,
    without_dots,
)
from .place import (
    AZURE,
    LONGEST_NAME,
    RUN_TAG,
    RunResource,
    deployment_name,
    endpoint_name,
    forget,
    record,
    recorded_resources,
)
from .probes import fault_of
from .resources import IDENTITY
from .rollout import PutBackKeeper, Rollout, undo_interrupted
from .sizes import find_size, refuse_retired, when_cores_are_free
from .traffic import DeploymentId, traffic_shares

if TYPE_CHECKING:
    from azure.ai.ml.entities import (
        ManagedOnlineDeployment,
        OnlineDeployment,
        OnlineEndpoint,
    )

log = logging.getLogger(__name__)

SCRIPT = "score.py"
_SCRIPT_TEXT = '''"""Azure ML's entry: init() and run() of the served model."""

from phi3_training.serve.azure_score import init, run

__all__ = ["init", "run"]
'''
_SCORING = "phi3_training.serve.azure_score"
LOG_LINES = 80  # of each container, in deployment.log
_SHOWN_LINES = 20  # of them, in an error
# Seconds that a new deployment may take for its first answer after Azure calls it ready.
_SMOKE_SECONDS = 300.0
_LONGEST_PAUSE = 30.0  # seconds between two asks
# Failures of the model itself before it is given up: its machine bills meanwhile. Not counted are
# those with Azure's reasons for a container that is only coming up.
_MODEL_TRIES, _COMING_UP = 5, ("model_not_ready", "too_few_model_instance")
# What a deployment that has only just come up may answer for a moment.
_NOT_READY_YET = (
    EndpointNotFoundError,
    EndpointTimeoutError,
    ModelError,
    ServiceError,
    ThrottledError,
)


@dataclass(frozen=True)
class ServedModel:
    """A registered model, and the route by which it was tuned."""

    name: str
    version: str
    route: str

    def is_held_by(self, deployment: OnlineDeployment) -> bool:
        """Whether the deployment serves this very version."""
        held = str(getattr(deployment, "model", "") or "").lower()
        arm_id = f"/models/{self.name}/versions/{self.version}".lower()
        # An answer may leave the model out.
        return not held or held.endswith((arm_id, f":{self.name}:{self.version}".lower()))


def deploy(clients: Clients, recipe: Recipe, run: Run, progress: Progress) -> EndpointManifest:
    """Bring the registered model up."""
    section = recipe.azure
    settings = section.endpoint
    registration = run.require(RegistrationManifest)
    route = run.require(ModelManifest).route
    model = ServedModel(registration.model, registration.model_version, route)
    refuse_retired(settings.instance_type, "azure.endpoint.instance_type")
    find_size(clients, settings.instance_type, "azure.endpoint.instance_type")
    name = endpoint_name(section, clients.place, run)
    endpoint, is_new = ensure_endpoint(clients, section, run, name, progress)
    before = undo_interrupted(clients, section, run, endpoint, progress)
    target = DeploymentId(name, free_name(clients, section, endpoint, model, before))
    # Before the first machine, so that there is none without it, whatever kills this process.
    console.note(hold_deadline(clients, section, run, endpoint, progress, coming=target.name))
    settle = partial(settle_removals, clients, section, run, name, progress)
    ours = RUN_TAG in (endpoint.tags or {})  # an endpoint of somebody else has no workflow of ours
    try:
        ensure_deployment(clients, section, run, target, model, progress)
        access = access_to(clients, target.endpoint)
        question = question_of(recipe, run)
        reply = _first_answer(clients, access, target, question, progress)
        bills = what_bills(section, run, target)
        keeper = PutBackKeeper(clients, section, run, name, target.name, progress)
        rollout = Rollout(clients, recipe, run, target, before, access, progress, bills, keeper)
        rollout.go()
    except StageError as error:
        settled = settle(refused=target.name) if ours else []
        raise StageError("\n".join([str(error), *settled])) from None
    idle = _delete_surplus(clients, section, run, target, before, progress)
    settled = settle() if ours else []
    choices = [
        f"the endpoint {target.endpoint} {'is new' if is_new else 'existed'}; the deployment "
        f"answered through its header before it got the traffic",
        *rollout.lines,
        f"{settings.instance_count} x {settings.instance_type} bills until it is deleted: "
        "phi3 down --on azure",
    ]
    if idle:
        choices.append(
            f"without traffic, but billing: {', '.join(idle)}; delete with: phi3 down --on azure "
            f"--idle"
        )
    choices += settled
    return EndpointManifest(
        target=AZURE,
        endpoint=access.endpoint,
        endpoint_name=target.endpoint,
        deployment=target.name,
        engine=f"{settings.instance_count} x {settings.instance_type}",
        auth_mode=settings.auth_mode,
        instance_type=settings.instance_type,
        instance_count=settings.instance_count,
        traffic={target.name: 100},
        traffic_before=before,
        smoke={"question": question, "answer": reply.text, "request_id": reply.request_id},
        choices=choices,
    )


def ensure_endpoint(
    clients: Clients, section: AzureSection, run: Run, name: str, progress: Progress
) -> tuple[OnlineEndpoint, bool]:
    """The endpoint, and whether it was created now. StageError if it cannot be used."""
    from azure.ai.ml.entities import (
        IdentityConfiguration,
        ManagedIdentityConfiguration,
        ManagedOnlineEndpoint,
    )

    wanted = section.endpoint.auth_mode
    operations = clients.ml.online_endpoints
    existing = find("endpoint", name, operations.get)
    if existing is not None:
        auth_mode = str(existing.auth_mode).lower()
        if auth_mode != wanted:
            raise StageError(
                f"The endpoint {name} exists with the auth mode {auth_mode}, the recipe requires "
                f"{wanted}, and Azure cannot change it: set azure.endpoint.auth_mode={auth_mode}, "
                "or another azure.endpoint.name"
            )
        return _as_it_is(clients, section, existing, progress), False
    record(run, RunResource("endpoint", name))
    # A user-assigned identity has its roles before the first deployment pulls image and model; the
    # endpoint's own would get them only now, and roles take minutes to act.
    identity = ManagedIdentityConfiguration(resource_id=IDENTITY.id(clients.place))
    entity = ManagedOnlineEndpoint(
        name=name,
        auth_mode=wanted,
        description=f"Phi-3 of the run {run.name}",
        tags={**section.tags, RUN_TAG: run.name},
        identity=IdentityConfiguration(type="user_assigned", user_assigned_identities=[identity]),
    )
    with without_dots():
        endpoint = create(
            f"Creating the endpoint {name}",
            lambda: operations.begin_create_or_update(entity),
            lambda: operations.get(name),
            progress,
            limit=section.poll.deploy_timeout,
            pause=section.poll.interval,
        )
    return endpoint, True


def _as_it_is(
    clients: Clients, section: AzureSection, endpoint: OnlineEndpoint, progress: Progress
) -> OnlineEndpoint:
    """An endpoint that exists, once nothing changes it any more, with the traffic that it has."""
    operations, name = clients.ml.online_endpoints, str(endpoint.name)
    read: Callable[[], OnlineEndpoint] = partial(operations.get, name)
    poll = section.poll
    if state_of(endpoint) not in ("succeeded", "failed", "canceled"):
        ends = time.monotonic() + poll.deploy_timeout
        doing = f"Waiting for the endpoint {name}"
        try:
            return wait_until_ready(doing, read, progress, ends=ends, pause=poll.interval)
        except StageError:
            endpoint = read_endpoint(clients, name)
    if state_of(endpoint) not in ("failed", "canceled"):
        return endpoint
    # A change of it failed. What was read is sent back: a PUT without its traffic would take the
    # traffic from the deployment that still answers.
    with without_dots():
        return create(
            f"Repairing the endpoint {name}",
            partial(operations.begin_create_or_update, endpoint),
            read,
            progress,
            limit=poll.deploy_timeout,
            pause=poll.interval,
        )


def read_endpoint(clients: Clients, name: str) -> OnlineEndpoint:
    """The endpoint. StageError where there is none."""
    with explained(f"Reading the endpoint {name}"):
        endpoint: OnlineEndpoint = clients.ml.online_endpoints.get(name)
    return endpoint


def free_name(
    clients: Clients,
    section: AzureSection,
    endpoint: OnlineEndpoint,
    model: ServedModel,
    shares: Mapping[str, int],
) -> str:
    """A name for the model's deployment that nothing else has which is live or kept.

    `shares`: who has the traffic. A deployment that was replaced in its place could neither answer
    meanwhile nor be rolled back to.
    """
    live = {*traffic_shares(shares), *traffic_shares(endpoint.mirror_traffic)}
    get = clients.ml.online_deployments.get
    base = deployment_name(section, model.name, model.version)
    for number in itertools.count(1):  # NAME, NAME-2, NAME-3, …, each short enough
        mark = f"-{number}" if number > 1 else ""
        name = f"{base[: LONGEST_NAME - len(mark)].rstrip('-')}{mark}" if mark else base
        existing = find("deployment", name, lambda own: get(own, str(endpoint.name)))
        if existing is None:
            return name
        if state_of(existing) == "failed":
            # It does not recover by itself. Without traffic nothing is lost with it.
            if name not in live:
                return name
        elif model.is_held_by(existing):
            return name
    raise AssertionError("names do not end")


def ensure_deployment(
    clients: Clients,
    section: AzureSection,
    run: Run,
    target: DeploymentId,
    model: ServedModel,
    progress: Progress,
) -> Outcome:
    """Create the deployment, without traffic.

    StageError with the end of its log, and with what bills now.
    """
    operations = clients.ml.online_deployments
    read = partial(operations.get, target.name, target.endpoint)
    existing: OnlineDeployment | None = find("deployment", target.name, lambda _name: read())
    if existing is not None and state_of(existing) == "succeeded" and model.is_held_by(existing):
        return "exists"
    if existing is not None and state_of(existing) == "failed":
        # It bills and does not recover by itself. It answers no requests, so nothing is lost.
        delete_deployment(clients, section, target, progress)
    record(run, RunResource("deployment", target.name, target.endpoint))
    entity = deployment_entity(section, run, target, model)

    submit = partial(
        within,
        f"submitting the deployment {target.name}",  # uploads code, where the model is our own
        partial(operations.begin_create_or_update, entity),
        progress,
        limit=section.poll.upload_timeout,
    )

    try:
        with without_dots():
            create(
                f"Creating the deployment {target.name} (minutes; a GPU bills from now on)",
                lambda: when_cores_are_free(clients, section, submit, progress),
                read,
                progress,
                limit=section.poll.deploy_timeout,
                pause=section.poll.interval,
            )
    except StageError as error:
        # The failure, the end of the container's log, and what bills now.
        try:
            exists = find("deployment", target.name, lambda _name: read()) is not None
        except StageError:  # it may exist, and then it bills
            exists = True
        if not exists:
            raise StageError(
                f"{error}\nNo deployment {target.name} was created: nothing new bills."
            ) from None
        message, text = str(error), _read_log(clients, target)
        if text:
            path = run.file("azure", "deployment.log")
            path.write_text(text + "\n", encoding="utf-8")
            message += f"\nThe end of its log (more in {path}):{_last_lines(text)}"
        raise StageError(
            f"{message}\nThe deployment {target.name} stays in {target.endpoint} as it is and "
            f"bills until it is deleted: phi3 down --on azure --failed --run {run.name}. "
            "`phi3 up` replaces it."
        ) from None
    return "created"


def deployment_entity(
    section: AzureSection, run: Run, target: DeploymentId, model: ServedModel
) -> ManagedOnlineDeployment:
    """The body of the deployment, as the SDK's entity."""
    from azure.ai.ml.entities import (
        CodeConfiguration,
        ManagedOnlineDeployment,
        OnlineRequestSettings,
        ProbeSettings,
    )

    settings = section.endpoint
    # A model of our own job brings scoring script and environment; a model of the pipeline is
    # served by the image that its MLmodel file names.
    is_ours = model.route == "job"
    code = CodeConfiguration(code=str(code_folder(run)), scoring_script=SCRIPT) if is_ours else None
    variables = {
        "PHI3_CONCURRENCY": str(settings.max_concurrent_requests_per_instance),
        # Azure's inference server ends a worker after this many seconds; it must outlive the
        # longest request that the front door waits for.
        "WORKER_TIMEOUT": str(settings.request_timeout_ms // 1000 + 30),
    }
    return ManagedOnlineDeployment(
        name=target.name,
        endpoint_name=target.endpoint,
        model=f"azureml:{model.name}:{model.version}",
        code_configuration=code,
        environment=serving_environment(section) if is_ours else None,
        environment_variables=variables if is_ours else None,
        instance_type=settings.instance_type,
        instance_count=settings.instance_count,
        # "Managed online deployment YAML reference": a request may take 5 s by default and 180 s at
        # most. Beyond twice the concurrent requests of all instances the front door answers 429.
        request_settings=OnlineRequestSettings(
            request_timeout_ms=settings.request_timeout_ms,
            max_concurrent_requests_per_instance=settings.max_concurrent_requests_per_instance,
        ),
        liveness_probe=ProbeSettings(**settings.liveness_probe.model_dump()),
        readiness_probe=ProbeSettings(**settings.readiness_probe.model_dump()),
        app_insights_enabled=settings.app_insights_enabled,
        tags={**section.tags, RUN_TAG: run.name},
    )


def code_folder(run: Run) -> Path:
    """Write what a deployment of our own model runs: a scoring script and those of our files."""
    folder = run.path / "azure" / "serve"
    if folder.exists():
        shutil.rmtree(folder)
    copy_carried(folder, _SCORING)
    (folder / SCRIPT).write_text(_SCRIPT_TEXT, encoding="utf-8")
    return folder


def _read_log(clients: Clients, target: DeploymentId) -> str:
    """The containers' last lines, without secrets; '' where there are none."""
    from azure.core.exceptions import AzureError

    parts = []
    # The first container downloads the model, the second runs the scoring script.
    for container in ("storage-initializer", "inference-server"):
        try:
            parts.append(
                clients.ml.online_deployments.get_logs(
                    target.name, target.endpoint, lines=LOG_LINES, container_type=container
                )
            )
        except AzureError as error:
            log.info("no log of the %s: %s", container, type(error).__name__)
    return scrub("\n".join(part.strip() for part in parts if part.strip()))


def _last_lines(text: str) -> str:
    return "".join(f"\n  {line}" for line in text.splitlines()[-_SHOWN_LINES:])


def access_to(clients: Clients, name: str) -> Access:
    """URL and key of an endpoint; with Entra sign-in no key, but where a fresh token comes from."""
    with explained(f"Reading the endpoint {name}"):
        endpoint = clients.ml.online_endpoints.get(name)
        url = str(endpoint.scoring_uri or "")
        if not url:
            raise StageError(f"The endpoint {name} has no address yet: it is {state_of(endpoint)}")
        if str(endpoint.auth_mode).lower() == "aad_token":
            # The audience is Azure ML's own (ml.azure.com), not ARM's.
            credential = clients.credential
            return Access(url, token_provider=lambda: str(credential.get_token(SCOPE).token))
        keys = clients.ml.online_endpoints.get_keys(name)
        key = getattr(keys, "primary_key", None) or getattr(keys, "access_token", None)
        if not key:
            raise StageError(f"The endpoint {name} returned no key; check its auth mode")
        return Access(url, key=str(key))


def _first_answer(
    clients: Clients,
    access: Access,
    target: DeploymentId,
    question: str,
    progress: Progress,
) -> ChatReply:
    """One answer of the new deployment, before it gets any traffic. StageError without one."""
    ends = time.monotonic() + _SMOKE_SECONDS
    pause, failures = clients.poll.interval, 0
    # 200 s: a little more than Azure lets a request take (180 s). The client names the deployment
    # in the header azureml-model-deployment, which goes past the traffic rules. (The SDK's `invoke`
    # would keep that header for all later calls of the process.)
    # Without retries of its own, because this loop asks again.
    with access.client(deployment=target.name, max_retries=0, deadline=200.0) as client:
        while True:
            try:
                messages = [{"role": "user", "content": question}]
                # Short, and the same each time.
                reply = client.chat(messages, temperature=0.0, max_new_tokens=64)
            except Phi3Error as error:
                # A status of 200 means that the model itself answered, and not with text.
                may_settle = isinstance(error, _NOT_READY_YET) and error.status != 200
                failures += isinstance(error, ModelError) and error.reason not in _COMING_UP
                if time.monotonic() > ends or failures >= _MODEL_TRIES or not may_settle:
                    lines = _last_lines(_read_log(clients, target))
                    log_end = f"\nThe end of its log:{lines}" if lines else ""
                    raise StageError(
                        f"The deployment {target.name} of {target.endpoint} is up but does not "
                        f"answer, so it gets no traffic: {error}{log_end}\nIt bills until it is "
                        "deleted: phi3 down --on azure --idle"
                    ) from None
                note(progress, f"asking {target.name}: not ready yet ({type(error).__name__})")
            else:
                refuse_no_answer(target, reply.text, question)
                return reply
            time.sleep(pause)
            pause = min(2 * pause, max(_LONGEST_PAUSE, clients.poll.interval))


def refuse_no_answer(target: DeploymentId, text: str, question: str = "") -> None:
    """StageError where an answer is empty or not printable text: no model of chats says that."""
    fault = fault_of(text)
    if fault:
        raise StageError(
            f"The deployment {target.name} of {target.endpoint} answered {question!r} with "
            f"{text[:60]!r}: {fault}. So it gets no traffic.\nIt bills until it is deleted: "
            "phi3 down --on azure --idle"
        )


def what_bills(section: AzureSection, run: Run, target: DeploymentId) -> str:
    """That a deployment which is up without traffic bills, and how it goes."""
    settings = section.endpoint
    return (
        f"The deployment {target.name} of {target.endpoint} ({settings.instance_count} x "
        f"{settings.instance_type}) is up without traffic and bills until it is deleted: "
        f"phi3 down --on azure --idle --run {run.name}"
    )


def _delete_surplus(
    clients: Clients,
    section: AzureSection,
    run: Run,
    target: DeploymentId,
    before: Mapping[str, int],
    progress: Progress,
) -> list[str]:
    """Delete the run's oldest deployments beyond those to keep; what is left without traffic.

    Of those to keep, the ones that had the traffic `before` come first: a rollback goes to them.
    """
    with explained(f"Listing the deployments of {target.endpoint}"):
        listed = clients.ml.online_deployments.list(target.endpoint)
        existing = {str(item.name) for item in listed}
    others = existing - {target.name}
    ours = [
        resource.name
        for resource in recorded_resources(run, "deployment")
        if resource.parent == target.endpoint and resource.name in others
    ]
    ours.sort(key=lambda name: name in before)  # stable: the oldest first, those before it last
    surplus = ours[: max(0, len(ours) + 1 - section.endpoint.keep_deployments)]
    for name in surplus:
        delete_deployment(clients, section, DeploymentId(target.endpoint, name), progress)
        forget(run, RunResource("deployment", name, target.endpoint))
    return sorted(others - set(surplus))


def delete_deployment(
    clients: Clients, section: AzureSection, target: DeploymentId, progress: Progress
) -> bool:
    """Delete a deployment that gets no traffic, and wait until it is gone; False if none was."""
    operations = clients.ml.online_deployments
    return delete(
        f"Deleting the deployment {target.name}",
        lambda: operations.begin_delete(target.name, target.endpoint),
        lambda: operations.get(target.name, target.endpoint),
        progress,
        limit=section.poll.delete_timeout,
        pause=section.poll.interval,
    )
