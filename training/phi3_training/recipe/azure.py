"""The recipe's `azure:` section: where on Azure Machine Learning, on what compute, how served.

Every name is checked against Azure's rules here, before any call. What is left out comes from the
environment, from the SDK's config.json or from a default (targets/azure/place.py).
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .sections import Positive, Section, Share

Scalar = str | int | float | bool


# Names: https://learn.microsoft.com/azure/azure-resource-manager/management/resource-name-rules.
# Azure refuses a wrong one only when the resource is made, minutes after the first of them.


def _follows(pattern: str, rule: str) -> AfterValidator:
    expression = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if not expression.fullmatch(value):
            raise ValueError(f"expected {rule}")
        return value

    return AfterValidator(check)


SubscriptionId = Annotated[
    str,
    _follows(
        r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
        "a subscription's GUID; show yours with: az account show --query id",
    ),
]
ResourceGroupName = Annotated[
    str,
    _follows(
        r"[\w().-]{0,89}[\w()-]",
        "1-90 letters, digits, '.', '_', '-' and parentheses, not ending in '.'",
    ),
]
WorkspaceName = Annotated[
    str,
    _follows(
        r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}",
        "3-33 letters, digits, '-' and '_', starting with a letter or digit",
    ),
]
Location = Annotated[
    str,
    # `East US` and `eastus` are the same place.
    BeforeValidator(lambda v: v.replace(" ", "").lower() if isinstance(v, str) else v),
    _follows(r"[a-z][a-z0-9]{2,29}", "an Azure region such as eastus"),
]
StorageName = Annotated[str, _follows(r"[a-z0-9]{3,24}", "3-24 lower-case letters and digits")]
KeyVaultName = Annotated[
    str,
    _follows(
        r"(?=.{3,24}$)[A-Za-z](-?[A-Za-z0-9])+",
        "3-24 letters, digits and single '-', starting with a letter",
    ),
]
InsightsName = Annotated[
    str,
    _follows(r"[\w().-]{0,254}[\w()-]", "1-255 letters, digits, '.', '_', '-', not ending in '.'"),
]
LogAnalyticsName = Annotated[
    str,
    _follows(
        r"[A-Za-z0-9][A-Za-z0-9-]{2,61}[A-Za-z0-9]",
        "4-63 letters, digits and '-', neither starting nor ending in '-'",
    ),
]
RegistryName = Annotated[str, _follows(r"[A-Za-z0-9]{5,50}", "5-50 letters and digits")]
IdentityName = Annotated[
    str,
    _follows(
        r"[A-Za-z0-9][A-Za-z0-9_-]{2,127}",
        "3-128 letters, digits, '-' and '_', starting with a letter or digit",
    ),
]
ComputeName = Annotated[
    str,
    _follows(
        r"(?=.{3,32}$)[A-Za-z][A-Za-z0-9-]*[A-Za-z0-9]",
        "3-32 letters, digits and '-', starting with a letter, not ending in '-'",
    ),
]
EndpointName = Annotated[
    str,
    _follows(
        r"(?=.{3,32}$)[A-Za-z](-?[A-Za-z0-9])+",
        "3-32 letters, digits and single '-', starting with a letter, not ending in '-'",
    ),
]
AssetName = Annotated[
    str,
    _follows(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}",
        "1-255 letters, digits, '.', '_' and '-', starting with a letter or digit",
    ),
]
# Azure compares names of sizes without case.
VmSize = Annotated[
    str,
    _follows(
        r"[Ss][Tt][Aa][Nn][Dd][Aa][Rr][Dd]_\w{2,60}", "a VM size such as Standard_NC24ads_A100_v4"
    ),
]
NO_DEADLINE = "none"
# Days, hours and minutes in this order, at least one of them.
_DURATION = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", re.ASCII)
_SHORTEST, _LONGEST = dt.timedelta(minutes=15), dt.timedelta(days=90)


def duration_of(text: str) -> dt.timedelta:
    """`8h`, `90m`, `2d12h` as a time. ValueError for what is none, or too short or long."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError("expected a duration such as 8h, 90m or 2d12h")
    days, hours, minutes = (int(part or 0) for part in match.groups())
    # Before they become a timedelta, which overflows beyond 10^9 days.
    if days > _LONGEST.days or hours > 24 * _LONGEST.days or minutes > 1440 * _LONGEST.days:
        raise ValueError("expected at most 90 days")
    duration = dt.timedelta(days=days, hours=hours, minutes=minutes)
    # A role takes minutes to act, and Azure looks once an hour: less would promise too much.
    if not _SHORTEST <= duration <= _LONGEST:
        raise ValueError("expected at least 15 minutes and at most 90 days")
    return duration


