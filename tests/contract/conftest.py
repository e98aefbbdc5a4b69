"""Lets the golden files be sent by the stub endpoint of the integration tests."""

import sys
from pathlib import Path

for folder in ("contract", "integration"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
