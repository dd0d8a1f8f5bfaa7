import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from helpers.commands import HEAVY, environment, llama, write_shards
from safetensors.torch import save_file

from htsr_alloc.records import Allocation, Metrics, loads
from htsr_alloc.version import __version__

COMMANDS = [
    *("inspect", "analyze", "fit", "allocate", "plot", "report"),
    *("compare", "export", "build", "train", "evaluate", "generate"),
    *("serve", "collapse", "study"),
]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m"


@pytest.fixture(scope="session")
def metrics_file(tmp_path_factory):
    """Metrics and spectra of a tiny model, made once."""
    from htsr_alloc.analysis.analyze import analyze
    from htsr_alloc.analysis.outputs import RunFiles
    from htsr_alloc.checkpoints.open import open_checkpoint
    from htsr_alloc.records import Settings

    folder = tmp_path_factory.mktemp("metrics")
    write_shards(folder / "tiny", [llama(4)])
    output = RunFiles(folder / "tiny.metrics.json")
    analyze(open_checkpoint(folder / "tiny"), Settings("official"), output)
    shutil.rmtree(folder / "tiny")
    return output.metrics


@pytest.fixture
def here(metrics_file, tmp_path):
    """The metrics and spectra, copied into the current folder of ``run`` and ``invoke``."""
    for file in metrics_file.parent.iterdir():
        shutil.copy2(file, tmp_path)
    return tmp_path / metrics_file.name


def read(path, kind=Allocation):
    return loads(kind, path.read_bytes(), path.name)


# --- the two commands of the README ---------------------------------------------------------


def test_analyze_then_allocate_with_no_file_names(model, run, tmp_path):
    done = run("analyze", model)
    assert done.rc == 0, done.stderr
    assert "model.layers.1" in done.stdout
    assert "device: cpu" in done.stderr
    assert "wrote tiny.metrics.json and tiny.spectra.safetensors" in done.stderr
    done = run("allocate", "--T", 16, "--beta", 2.5)
    assert done.rc == 0, done.stderr
    assert "metrics: tiny.metrics.json" in done.stderr
    found = read(tmp_path / "tiny.allocation.json")
    assert (sum(found.experts), found.budget) == (16, 16)
    assert found.metrics.file == "tiny.metrics.json"
    assert [row.prefix for row in found.evidence] == ["model.layers.0", "model.layers.1"]
    metrics = read(tmp_path / "tiny.metrics.json", Metrics)
    powers = [layer.pl_alpha_hill**2.5 for layer in metrics.layers]
    for row, power in zip(found.evidence, powers, strict=True):
        assert row.quota == pytest.approx(power / sum(powers) * 16)
        assert abs(row.experts - row.quota) < 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tiny", *(f"tiny.{x}" for x in ("metrics.json", "spectra.safetensors"))} | {
        "tiny.allocation.json"
    }
    for path in tmp_path.glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_the_newest_metrics_is_taken_and_named(here, invoke):
    other = here.with_name("other.metrics.json")
    shutil.copy(here, other)
    os.utime(here, (2e9, 2e9))
    os.utime(other, (1e9, 1e9))
    assert "metrics: tiny.metrics.json" in invoke("allocate", "--T", 8).stderr
    os.utime(other, (2.1e9, 2.1e9))
    assert "metrics: other.metrics.json" in invoke("allocate", "--T", 8).stderr
    assert here.with_name("other.allocation.json").exists()


def test_ranks_and_experts_of_one_model_have_names_of_their_own(here, invoke, tmp_path):
    assert invoke("allocate", here.name, "--T", 9, "-q").rc == 0
    assert invoke("allocate", here.name, "--for", "lora", "--rank", 4, "-q").rc == 0
    assert not read(tmp_path / "tiny.allocation.json").holds_ranks
    assert read(tmp_path / "tiny.ranks.allocation.json").holds_ranks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--t", 160], "No such option: --t (Possible options: --T)"),
        (["--T", 9, "--bta", 2], "--beta"),
        (["--T", 9, "--beta", "banana"], "'--beta': it must be a number, not 'banana'."),
        (["--T", 9, "--top-k", "2x"], "'--top-k': it must be a whole number, not '2x'."),
    ],
)
def test_a_slip_of_the_pen_is_told_plainly(here, invoke, arguments, said):
    done = invoke("allocate", here.name, *arguments)
    assert (done.rc, done.stdout) == (2, "")
    assert said in done.stderr


