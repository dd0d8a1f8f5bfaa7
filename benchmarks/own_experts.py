"""Ranks inside the own experts of every mixture of transformers, as tiny random models.

    python benchmarks/own_experts.py [--only NAME ...]

Each mixture that ``families.py`` can make is saved as hub checkpoints look, analysed, allocated by
``--for lora --target experts`` and adapted by PEFT. One row a mixture: the parameters that the
allocation counts, those that become trainable, or why it is refused.
"""

import argparse
import json
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from families import first_line
from family_models import R, classes, tiny_model


def row(task: str, name: str, folder: Path) -> list[str] | None:
    """Counted, trainable and a refusal; None of a family that is no mixture or is not made."""
    from peft import LoraConfig, get_peft_model

    from htsr_alloc import HtsrError, allocate, analyze
    from htsr_alloc.lora_moe.plain import control

    try:
        model = tiny_model(task, name)
        model.save_pretrained(folder)
        metrics = analyze(folder, estimator="median")
    except Exception:  # families.py says why
        return None
    assert metrics is not None
    if all(matrix.expert is None for matrix in metrics.matrices):
        return None
    more = {"adapter_kind": "lora", "rank": R, "strategy": "uniform"}
    made = allocate(metrics, targets=["experts"], **more)
    assert made.parameters is not None
    counted = made.parameters.spent
    try:
        text = control(model, made, lora_dropout=0.0, target_modules=["experts"])
    except HtsrError as error:
        return [f"{counted:,}", "", first_line(error)]
    adapted = get_peft_model(model, LoraConfig(**json.loads(text)))
    return [f"{counted:,}", f"{adapted.get_nb_trainable_parameters()[0]:,}", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[])
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| mixture | counted | trainable | refused |\n|---|---|---|---|", flush=True)
    seen: set[str] = set()
    found: list[list[str]] = []
    for task in ("lm", "vl", "s2s"):
        for name in classes(task):
            if name in seen or (only and name not in only):
                continue
            seen.add(name)
            with tempfile.TemporaryDirectory() as folder:
                cells = row(task, name, Path(folder))
            if cells is not None:
                found.append(cells)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
    equal = sum(counted == trainable for counted, trainable, _ in found)
    refused = sum(bool(why) for *_, why in found)
    print(
        f"\n{len(found)} mixtures, {equal} with the parameters that were counted, {refused} ",
        end="",
    )
    print(f"refused; transformers {transformers.__version__}, PEFT {peft.__version__}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
