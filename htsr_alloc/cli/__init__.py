"""The ``htsr`` command: its arguments, its output, one file a command."""