LORA = ["--for", "lora"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny.metrics.json", *LORA, "--r", 16], "For ranks of plain LoRA give --rank 16."),
        (["tiny.metrics.json", *LORA, "--rank", 4, "--T", 3], "--T and --rank are both budgets."),
        (["absent.json", "--T", 3], "hint: Check the name, and the folder"),
        (["sub/config.json", "--T", 3], "error: sub/config.json is not a valid htsr.metrics file"),
    ],
)
def test_a_refusal_says_where_and_what_would_do(here, invoke, tmp_path, arguments, said):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    done = invoke("allocate", *arguments)
    assert (done.rc, done.stdout) == (1, "")
    assert said in done.stderr


def test_an_empty_folder_may_have_gguf_too(invoke, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "or one .gguf file" in invoke("analyze", "empty").stderr


def test_no_metrics_here_says_what_to_do(invoke):
    done = invoke("allocate", "--T", 8)
    assert done.rc == 1
    assert done.stderr.startswith("error: There is no *.metrics.json in this folder.\nhint: ")


def test_allocate_without_metrics(invoke, tmp_path):
    assert invoke("allocate", "--strategy", "mola", "--groups", "2468", "--layers", 8).rc == 0
    assert read(tmp_path / "mola.allocation.json").experts == (2, 2, 4, 4, 6, 6, 8, 8)
    assert invoke("allocate", "--strategy", "explicit", "--experts", "3,1").rc == 0
    assert read(tmp_path / "explicit.allocation.json").experts == (3, 1)


# --- results, notes, files ------------------------------------------------------------------


def test_output_dash_is_the_file_on_stdout(here, model, invoke, tmp_path):
    done = invoke("allocate", "--T", 8, "-o", "-", "-q")
    assert loads(Allocation, done.stdout, "stdout").budget == 8
    assert done.stderr == ""
    assert not (tmp_path / "tiny.allocation.json").exists()
    here.unlink()
    done = invoke("analyze", model, "-o", "-", "-q")
    assert len(loads(Metrics, done.stdout, "stdout").matrices) == 14
    assert done.stderr == ""
    assert not (tmp_path / "tiny.metrics.json").exists()
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("command", ["inspect", "analyze", "fit", "allocate"])
def test_json_is_the_only_thing_on_stdout(here, model, invoke, command):
    arguments = {
        "inspect": [model],
        "analyze": [model, "-o", "new.metrics.json"],
        "fit": [here, "--estimator", "median"],
        "allocate": ["--T", 8],
    }[command]
    done = invoke(command, *arguments, "--json")
    assert done.rc == 0
    data = json.loads(done.stdout)
    expected = {"inspect": "matrices", "allocate": "experts"}.get(command, "layers")
    assert data[expected]
    if command != "inspect":
        assert done.stderr != ""
        again = invoke(command, *arguments, "--json", "-q")
        assert again.stderr == ""


def test_quiet_still_shows_warnings_and_errors(model, invoke, tmp_path):
    assert invoke("analyze", model, "-q").stderr == ""
    save_file({"h.0.a.weight": torch.zeros(4, 4)}, tmp_path / "z.safetensors")
    assert "warning: h.0.a.weight has no fit" in invoke("analyze", "z.safetensors", "-q").stderr
    assert "error: " in invoke("analyze", "absent.safetensors", "-q").stderr


def test_inspect_tells_what_analyze_will_do(model, invoke):
    done = invoke("inspect", model, "--exclude", "*k_proj*", "--json")
    data = json.loads(done.stdout)
    assert data["layers"] == ["model.layers.0", "model.layers.1"]
    assert len(data["matrices"]) == 12
    reasons = {s["tensor"]: s["reason"] for s in data["skipped"]}
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == "matched by exclude"
    assert data["bytes"] == (model / "model.safetensors").stat().st_size
    assert data["seconds"] > 0
    assert data["peak_bytes"] > 100 << 20
    dry = invoke("analyze", model, "--exclude", "*k_proj*", "--dry-run", "--json")
    assert json.loads(dry.stdout)["matrices"] == data["matrices"]
    assert not list(Path().glob("*.metrics.json"))
    done = invoke("inspect", model)
    assert "2 layers, 14 matrices" in done.stderr
    assert "left out, 1-d (norm, bias or scalar): model.layers.0.input_layernorm.weight" in (
        done.stderr
    )


# --- exit codes and errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["analyze"],
        ["analyze", "a", "b"],
        ["allocate", "--T", "many"],
        ["allocate", "--nonsense"],
        ["fit", "x.json"],
    ],
)
def test_wrong_usage_exits_2_and_says_how(invoke, arguments):
    done = invoke(*arguments)
    assert done.rc == 2
    assert "Usage: " in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_known_failures_exit_1_with_a_sentence_and_a_hint(here, run):
    done = run("allocate", "--T", 3)
    assert (done.rc, done.stdout) == (1, "")
    assert done.stderr == (
        "metrics: tiny.metrics.json\n"
        "error: 3 experts cannot give 4 layers at least 1 each.\n"
        "hint: Use --T 4 or more, or --min 0.\n"
    )