def check_deadline(value: object) -> str:
    """A duration in lower case, or `none`. ValueError for what is neither."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == NO_DEADLINE:
        return text
    try:
        duration_of(text)
    except ValueError as error:
        raise ValueError(f"{error}; to bill without an end, write none in so many words") from None
    return text


Deadline = Annotated[str, BeforeValidator(check_deadline)]
Version = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    Field(min_length=1, max_length=30),
]

# The smallest size that the catalogue lists for fine-tuning Phi-3; Azure retired the V100 sizes of
# the older tutorials (NC6s_v3 and its kin) on 30 September 2025.
GPU_SIZE = "Standard_NC24ads_A100_v4"


class ComputeSection(Section):
    """The GPU cluster that trains; with `min_instances: 0` it bills only while it works."""

    name: ComputeName = "gpu-cluster"
    """Name of the GPU cluster that trains; created if it does not exist."""
    size: VmSize = GPU_SIZE
    """VM size of the cluster."""
    # Quotas of their own: dedicated cores by family of sizes, low-priority ones in one pool.
    tier: Literal["Dedicated", "LowPriority"] = "Dedicated"
    """Dedicated, or LowPriority: cheaper, and Azure may take the machines away."""
    min_instances: Annotated[int, Field(ge=0, le=100)] = 0
    """Machines that always run and bill; 0: none while nothing is trained."""
    max_instances: Annotated[int, Field(ge=1, le=100)] = 1
    """The most machines at once."""
    idle_time_before_scale_down: Annotated[int, Field(ge=60, le=86_400)] = 120
    """Seconds without work after which a machine is released."""

    @model_validator(mode="after")
    def _counts_fit(self) -> ComputeSection:
        if self.min_instances > self.max_instances:
            raise ValueError("min_instances is larger than max_instances")
        return self


class FoundationModelSection(Section):
    """The catalogue's model for the route `pipeline`; `name` None: that of model.name_or_path."""

    name: AssetName | None = None
    """The catalogue's model for the route pipeline; none: that of model.name_or_path."""
    version: Version = "latest"
    """Its version, or latest."""
    registry_name: AssetName = "azureml"
    """Registry that has it."""


class ComponentSection(Section):
    """The registry's fine-tuning pipeline component."""

    name: AssetName = "chat_completion_pipeline"
    """Name of the fine-tuning pipeline component."""
    version: Version = "latest"
    """Its version, or latest."""
    registry_name: AssetName = "azureml"
    """Registry that has it."""


class EnvironmentSection(Section):
    """What our own trainer runs in (route `job`); `name` instead of `image` uses one that exists.

    The image needs Python's pip; the packages are installed from the shipped constraints.
    """

    name: AssetName | None = None
    """An environment that exists, for the route job; none: one made of `image`."""
    version: Version = "latest"
    """Its version, or latest."""
    registry_name: AssetName | None = None
    """Registry that has it; none: the workspace."""
    image: Annotated[str, Field(min_length=3)] = (
        "mcr.microsoft.com/azureml/openmpi5.0-cuda12.6-ubuntu24.04:latest"
    )
    """Container image that our trainer is installed on."""


class AzureTrainSection(Section):
    """How the model is fine-tuned: the catalogue's pipeline, or a command job with our trainer."""

    route: Literal["auto", "pipeline", "job"] = "auto"
    """pipeline: the catalogue's fine-tuning pipeline; job: our own trainer as a command job; auto
    chooses by what the recipe needs."""
    foundation_model: FoundationModelSection = FoundationModelSection()
    component: ComponentSection = ComponentSection()
    environment: EnvironmentSection = EnvironmentSection()
    # Inputs of the component, over the model's own defaults: apply_lora, lora_r, precision, …
    parameters: dict[str, Scalar] = {}
    """Inputs of the pipeline component by name (apply_lora, lora_r, precision, …), over the model's
    own defaults."""
    instance_count: Positive = 1
    """Machines that train together."""
    process_count_per_instance: Positive | None = None  # None: one for each GPU of the size
    """Processes on each machine; none: one for each of its GPUs."""
    shm_size: Annotated[str, Field(pattern=r"^[0-9]+[bkmgBKMG]$")] = "16g"
    """Shared memory of the container, such as 16g."""
    experiment_name: AssetName = "phi3-promptflow"
    """Experiment in the workspace that lists the jobs."""
    timeout_minutes: Positive = 1440
    """Minutes after which a job is cancelled."""


