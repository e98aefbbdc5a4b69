"""What Azure checks when a job is submitted, and what our process then needs to carry it out."""

from __future__ import annotations

import re
import uuid

from . import assets, catalogue, component, foundation, registries
from .cloud import Cloud, stamps
from .signin import AUDIENCES, claims_of
from .wire import AzureError, Json, asset_id, bad

_LITERAL, _PARENT = "literal", re.compile(r"\$\{\{parent\.(inputs|outputs)\.([\w-]+)\}\}")


def document(workspace: Json, name: str, given: Json) -> Json:
    """The job as it is answered: every output has an address, the studio a page."""
    store = f"azureml://datastores/workspaceblobstore/paths/azureml/{name}"
    artifacts = f"azureml://datastores/workspaceartifactstore/ExperimentRun/dcid.{name}"
    outputs: Json = {}
    for output, value in (given.get("outputs") or {}).items():
        value = dict(value or {})
        value["uri"] = value.get("uri") or f"{store}/{output}/"
        outputs[output] = value
    default = {"default": {"jobOutputType": "uri_folder", "uri": artifacts}}
    if given["jobType"] == "Command":
        outputs |= default
    workspace_id = workspace["id"]
    page = f"https://ml.azure.com/runs/{name}?wsid={workspace_id}"
    services = {
        "Studio": {"jobServiceType": "Studio", "endpoint": page},
        "Tracking": {
            "jobServiceType": "Tracking",
            "endpoint": workspace["properties"]["mlFlowTrackingUri"],
        },
    }
    properties = {
        **given,
        "experimentName": given.get("experimentName") or "Default",
        "displayName": given.get("displayName") or name,
        "outputs": outputs,
        "services": services,
        "status": "NotStarted",
        "isArchived": False,
        "properties": {**(given.get("properties") or {}), "ContentSnapshotId": str(uuid.uuid4())},
    }
    return {"properties": properties, "systemData": stamps(), "_artifacts": artifacts}


def command(cloud: Cloud, workspace: Json, given: Json) -> Json:
    """What the process of a command job needs, after Azure's checks."""
    size = _size_of(cloud, given)
    command = str(given.get("command") or "")
    inputs, outputs = given.get("inputs") or {}, given.get("outputs") or {}
    for part, names in (("inputs", inputs), ("outputs", outputs)):
        for used in re.findall(rf"\$\{{\{{{part}\.([\w-]+)\}}\}}", command):
            if used not in names:
                raise bad(f"The command refers to {part}.{used}, which the job does not define.")
    if not given.get("environmentId"):
        raise bad("A command job needs an environment.", "ValidationError")
    code = given.get("codeId")
    place = None
    if code:
        doc = cloud.get(asset_id(code))
        if doc is None:
            raise bad(f"The code '{code}' was not found.")
        place = str(assets.locate(cloud, workspace, doc["properties"]["codeUri"]))
    distribution = given.get("distribution") or {}
    nodes = int((given.get("resources") or {}).get("instanceCount") or 1)
    each = int(distribution.get("processCountPerInstance") or 1) if distribution else 1
    gpus = size.gpus if size else 0
    if distribution and gpus and each > gpus:
        raise bad(f"{each} processes are asked for on a node with {gpus} GPUs.")
    return {
        "kind": "command",
        "command": command,
        "code": place,
        "inputs": {name: _input(cloud, workspace, name, v) for name, v in inputs.items()},
        "environment": given.get("environmentVariables") or {},
        "nodes": nodes if distribution else 1,
        "processes": each,
        "limits": given.get("limits") or {},
    }


def _size_of(cloud: Cloud, given: Json) -> catalogue.Size | None:
    """The machine of a job, after a look at the cluster and its room. Raises AzureError."""
    compute_id = given.get("computeId")
    resources = given.get("resources") or {}
    wanted = int(resources.get("instanceCount") or 1)
    if not compute_id:
        found = catalogue.find_size(str(resources.get("instanceType") or ""))
        if found is None:
            raise bad("A job without a compute target needs resources.instance_type.")
        return found[1]
    cluster = cloud.get(str(compute_id))
    if cluster is None:
        name = str(compute_id).rsplit("/", 1)[-1]
        raise bad(f"The compute target '{name}' was not found in the workspace.")
    inner = cluster["properties"]["properties"]
    most = int((inner.get("scaleSettings") or {}).get("maxNodeCount", 1))
    if wanted > most:
        raise bad(f"The job needs {wanted} nodes; the cluster '{cluster['name']}' has {most}.")
    found = catalogue.find_size(inner["vmSize"])
    return found[1] if found else None


def _input(cloud: Cloud, workspace: Json, name: str, value: Json) -> Json:
    """An input as a literal or as the folder or file it lies in. Raises AzureError."""
    if value.get("jobInputType") == _LITERAL:
        return {"literal": str(value.get("value"))}
    uri = str(value.get("uri") or "")
    registered = foundation.asset(cloud, workspace, uri)
    place = registered or assets.locate(cloud, workspace, _asset_uri(cloud, uri))
    if registered is None and not place.exists():
        raise bad(f"The input '{name}' has no data at '{uri}'.", "UserError")
    return {"path": str(place)}


def _asset_uri(cloud: Cloud, uri: str) -> str:
    """The address of a registered asset's files."""
    doc = cloud.get(asset_id(uri))
    if doc is None:
        return uri
    properties = doc["properties"]
    return str(properties.get("modelUri") or properties.get("dataUri") or uri)


