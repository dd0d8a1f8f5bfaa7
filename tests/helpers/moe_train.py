"""A stock Trainer over a tiny data set of unequal lengths."""

from __future__ import annotations

import torch

VOCABULARY = 64


def rows(count=16, seed=0):
    """Token rows of 5 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 10, (count,), generator=generator).tolist()
    data = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in sizes]
    return [{"input_ids": ids, "labels": ids} for ids in data]


def collate(features):
    """Pad to 9 with labels of -100."""
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in features:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        pad = 9 - len(ids)
        batch["input_ids"].append(ids + [0] * pad)
        batch["attention_mask"].append([1] * len(ids) + [0] * pad)
        batch["labels"].append(labels + [-100] * pad)
    return {name: torch.tensor(values) for name, values in batch.items()}


def sft_arguments(out, **changes):
    """TRL's SFTConfig over rows that are tokenised already."""
    from trl import SFTConfig

    settings = {
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig(output_dir=str(out), **{**settings, **changes})


def trainer(model, out, batch=4, accumulate=1, steps=4, callbacks=(), kind=None, **settings):
    """transformers.Trainer (or ``kind``, a subclass) with nothing special about it."""
    from transformers import Trainer, TrainingArguments

    extra = settings.pop("trainer", {})
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=settings.pop("learning_rate", 1e-2),
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy=settings.pop("save_strategy", "no"),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    return (kind or Trainer)(
        model=model,
        args=arguments,
        train_dataset=rows(),
        data_collator=collate,
        callbacks=list(callbacks),
        **extra,
    )


def parameters(model):
    return {n: p.detach() for n, p in model.named_parameters() if "lora_moe" in n}


def tokenizer():
    """A tokenizer of numbered words: no hub is needed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1")
