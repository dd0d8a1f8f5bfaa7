"""A signal while torch is imported, whose C++ aborts where Python would raise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.commands import ROOT

TORCH = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass
except KeyboardInterrupt:
    os.abort()
"""
PROGRAM = "from htsr_alloc.cli.failures import stop_on_signals\nstop_on_signals()\nimport torch\n"


@pytest.mark.parametrize(
    ("name", "code", "said"), [("SIGINT", 130, "interrupted."), ("SIGTERM", 143, "terminated.")]
)
def test_a_signal_in_torchs_import_ends_in_a_sentence(name, code, said, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH.format(name=name))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.splitlines()[-1].endswith(said)
