"""Keeps torch's threads from spinning on a busy machine; torch is imported here.

A thread that waits for the other ones of a product looks many times before it sleeps. On a quiet
machine that is what makes two threads fast; under load it takes the CPU time that other programs,
and the thread waited for, need. Reads the load; writes nothing but the environment, for the import.
"""

from __future__ import annotations

import os
import sys

# How often a waiting thread looks; OpenMP's own number is 300,000, at each of thousands of meetings
# a step. With a load of 5 to 8 on two cores four steps of a 135 M model did not end within 100 s
# with that number (twice), and took 15 to 25 s with this one (twice).
_LOOKS = "2000"
# A machine is idle while fewer programs than this share of its cores are ready to run.
_QUIET_SHARE = 0.75
_SETTING = "GOMP_SPINCOUNT"
_OTHER = "OMP_WAIT_POLICY"


def import_torch_without_spinning() -> None:
    """Import torch so where the machine is busy; nothing where it is imported or set by the user.

    OpenMP reads the setting once, when it is loaded; child processes are not to inherit it.
    """
    if "torch" in sys.modules or _SETTING in os.environ or _OTHER in os.environ or is_quiet():
        return
    os.environ[_SETTING] = _LOOKS
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[_SETTING]


def is_quiet() -> bool:
    """Whether other programs leave the cores free: the load of the last minute; False unknown."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return False
    return load < _QUIET_SHARE * (os.cpu_count() or 1)
