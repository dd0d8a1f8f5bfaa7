"""A configuration of axolotl."""

from __future__ import annotations

import json

from htsr_alloc.allocation.exports.modules import Modules, refuse_modules
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation
from htsr_alloc.records.lora import Lora


def to_axolotl(allocation: Allocation, lora: Lora, modules: Modules | None = None) -> str:
    """The LoRA part of an axolotl configuration (YAML).

    axolotl has one rank for all layers. Where the allocation needs several, the YAML starts
    from an adapter folder made with the ``peft-rank`` export, and says how.
    """
    refuse_modules("axolotl", modules)
    counts = [row.experts for row in allocation.modules] or allocation.experts
    present = sorted(set(counts) - {0})
    if not present:
        raise HtsrError("No layer has an expert, so that there is nothing to train.")
    lines = ["adapter: lora", f"lora_dropout: {lora.lora_dropout:g}"]
    if lora.target_modules:
        lines.append(f"lora_target_modules: {json.dumps(list(lora.target_modules))}")
    else:
        lines.append("lora_target_linear: true")
    if len(present) == 1 and not allocation.modules:
        lines += [f"lora_r: {lora.r * present[0]}", f"lora_alpha: {lora.lora_alpha * present[0]}"]
        if 0 in allocation.experts:
            chosen = [i for i, n in enumerate(allocation.experts) if n]
            lines.append(f"peft_layers_to_transform: {json.dumps(chosen)}")
        return "\n".join(lines) + "\n"
    head = [
        "# axolotl knows one rank for all layers; per-layer ranks come from an adapter folder:",
        "#   htsr export ALLOCATION --to peft-rank --model MODEL -o lora.json",
        '#   python -c "import json, peft, transformers as t; peft.get_peft_model('
        "t.AutoModelForCausalLM.from_pretrained('MODEL'), "
        "peft.LoraConfig(**json.load(open('lora.json')))).save_pretrained('./adapter')\"",
    ]
    lines += [
        f"lora_r: {lora.r}",
        f"lora_alpha: {lora.lora_alpha}",
        "lora_model_dir: ./adapter",
    ]
    return "\n".join(head + lines) + "\n"
