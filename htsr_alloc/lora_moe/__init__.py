"""LoRA-MoE systems as one PEFT tuner."""