def test_debug_shows_the_traceback(run):
    done = run("allocate", "--T", 3, env={"HTSR_DEBUG": "1"})
    assert done.rc == 1
    assert "Traceback" in done.stderr
    assert "HtsrError: There is no *.metrics.json" in done.stderr
    assert "Traceback" not in run("allocate", "--T", 3, env={"HTSR_DEBUG": "0"}).stderr


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_before_any_command_has_begun(name, code):
    script = (
        "import os, signal, typer.main\n"
        "from htsr_alloc.cli.main import main\n"
        f"typer.main.get_command = lambda app: os.kill(os.getpid(), signal.{name})\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert done.stderr == f"warning: {'interrupted' if name == 'SIGINT' else 'terminated'}.\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_of_every_command(invoke, command):
    done = invoke(*command, "--help")
    assert done.rc == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Usage: ")
    for name in COMMANDS if not command else ():
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
    if not command:
        said = done.stdout.partition("Commands:")[2]
        assert "..." not in said  # whole sentences
        said = said.partition("Examples:")[0]
        assert len(re.findall(r"\.$", said, re.MULTILINE)) == len(re.findall(r"^  \w", said, re.M))
    assert invoke(*command, "-h").stdout == done.stdout


def test_version(run):
    assert run("--version") == (0, f"htsr {__version__}\n", "")


# --- light imports --------------------------------------------------------------------------

IMPORTED = f"""
import sys
sys.argv[0] = "htsr"
from htsr_alloc.cli.main import main
try:
    main()
finally:
    print("loaded", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["allocate", "--T", "8"],
        ["allocate", "--T", "8", "--json"],
        ["export", "made.json", "--to", "mola"],
    ],
)
def test_help_and_allocate_load_nothing_heavy(here, invoke, tmp_path, arguments):
    assert invoke("allocate", "--T", 8, "-q", "-o", "made.json").rc == 0
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "loaded"


def test_the_package_itself_loads_nothing_heavy():
    script = (
        "import sys, htsr_alloc; dir(htsr_alloc); htsr_alloc.Allocation; htsr_alloc.allocate;"
        f"print([name for name in {HEAVY} + ['typer'] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_every_public_name_resolves():
    import htsr_alloc

    for name in dir(htsr_alloc):
        assert getattr(htsr_alloc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = htsr_alloc.nonsense


# --- terminals, pipes -----------------------------------------------------------------------


def on_a_terminal(cwd, *arguments, **env):
    """What the command writes to a terminal of its own (stdout and stderr as they come)."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "htsr_alloc", *map(str, arguments)],
        cwd=cwd,
        env=environment(TERM="xterm-256color", **env),
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
    )
    os.close(secondary)
    written = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([primary], [], [], 0.2)[0]:
            continue
        try:
            piece = os.read(primary, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(primary)
    return process.wait(10), written.decode()


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[mKABhlJG]", "", text)


def test_colours_on_a_terminal_and_not_with_no_color(tmp_path):
    red = re.compile(r"\x1b\[[0-9;]*31m")
    rc, written = on_a_terminal(tmp_path, "allocate", "--T", 3)
    assert rc == 1
    assert red.search(written)
    rc, written = on_a_terminal(tmp_path, "allocate", "--T", 3, NO_COLOR="1")
    assert rc == 1
    assert not red.search(written)
    assert "There is no *.metrics.json" in written


def test_a_progress_bar_on_a_terminal_only(model, tmp_path, invoke):
    rc, written = on_a_terminal(tmp_path, "analyze", model, COLUMNS="120")
    assert rc == 0
    assert "ETA" in written
    assert re.search(r"layer 1 \w+_proj", written)
    assert "ETA" not in invoke("analyze", model).stderr


def test_names_in_files_never_reach_the_terminal_raw(tmp_path):
    tensors = {f"h.0.{EVIL}.weight": torch.zeros(4, 4), f"h.0.b{EVIL}.weight": torch.randn(64, 64)}
    save_file(tensors, tmp_path / "evil.safetensors")
    rc, written = on_a_terminal(tmp_path, "analyze", "evil.safetensors", COLUMNS="200")
    assert rc == 0
    assert "?]0;owned?" in written
    for bad in ("\x07", "\x1b]", "\x1b[2J", "\x9b"):
        assert bad not in without_styles(written).replace("\x1b[2K", "")


@pytest.mark.parametrize("to", ["csv", "mola", "axolotl"])
def test_exports_never_drive_the_terminal(here, invoke, tmp_path, to):
    assert invoke("allocate", "--T", 8, "-q", "-o", "evil.json").rc == 0
    data = json.loads((tmp_path / "evil.json").read_text())
    data["evidence"][0]["prefix"] = EVIL
    (tmp_path / "evil.json").write_text(json.dumps(data))
    rc, written = on_a_terminal(tmp_path, "export", "evil.json", "--to", to, "--target", EVIL)
    assert rc == 0
    assert "\x1b" not in written
    assert "\x9b" not in written
    assert "\x07" not in written


def test_errors_about_odd_names_are_clean(run, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps({"format": EVIL}))
    for arguments in (["allocate", "odd.json", "--T", 3], ["inspect", EVIL]):
        done = run(*arguments)
        assert done.rc == 1
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stderr)


