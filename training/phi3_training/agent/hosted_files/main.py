"""The agent as Foundry hosts it: the Responses protocol on port 8088, by Microsoft's adapter."""

import os

from agent_framework.observability import disable_instrumentation
from agent_framework_foundry_hosting import ResponsesHostServer

from phi3_agent import create_agent

if not os.environ.get("PHI3_TRACE"):
    disable_instrumentation()

# The platform keeps the conversations, so the agent needs no memory of its own.
ResponsesHostServer(create_agent(instructions=os.environ.get("PHI3_SYSTEM"))).run()
