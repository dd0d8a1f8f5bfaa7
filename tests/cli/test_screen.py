"""What reaches the terminal: no control characters and no invisible ones."""

import json
import shutil
import unicodedata

import pytest
import torch
from helpers.commands import ROOT
from safetensors.torch import save_file

from htsr_alloc.cli.screen import clean

BIDI = [chr(c) for c in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
ZERO_WIDTH = [chr(c) for c in (0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x00AD)]
CONTROLS = [chr(c) for c in (*range(0x20), *range(0x7F, 0xA0))]
LINES = ["\u2028", "\u2029"]
HIDING = [*BIDI, *ZERO_WIDTH]


@pytest.mark.parametrize("bad", [*HIDING, *CONTROLS, *LINES, "\ud800"], ids=ascii)
def test_what_drives_a_terminal_or_hides_is_replaced(bad):
    assert clean(f"q{bad}_proj") == "q?_proj"


@pytest.mark.parametrize("good", ["q_proj", "Überschrift", "層.0", "α̂ = 2,5\u00a0…", "█ ±1 🙂"])
def test_words_stay_as_they_are(good):
    assert clean(good) == good


def hidden_in(text):
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]


def test_names_in_files_cannot_turn_the_line_around(invoke, tmp_path):
    """Tensor names, reasons, files' names in a table's head, and errors."""
    evil = "gpj\u202e\u200b\x1b[2J"
    save_file(
        {f"h.0.{evil}.weight": torch.zeros(4, 4), "h.0.b.weight": torch.randn(64, 64),
         f"h.1.{evil}.weight": torch.randn(64, 64), evil: torch.ones(3)},
        tmp_path / "m.safetensors",
    )  # fmt: skip
    written = [invoke("inspect", "m.safetensors"), invoke("analyze", "m.safetensors")]
    shutil.copy(tmp_path / "m.metrics.json", tmp_path / f"{evil}.metrics.json")
    written.append(invoke("compare", "m.metrics.json", f"{evil}.metrics.json"))
    assert [done.rc for done in written] == [0, 0, 0]
    written.append(invoke("inspect", evil))
    data = json.loads((tmp_path / "m.metrics.json").read_text())
    data["layers"][1] |= {"unfitted": 1, "reason": f"1 of 1 matrices have no fit: {evil}"}
    (tmp_path / "m.metrics.json").write_text(json.dumps(data))
    written.append(invoke("allocate", "m.metrics.json", "--T", 4, "-o", "a.json"))
    for done in written:
        assert "gpj?" in done.stdout + done.stderr
        assert hidden_in(done.stdout + done.stderr) == []


def test_a_table_s_head_is_no_markup(invoke, tmp_path):
    source = ROOT / "data" / "smollm2.metrics.json"
    for name in ("a", "[red]b"):
        shutil.copy(source, tmp_path / f"{name}.metrics.json")
    done = invoke("compare", "a.metrics.json", "[red]b.metrics.json")
    assert "[red]b" in done.stdout.splitlines()[0]
