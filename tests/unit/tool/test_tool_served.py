"""A served flow is quiet, in Prompt flow's server alone and where nobody asked for more."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from phi3_tool.promptflow_fixes import quiet_when_served

SERVER = "promptflow.core._serving.app_base"
LOGGERS = "promptflow._utils.logger_utils"


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """A logger of a stand-in for Prompt flow, in a process that serves."""
    made = logging.getLogger("phi3.test.execution")
    made.setLevel(logging.INFO)
    loggers = ModuleType(LOGGERS)
    loggers.LoggerFactory = SimpleNamespace(_existing_loggers=[made])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, LOGGERS, loggers)
    monkeypatch.setitem(sys.modules, SERVER, ModuleType(SERVER))
    monkeypatch.delenv("PF_LOGGING_LEVEL", raising=False)
    return made


def test_quiet_where_the_flow_is_served(logger: logging.Logger) -> None:
    quiet_when_served()
    assert logger.level == logging.ERROR


def test_nothing_changes_elsewhere(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, SERVER)
    quiet_when_served()
    assert logger.level == logging.INFO


def test_the_user_has_the_last_word(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PF_LOGGING_LEVEL", "INFO")
    quiet_when_served()
    assert logger.level == logging.INFO


def test_a_prompt_flow_that_keeps_its_loggers_elsewhere(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LOGGERS, ModuleType(LOGGERS))
    quiet_when_served()
    assert logger.level == logging.INFO
