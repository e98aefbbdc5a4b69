"""Azure Machine Learning as target: the only place that imports azure.

target.py has a thin method for each stage; the work is in provision, train (with command_job,
in_job, pipeline_job), register, deploy (with rollout) and prompt_flow. What bills and what ends it:
status, costs, deadline, teardown. Below all of them: place (names), clients, operations, failures.
docs/azure-design.md lists every module.
"""