def piped(cwd, reader, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "htsr_alloc", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    subprocess.run(reader, stdin=process.stdout, stdout=subprocess.DEVNULL, check=True)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    return process.wait(30), stderr


@pytest.mark.parametrize("reader", [["head", "-1"], ["true"]])
@pytest.mark.parametrize("options", [[], ["--json"], ["-o", "-"]])
def test_a_reader_that_leaves_early_is_no_error(here, tmp_path, reader, options):
    rc, stderr = piped(tmp_path, reader, "allocate", "--T", 8, *options)
    assert rc == 0
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


@pytest.mark.parametrize("options", [[], ["--json"], ["-o", "-"]])
def test_a_full_disk_behind_stdout_is_an_error(here, tmp_path, options):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "htsr_alloc", "allocate", "--T", "8", *options],
            cwd=tmp_path,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            check=False,
        )
    assert done.returncode == 1
    assert "error: Cannot write stdout: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", ["", "--json", "-o -"])
def test_a_closed_stdout_is_an_error(here, tmp_path, options):
    command = f"exec {sys.executable} -m htsr_alloc allocate --T 8 {options} >&-"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert "error: Cannot write stdout: Bad file descriptor." in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_streams_lose_nothing_else(here, tmp_path):
    command = f"exec {sys.executable} -m htsr_alloc allocate --T 8 -o a.json <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 1  # the table could not be shown
    assert loads(Allocation, (tmp_path / "a.json").read_text(), "a.json").budget == 8


def test_a_narrow_encoding_is_no_error(here, run):
    done = run("allocate", "--T", 8, env={"PYTHONIOENCODING": "ascii"})
    assert done.rc == 0, done.stderr
    assert "model.layers.3" in done.stdout


