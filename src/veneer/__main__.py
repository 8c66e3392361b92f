"""``python -m veneer`` is the ``veneer`` command."""

from veneer.cli.quick import main

main()
