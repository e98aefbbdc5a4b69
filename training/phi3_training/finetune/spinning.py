"""Keeps torch's threads from spinning while they wait for each other; torch is imported here.

Reads and writes nothing but the environment, for the time of the import.
"""

from __future__ import annotations

import os
import sys

# A thread that waits looks so often before it sleeps; OpenMP's own number is 300,000, at each of
# thousands of meetings a step. With a load of 5 to 8 on two cores four steps of a 135 M model did
# not end within 100 s with that number (twice), and took 15 to 25 s with this one (twice).
_LOOKS = "2000"
_SETTING = "GOMP_SPINCOUNT"
_OTHER = "OMP_WAIT_POLICY"


def import_torch_without_spinning() -> None:
    """Import torch so; nothing where it is there already or where the user has set it otherwise.

    OpenMP reads the setting once, when it is loaded; child processes are not to inherit it.
    """
    if "torch" in sys.modules or _SETTING in os.environ or _OTHER in os.environ:
        return
    os.environ[_SETTING] = _LOOKS
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[_SETTING]
