"""The lm-evaluation-harness with this project's adapters known to PEFT.

    python -m htsr_alloc.lm_eval --model hf --model_args pretrained=DIR,peft=ADAPTER --tasks ...

Every argument is lm_eval's own.
"""

from __future__ import annotations

import sys

from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError


def main() -> None:
    """Register the tuner and hand over.

    Raises:
        HtsrError: lm_eval is not installed, or PEFT.
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise HtsrError(
            f"The lm-evaluation-harness cannot be imported ({error}).", "pip install lm_eval"
        ) from None
    import htsr_alloc.lora_moe  # noqa: F401 - PEFT knows the adapters from here on

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except HtsrError as error:
        Screen().error(error)
        sys.exit(1)
