"""BASELINE for the benchmarks, not for use: what the tutorials' tool does, written again.

One `requests.post` per call (a new connection, and over https a new TLS context), no timeout,
no retry, its own logging setup, attribute access to the connection.
"""

import logging

import requests
from promptflow.connections import CustomConnection
from promptflow.core import tool

logging.basicConfig(level=logging.DEBUG)
logger = logging.getLogger(__name__)


@tool
def ask_endpoint(connection: CustomConnection, input_data: str) -> str:
    body = {
        "input_data": {
            "input_string": [{"role": "user", "content": input_data}],
            "parameters": {"temperature": 0.7, "max_new_tokens": 128},
        }
    }
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {connection.key}",
    }
    response = requests.post(connection.endpoint, json=body, headers=headers)  # noqa: S113
    response.raise_for_status()
    answer = response.json()
    logger.info("The endpoint answered with status %d", response.status_code)
    logger.debug("The whole answer: %s", answer)
    return answer["output"]
