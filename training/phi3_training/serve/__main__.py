"""`python -m phi3_training.serve`: the endpoint as a process of its own."""

import sys

from .server import main

sys.exit(main())
