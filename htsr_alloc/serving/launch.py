"""Starts vLLM's OpenAI server for an adapter, with the settings that the adapter needs."""

from __future__ import annotations

CPU = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
