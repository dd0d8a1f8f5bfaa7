"""The ``htsr`` command, and ``python -m htsr_alloc``."""

import signal


def main() -> None:
    """Entry point."""
    # Until the command can say it better: no traceback from the middle of an import.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    from htsr_alloc.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