class ProbeSection(Section):
    """When Azure asks the container whether it lives and is ready; seconds."""

    initial_delay: Annotated[int, Field(ge=1, le=3600)] = 10
    """Seconds after the container's start before the first probe."""
    period: Annotated[int, Field(ge=1, le=3600)] = 10
    """Seconds between probes."""
    timeout: Annotated[int, Field(ge=1, le=300)] = 10
    """Seconds to wait for an answer."""
    success_threshold: Literal[1] = 1
    """Successes in a row that make it healthy; Azure takes 1 only."""
    failure_threshold: Annotated[int, Field(ge=1, le=1000)] = 30
    """Failures in a row that make it unhealthy."""


class EndpointSection(Section):
    """The managed online endpoint and its deployment; a GPU deployment bills until deleted."""

    name: EndpointName | None = None
    """Name of the endpoint, unique in its region; none: made of the run's name."""
    auth_mode: Literal["key", "aad_token"] = "key"
    """How clients sign in: the endpoint's key, or a Microsoft Entra token."""
    deployment: EndpointName | None = None
    """Prefix of the deployments' names: each model version gets a deployment of its own."""
    instance_type: VmSize = GPU_SIZE
    """VM size that serves; it bills until the deadline or phi3 down."""
    instance_count: Annotated[int, Field(ge=1, le=50)] = 1
    """Machines that serve."""
    # A language model needs far more than Azure's default of 5 s; 180 s is the most it takes.
    request_timeout_ms: Annotated[int, Field(ge=1000, le=180_000)] = 90_000
    """Time limit of a request in milliseconds; Azure's most is 180000."""
    # Azure's default is 1; more than twice this many waiting requests get status 429.
    max_concurrent_requests_per_instance: Annotated[int, Field(ge=1, le=1000)] = 8
    """Requests at once on each machine; more wait or get status 429."""
    # Loading weights takes minutes; a probe that gives up earlier restarts the container for ever.
    liveness_probe: ProbeSection = ProbeSection(initial_delay=600)
    """Whether the container lives; a failure restarts it."""
    readiness_probe: ProbeSection = ProbeSection(initial_delay=30, failure_threshold=90)
    """Whether it is ready for requests."""
    app_insights_enabled: bool = False
    """Send the deployment's figures to Application Insights."""
    # A managed endpoint does not scale to zero: left alone, the default size bills all the time.
    deadline: Deadline = "8h"
    """How long after its last deployment the endpoint deletes itself, such as 8h or 2d, also while
    this machine is off (phi3 azure extend moves it); none: it bills until phi3 down."""
    remove_failed_after: Deadline = "1h"
    """How long a deployment stays that failed or was worse than the one it was to replace, such as
    1h; then it deletes itself, also while this machine is off; none: until the deadline."""
    remove_unused_after: Deadline = "24h"
    """How long an old deployment without traffic stays for a rollback after the last change, such
    as 24h; then it deletes itself; none: until the deadline."""
    keep_deployments: Annotated[int, Field(ge=1, le=20)] = 2
    """Deployments kept at the endpoint; older ones without traffic are deleted."""