def check_user_token(cloud: Cloud, token: str | None) -> None:
    """A pipeline acts for the user: his token for the data plane comes along. AzureError (401)."""
    claims = claims_of(cloud, token) if token else None
    if claims is None or claims["aud"].rstrip("/") not in AUDIENCES["ml"]:
        raise AzureError(401, "UserError", "The token in x-azureml-token is missing or invalid.")


def pipeline(cloud: Cloud, workspace: Json, given: Json) -> Json:
    """What the process of a pipeline job needs, after a look at every input."""
    nodes = given.get("jobs") or {}
    if len(nodes) != 1:
        raise AzureError(501, "NotRehearsed", "Only pipelines of one component are rehearsed")
    ((_name, node),) = nodes.items()
    match = re.search(r"registries/azureml/components/([^/]+)/versions/(.+)", _id_of(node))
    if not match or match.groups() != (component.NAME, component.VERSION):
        raise bad(f"The component '{_id_of(node)}' was not found.")
    values = {
        name: _resolved(value, given.get("inputs") or {})
        for name, value in (node.get("inputs") or {}).items()
    }
    faults = _faults(values)
    faults += _compute_faults(cloud, workspace, values)
    if faults:
        details = [{"code": "InvalidInput", "message": fault} for fault in faults]
        raise bad("; ".join(faults), "UserError", details=details)
    return {
        "kind": "pipeline",
        "inputs": {n: _input(cloud, workspace, n, v) for n, v in values.items()},
        "bound": _bound_outputs(node, given),
    }


def _id_of(node: Json) -> str:
    return str(node.get("componentId") or node.get("component") or "")


def _resolved(value: Json, parent: Json) -> Json:
    """A node's input; what is bound to the pipeline's inputs replaced by those."""
    bound = _PARENT.fullmatch(str(value.get("value", "")))
    if bound is None:
        kind = value.get("job_input_type") or value.get("jobInputType")
        return {"jobInputType": kind, "value": value.get("value"), "uri": value.get("uri")}
    if bound.group(2) not in parent:
        raise bad(f"The pipeline has no input '{bound.group(2)}'.")
    found: Json = parent[bound.group(2)]
    return found


def _faults(values: dict[str, Json]) -> list[str]:
    """What the component would refuse: unknown inputs, wrong types, no model, no data."""
    faults = []
    for name, value in values.items():
        known = component.INPUTS.get(name)
        if known is None:
            faults.append(f"Unknown input '{name}' of {component.NAME}")
        elif known.is_literal != (value.get("jobInputType") == _LITERAL):
            faults.append(f"Input '{name}' must be of type {known.kind}")
        elif not known.is_literal and value["jobInputType"] != known.kind:
            faults.append(f"Input '{name}' is {value['jobInputType']}, expected {known.kind}")
        elif known.is_literal and (fault := known.fault(value.get("value"))):
            faults.append(f"Input '{name}': {fault}")
    if not {"mlflow_model_path", "pytorch_model_path", "huggingface_id"} & set(values):
        faults.append("One of mlflow_model_path, pytorch_model_path, huggingface_id is needed")
    if not {"train_file_path", "train_mltable_path"} & set(values):
        faults.append("One of train_file_path, train_mltable_path is needed")
    return faults


def _compute_faults(cloud: Cloud, workspace: Json, values: dict[str, Json]) -> list[str]:
    faults = []
    asked = {n: str(v.get("value")) for n, v in values.items() if v.get("value") is not None}
    name = asked.get("compute_finetune", "serverless")
    found = None
    if name == "serverless":
        size = asked.get("instance_type_finetune", "Standard_nc24rs_v3")
        found = catalogue.find_size(size)
        if found is None:
            faults.append(f"The VM size '{size}' is not available")
    for step in ("model_import", "preprocess", "finetune"):
        cluster = asked.get(f"compute_{step}", "serverless")
        doc = cloud.get(f"{workspace['id']}/computes/{cluster}")
        if cluster != "serverless" and doc is None:
            faults.append(f"The compute target '{cluster}' was not found")
        elif doc and step == "finetune":
            found = catalogue.find_size(doc["properties"]["properties"]["vmSize"])
    if found and found[1].gpus == 0:
        faults.append(f"SKUNotSupported: '{found[0]}' has no GPU")
    wanted = int(asked.get("number_of_gpu_to_use_finetuning", "1"))
    if found and wanted > max(found[1].gpus, 1):
        faults.append(f"{wanted} GPUs are asked for; '{found[0]}' has {found[1].gpus}")
    model = registries.find_model(str((values.get("mlflow_model_path") or {}).get("uri") or ""))
    if model and model[1]:
        faults.append(f"The model '{model[0]}' is archived and cannot be used in new jobs")
    return faults


def _bound_outputs(node: Json, given: Json) -> dict[str, str]:
    """For each output of the component, the pipeline's output that it becomes."""
    bound = {}
    for name, value in (node.get("outputs") or {}).items():
        match = _PARENT.fullmatch(str((value or {}).get("value", "")))
        if name not in component.OUTPUTS:
            raise bad(f"The component has no output '{name}'.")
        if match and match.group(2) in (given.get("outputs") or {}):
            bound[name] = match.group(2)
    return bound
