"""`python -m phi3_training.serve`: the endpoint as a separate process."""

import sys

from .server import main

sys.exit(main())
