"""`--trace`: the framework's spans on standard error, without prompts and answers."""

from __future__ import annotations

import sys

from agent_framework.observability import enable_instrumentation

from phi3_tool.errors import ConfigurationError


def print_traces() -> None:
    """One JSON object per span; raises ConfigurationError without opentelemetry-sdk."""
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
    except ModuleNotFoundError:
        raise ConfigurationError(
            "Traces need opentelemetry-sdk, which is not installed in this environment; install "
            f"it with: {sys.executable} -m pip install opentelemetry-sdk"
        ) from None
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stderr)))
    trace.set_tracer_provider(provider)
    enable_instrumentation(enable_sensitive_data=False)
