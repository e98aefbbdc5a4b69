"""A rehearsed Azure on this machine, which the unmodified official SDKs talk to.

rehearsal = start(folder)          # a separate process; finds the one that runs
subprocess.run([...], env={**os.environ, **rehearsal.env})
rehearsal.close()                  # what it knows stays in the folder
"""

from .control import Rehearsal, calls, find, held, run_inside, start, stop

__all__ = ["Rehearsal", "calls", "find", "held", "run_inside", "start", "stop"]
