"""The ``veneer`` command: one file a subcommand, each a thin shell around library code."""
