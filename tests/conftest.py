"""Programs that tests start find the modules compiled, as they are where veneer is installed."""

import os

# Else each of hundreds of processes compiles all that it imports: a third of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