class RolloutSection(Section):
    """How a new deployment takes over from the one that has the traffic: in steps, each judged."""

    steps: Annotated[list[Annotated[int, Field(ge=1, le=100)]], Field(min_length=1)] = [5, 25, 100]
    """Shares of the traffic in percent that the new deployment gets, one after the other."""
    minutes: Annotated[float, Field(ge=0, le=1440)] = 5.0
    """Minutes for which each share is watched; 0: the questions are asked once."""
    questions: Annotated[int, Field(ge=20, le=1000)] = 20
    """Golden questions that both deployments are asked at each look, at least 20."""
    max_error_gain: Share = 0.02
    """By how much the share of requests without a real answer may rise over the old one's."""
    max_loss: Share = 0.1
    """By how much the share of right answers may fall below the old one's."""
    max_p95_ratio: Annotated[float, Field(ge=1, le=100)] = 1.5
    """How many times as long as the old one's slowest answers (95 % are faster) they may take."""
    # "Perform safe rollout of new deployments": at most 50 %, to one deployment.
    mirror: Annotated[int, Field(ge=0, le=50)] = 0
    """Percent of the requests that the new deployment gets as copies before the first step, at most
    50; nobody sees its answers to them."""

    @model_validator(mode="after")
    def _rises_to_all(self) -> RolloutSection:
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError("steps: expected rising shares of the traffic that end with 100")
        return self


class PollSection(Section):
    """Poll interval and timeouts, in seconds."""

    interval: Annotated[float, Field(ge=0.05, le=300)] = 5.0
    """Seconds between looks at a resource that is being created, at most."""
    job_interval: Annotated[float, Field(ge=0.05, le=600)] = 10.0
    """Seconds between looks at a job, at most: a job's first minutes are looked at more often."""
    retry_total: Annotated[int, Field(ge=0, le=20)] = 6
    """Repeats of a failed call to Azure."""
    retry_backoff_factor: Annotated[float, Field(ge=0.0, le=30)] = 0.8
    """Seconds before the first repeat; doubled each time."""
    provision_timeout: Annotated[float, Field(ge=1)] = 3600.0
    """Seconds after which creating a resource is given up."""
    deploy_timeout: Annotated[float, Field(ge=1)] = 5400.0
    """Seconds after which a deployment is given up."""
    delete_timeout: Annotated[float, Field(ge=1)] = 3600.0
    """Seconds after which a deletion is given up."""
    upload_timeout: Annotated[float, Field(ge=1)] = 7200.0
    """Seconds after which an upload of code, chats or weights is given up."""


class AzureSection(Section):
    """The `azure:` section; ids and names left out come from the environment or config.json."""

    subscription_id: SubscriptionId | None = None
    """The subscription's GUID; none: AZURE_SUBSCRIPTION_ID, config.json, or that of az login."""
    tenant_id: SubscriptionId | None = None
    """GUID of the Microsoft Entra tenant to sign in to; none: that of the sign-in."""
    resource_group: ResourceGroupName | None = None
    """Resource group; none: AZURE_RESOURCE_GROUP, config.json, or phi3-promptflow."""
    workspace_name: WorkspaceName | None = None
    """Azure Machine Learning workspace; none: from the environment, config.json, or a default
    name."""
    location: Location | None = None
    """Azure region; none: AZURE_LOCATION, config.json, or eastus."""
    storage_account: StorageName | None = None
    """Storage account of a new workspace; none: a default name."""
    key_vault: KeyVaultName | None = None
    """Key vault of a new workspace; none: a default name."""
    application_insights: InsightsName | None = None
    """Application Insights of a new workspace; none: a default name."""
    log_analytics: LogAnalyticsName | None = None
    """Log Analytics workspace of a new workspace; none: a default name."""
    container_registry: RegistryName | None = None
    """Container registry of a new workspace; none: Azure ML makes one when it needs it."""
    identity: IdentityName | None = None
    """User-assigned managed identity for jobs and endpoint; none: a default name."""
    hub: WorkspaceName | None = None
    """Foundry hub that also gets the connection; none: no hub."""
    project: WorkspaceName | None = None
    """Foundry project that also gets the connection; none: no project."""
    least_privilege: bool = False
    """Give the identity only the roles that each step needs."""
    tags: dict[str, str] = {}
    """Tags put on everything that is created, as name: text."""
    compute: ComputeSection = ComputeSection()
    train: AzureTrainSection = AzureTrainSection()
    endpoint: EndpointSection = EndpointSection()
    rollout: RolloutSection = RolloutSection()
    poll: PollSection = PollSection()

    @model_validator(mode="after")
    def _cluster_has_nodes(self) -> AzureSection:
        if self.train.instance_count > self.compute.max_instances:
            raise ValueError(
                f"train.instance_count {self.train.instance_count} needs that many machines, but "
                f"compute.max_instances is {self.compute.max_instances}"
            )
        return self
