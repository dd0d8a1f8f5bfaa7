"""``python -m htsr_alloc`` is the ``htsr`` command."""

from htsr_alloc.cli.main import main

if __name__ == "__main__":
    main()