def test_tables_are_not_cut_when_piped(tmp_path, invoke):
    name = "h.0." + "x" * 150
    save_file({f"{name}.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    assert "x" * 150 in invoke("inspect", "m.safetensors").stdout.replace("\n", "")


# --- completion -----------------------------------------------------------------------------


def test_shell_completion():
    htsr = Path(sys.executable).with_name("htsr")
    if not htsr.exists():
        pytest.skip("the htsr script is not installed beside this Python")
    bash = shutil.which("bash")
    script = f"""
        set -e
        PATH={htsr.parent}:$PATH
        eval "$(htsr --show-completion bash)"
        COMP_WORDS=(htsr al) COMP_CWORD=1
        _htsr_completion htsr
        echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(htsr analyze --est) COMP_CWORD=2
        _htsr_completion htsr
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        [bash, "-c", script], env=environment(), capture_output=True, encoding="utf-8", check=False
    )
    assert done.stdout == "allocate\n--estimator\n", done.stderr


# --- fit ------------------------------------------------------------------------------------


def test_fit_needs_no_checkpoint(here, invoke, tmp_path):
    done = invoke("fit", here, "--estimator", "median")
    assert done.rc == 0
    assert "wrote " in done.stderr
    old, new = read(here, Metrics), read(tmp_path / "tiny.median.metrics.json", Metrics)
    assert new.settings.estimator == "median"
    assert new.spectra == old.spectra
    assert [m.tensor for m in new.matrices] == [m.tensor for m in old.matrices]
    assert [m.lambda_max for m in new.matrices] == [m.lambda_max for m in old.matrices]
    assert all(m.k == 32 for m in new.matrices)  # N = 64, the tail starts at floor(N / 2)
    assert any(
        a.pl_alpha_hill != b.pl_alpha_hill for a, b in zip(old.matrices, new.matrices, strict=True)
    )
    back = invoke("fit", "tiny.median.metrics.json", "--estimator", "official", "-o", "b.json")
    assert back.rc == 0
    assert read(tmp_path / "b.json", Metrics).matrices == old.matrices


def test_fit_refuses_spectra_that_are_not_its_own(here, invoke, tmp_path):
    spectra = tmp_path / "tiny.spectra.safetensors"
    whole = spectra.read_bytes()
    spectra.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = invoke("fit", here, "--estimator", "median")
    assert done.rc == 1
    assert "is not the file that tiny.metrics.json was written with" in done.stderr
    spectra.unlink()
    done = invoke("fit", here, "--estimator", "median")
    assert done.rc == 1
    assert "There is no tiny.spectra.safetensors beside tiny.metrics.json." in done.stderr
    assert not (tmp_path / "tiny.median.metrics.json").exists()


def test_fit_refuses_what_it_cannot_do(here, invoke, tmp_path):
    assert "There is no estimator 'x'" in invoke("fit", here, "--estimator", "x").stderr
    (tmp_path / "sub").mkdir()
    done = invoke("fit", here, "--estimator", "median", "-o", "sub/x.json")
    assert done.rc == 1
    assert "same folder" in done.stderr
    data = json.loads(here.read_text())
    data["spectra"] = None
    here.write_text(json.dumps(data))
    done = invoke("fit", here, "--estimator", "median")
    assert done.rc == 1
    assert "was written without spectra" in done.stderr
    done = invoke("fit", "absent.json", "--estimator", "median")
    assert done.rc == 1
    assert "No such file" in done.stderr


def test_fit_strict(here, invoke, tmp_path):
    tensors = {"h.0.a.weight": torch.randn(64, 64), "h.0.b.weight": torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert invoke("analyze", "m.safetensors", "-q").rc == 0
    done = invoke("fit", "m.metrics.json", "--estimator", "ks", "--strict")
    assert done.rc == 3
    assert read(tmp_path / "m.ks.metrics.json", Metrics).layers[0].unfitted == 1


def test_unfitted_layers_are_warned_about_when_allocating(invoke, tmp_path):
    tensors = {f"h.{i}.{n}.weight": torch.randn(64, 64) for i in (0, 1) for n in "ab"}
    tensors["h.1.b.weight"].zero_()
    save_file(tensors, tmp_path / "m.safetensors")
    assert invoke("analyze", "m.safetensors", "-q").rc == 0
    done = invoke("allocate", "--T", 8, "-q")
    assert done.rc == 0
    assert "warning: h.1: 1 of 2 matrices have no fit: b, all weights are zero" in done.stderr


@pytest.mark.parametrize("quantised", [False, True])
def test_a_download_is_announced_after_the_weights_are_accepted(tmp_path, quantised):
    """Quantised weights are refused first; layers are mapped once."""
    from helpers.hubs import client, serving

    tensors = llama(1)
    if quantised:
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.ones(8, 8, dtype=torch.int32)
    (tmp_path / "server").mkdir()
    write_shards(tmp_path / "server" / "tiny", [tensors], config={"num_hidden_layers": 1})
    with serving(tmp_path / "server") as hub:
        done = client(hub.url, tmp_path, "analyze", "org/tiny", "-o", "m.json")
    assert done.rc == int(quantised), done.stderr
    assert ("to download" in done.stderr) is not quantised
    assert ("are quantised" in done.stderr) is quantised


# --- nothing is lost, and nothing is promised ------------------------------------------------


def test_the_hint_about_the_estimator_can_be_copied(here, invoke, tmp_path):
    (tmp_path / "my run").mkdir()
    for name in (here.name, "tiny.spectra.safetensors"):
        (tmp_path / name).rename(tmp_path / "my run" / name)
    said = invoke("allocate", "my run/tiny.metrics.json", "--T", 9, "-o", "x.json").stderr
    (command,) = [line.partition(": htsr ")[2] for line in said.splitlines() if ": htsr " in line]
    assert invoke(*shlex.split(command)).rc == 0
    better = "my run/tiny.kde-mean.metrics.json"
    assert "htsr fit" not in invoke("allocate", better, "--T", 9).stderr


def test_an_allocation_that_differs_is_kept(here, invoke, tmp_path):
    assert invoke("allocate", here.name, "--T", 9, "-q").rc == 0
    path = tmp_path / "tiny.allocation.json"
    first = path.read_bytes()
    again = invoke("allocate", here.name, "--T", 9, "-q")
    assert again.rc == 0, again.stderr
    assert read(path).experts == loads(Allocation, first, "first").experts
    first = path.read_bytes()
    other = invoke("allocate", here.name, "--T", 11)
    assert (other.rc, other.stdout) == (1, "")
    assert "tiny.allocation.json is there and differs from this allocation." in other.stderr
    assert "--force" in other.stderr
    assert path.read_bytes() == first
    assert invoke("allocate", here.name, "--T", 11, "--force").rc == 0
    assert read(path).budget == 11
    path.write_text("notes of mine")
    assert invoke("allocate", here.name, "--T", 11).rc == 1
    assert path.read_text() == "notes of mine"


@pytest.mark.parametrize("engine", ["cuda", "gpu"])
def test_an_engine_that_cannot_run_leaves_no_journal(model, invoke, tmp_path, engine):
    done = invoke("analyze", model, "--engine", engine, "--device", "cpu")
    assert done.rc in (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert invoke("analyze", model, "--engine", "portable", "-q").rc == 0


@pytest.mark.parametrize("command", ["analyze", "study", "fit", "train"])
def test_an_interrupted_command_promises_what_is_kept(command, tmp_path, monkeypatch):
    from htsr_alloc.cli import failures
    from htsr_alloc.training import saves

    def stopped(**_):
        raise KeyboardInterrupt

    stopped.__name__ = command

    def said(output):
        failures._said.clear()  # it is said once a process
        with pytest.raises(typer.Exit) as end:
            failures.ends_well(stopped)(output=output)
        assert end.value.exit_code == 130
        return capture.pop()

    capture = []
    monkeypatch.setattr(failures.Screen, "warn", lambda self, text: capture.append(text))
    if command == "train":
        assert "no checkpoint is whole yet" in said(tmp_path)
        saved = tmp_path / saves.CHECKPOINTS / "checkpoint-7"
        saved.mkdir(parents=True)
        (saved / "x").write_text("weights")
        assert "no checkpoint is whole yet" in said(tmp_path)  # half of one
        saves.mark(saved)
        assert "checkpoint-7 is kept: the same command with --resume" in said(tmp_path)
    elif command == "fit":
        assert said(None) == "interrupted."
    else:
        assert "the same command goes on" in said(tmp_path / "x")
    if command == "analyze":
        assert said("-") == "interrupted."  # no journal
