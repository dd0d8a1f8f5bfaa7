"""An adapter that others can use: tokenizer, card, collapse, generate, hub ids."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers.commands import environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

import huggingface_hub
import torch
from helpers import training_tiny
from helpers.hubs import COMMIT, NOWHERE, client, serving

from htsr_alloc.cli.opening import Hub
from htsr_alloc.training.rows import read_rows
from htsr_alloc.training.tokens import encode, open_tokenizer

TRAIN = ["--device", "cpu", "--dtype", "float32", "--lora-dropout", "0", "--r", 2, "--steps", 6,
         "--learning-rate", "2e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """model/, train.jsonl and a.json."""
    from htsr_alloc.allocation import allocate
    from htsr_alloc.records import dumps

    folder = tmp_path_factory.mktemp("handing")
    training_tiny.folder(folder / "model")
    training_tiny.write(folder / "train.jsonl", training_tiny.learnable_rows(32))
    (folder / "a.json").write_text(dumps(allocate(None, strategy="explicit", experts=(3, 2))))
    return folder


@pytest.fixture(scope="module")
def adapter(files):
    """A trained mixture, made by the command."""
    from typer.testing import CliRunner

    from htsr_alloc.cli.main import app

    given = ["train", files / "a.json", "--model", files / "model", "--data",
             files / "train.jsonl", "-o", files / "adapter", *TRAIN]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, given)))
    assert done.exit_code == 0, done.output
    return files / "adapter"


def test_a_trained_folder_has_the_tokenizer_and_a_filled_card(adapter, files):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.chat_template == training_tiny.CHAT
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    for said in ("LoRA mixture (alphalora) adapter of model", "32 rows of train.jsonl, 6 steps",
                 ", mean of steps 2 to 6", "from the first: 3, 2",
                 "pip install '.[train]'", "import htsr_alloc.lora_moe"):  # fmt: skip
        assert said in card
    code, found = card.split("```python\n")[1].split("```")[0], {}
    assert code.count("FOLDER_OR_HUB_ID") == 2
    exec(code.replace("FOLDER_OR_HUB_ID", str(adapter)), found)
    assert found["tokenizer"].chat_template == training_tiny.CHAT
    assert str(files) not in card
    assert not [path for path in adapter.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("urls", "command"),
    [
        (None, "pip install '.[train]'    # in the folder of its source: it is not on PyPI yet"),
        (
            ["Changes, https://x.org/c", "Repository, https://x.org/r"],
            "pip install 'htsr-alloc[train] @ git+https://x.org/r'",
        ),
    ],
)
def test_the_card_installs_from_where_the_package_is(monkeypatch, urls, command):
    from email.message import Message

    from htsr_alloc.training import handing

    told = Message()
    for url in urls or ():
        told["Project-URL"] = url
    monkeypatch.setattr(handing, "metadata", lambda name: told)
    assert handing.install() == command


def test_a_model_in_place_of_an_adapter_is_told(files, invoke):
    done = invoke("generate", files / "model", "w20")
    assert done.rc == 1
    assert "model is a model, not an adapter: it has no adapter_config.json." in done.stderr


def test_an_evaluation_is_written_into_the_card(adapter, files, invoke):
    import shutil

    shutil.copytree(adapter, "mine")
    before = (adapter / "README.md").read_text()
    given = ["evaluate", "--model", files / "model", "--adapter", "mine", "--data",
             files / "train.jsonl", "--device", "cpu", "--dtype", "float32", "--json"]  # fmt: skip
    found = {}
    for limit in (8, 4, 8):
        done = invoke(*given, "--limit", limit)
        assert done.rc == 0, done.stderr
        found[limit] = json.loads(done.stdout)
    text = (Path("mine") / "README.md").read_text()
    rows = [
        f"| train.jsonl | {n} | {found[n]['accuracy']:.1%} | {found[n]['low']:.1%} to "
        f"{found[n]['high']:.1%} |"
        for n in (4, 8)
    ]
    table = ["## Evaluation", "", "| data | rows | accuracy | 95 % interval |", "|---|---|---|---|"]
    assert "\n".join([*table, *rows, "", "## Use"]) in text
    assert text.replace("\n".join([*table, *rows, ""]), "", 1).split() == before.split()
    (Path("mine") / "README.md").write_text("# my own words\n\n## Use\n")
    assert "added the result" not in invoke(*given, "--limit", 2).stderr
    assert (Path("mine") / "README.md").read_text() == "# my own words\n\n## Use\n"


def test_the_card_has_the_validation_loss(files, invoke, tmp_path):
    rows = (files / "train.jsonl").read_text().splitlines()
    Path("held.jsonl").write_text("\n".join(rows[:5]) + "\n")
    done = invoke("train", files / "a.json", "--model", files / "model", "--data",
                  files / "train.jsonl", "--validation", "held.jsonl", "-o", "mine", "--json",
                  *TRAIN)  # fmt: skip
    assert done.rc == 0, done.stderr
    loss = json.loads(done.stdout)["validation_loss"]
    assert loss > 0
    said = f"Validation: 5 rows of held.jsonl, last loss {loss:.4g}"
    assert said in (tmp_path / "mine" / "README.md").read_text()


def test_a_collapsed_adapter_loads_without_htsr_alloc(adapter, files, invoke, tmp_path):
    done = invoke("collapse", adapter, "--data", files / "train.jsonl", "-o", "plain", "--json",
                  "--limit", 1, "--dtype", "float32", "--device", "cpu")  # fmt: skip
    assert done.rc == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"] == 1
    assert not said["exact"]
    assert "import htsr_alloc" not in (tmp_path / "plain" / "README.md").read_text()
    tokenizer = open_tokenizer(files / "model")
    ids = encode(read_rows(files / "train.jsonl")[0], tokenizer, 512).input_ids
    code = (
        "import sys; sys.modules['htsr_alloc'] = None\n"
        "import torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained('plain').eval()\n"
        f"print(model(torch.tensor([{ids}])).logits[0].tolist())"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    own = torch.tensor(json.loads(loaded.stdout))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(files / "model").eval()
        mixture = PeftModel.from_pretrained(base, adapter).eval()(torch.tensor([ids])).logits[0]
    error = float((own - mixture).norm() / mixture.norm())  # (S, vocabulary)
    assert error == pytest.approx(said["error"], rel=1e-3)
    assert error > 1e-4
    again = invoke("collapse", adapter, "--data", files / "train.jsonl", "-o", "plain")
    assert again.rc == 2
    assert "holds an adapter already" in again.stderr


@pytest.mark.parametrize("chat", [False, True])
def test_generate_is_transformers_own_greedy_text(adapter, files, invoke, chat):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = invoke("generate", adapter, "w20 w10", "--max-new-tokens", 5, "--dtype", "float32",
                  "--device", "cpu", *(["--chat"] if chat else []))  # fmt: skip
    assert done.rc == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    text = "w3 w20 w10 w5 w4 " if chat else "w20 w10"  # the template, by hand
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    made = []
    for _ in range(5):
        with torch.no_grad():
            token = int(model(ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert done.stdout == tokenizer.decode(made, skip_special_tokens=True) + "\n"


def test_push_uploads_the_folder_and_writes_no_token(adapter, files, invoke, tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo, **options):
            calls["repo"] = repo
            return f"https://hub/{repo}"

        def upload_folder(self, **options):
            calls["upload"] = options

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    secret = "hf_secretSECRETsecret"
    done = invoke("build", files / "a.json", "--model", files / "model", "-o", "made",
                  "--push", "me/made", "--token", secret)  # fmt: skip
    assert done.rc == 0, done.stderr
    assert (calls["token"], calls["repo"]) == (secret, "me/made")
    assert calls["upload"]["repo_id"] == "me/made"
    assert "checkpoints/**" in calls["upload"]["ignore_patterns"]
    assert "uploaded to https://hub/me/made" in done.stderr
    for path in (tmp_path / "made").iterdir():
        assert secret.encode() not in path.read_bytes()


def test_commands_take_hub_ids(files, tmp_path):
    store = tmp_path / "store"
    training_tiny.folder(store / "tiny")
    (store / "tiny" / "notes.bin").write_bytes(b"x" * 100)
    with serving(store) as hub:
        done = client(hub.url, tmp_path, "build", files / "a.json", "--model", "org/tiny",
                      "-o", "made")  # fmt: skip
        assert done.rc == 0, done.stderr
        asked = " ".join(r["path"] for r in hub.requests)
        assert "tokenizer.json" in asked
        assert "notes.bin" not in [p.rpartition("/")[2] for p in asked.split()]
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", COMMIT)
    assert "base_model: org/tiny\n" in (tmp_path / "made" / "README.md").read_text()
    # What is in the cache is enough, and the adapter names its model.
    done = client(NOWHERE, tmp_path, "generate", "made", "w20 w10", "--max-new-tokens", 2,
                  "--offline")  # fmt: skip
    assert done.rc == 0, done.stderr
    assert done.stdout.strip()


def test_rows_come_from_a_data_set_of_the_hub(tmp_path, monkeypatch):
    rows = training_tiny.learnable_rows(3)
    asked = []

    def load(repo, split, **_):
        asked.append((repo, split))
        return rows

    fake = types.SimpleNamespace(
        load_dataset=load, DownloadConfig=lambda **_: None, disable_progress_bars=lambda: None
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    hub = Hub(cache_dir=tmp_path)
    for name, split in (("org/rows", "train"), ("org/rows:test", "test")):
        found = read_rows(hub.rows(name))
        assert [row.prompt for row in found] == [row["prompt"] for row in rows]
        assert asked.pop() == ("org/rows", split)
    assert str(hub.rows("data/none.jsonl")) == "data/none.jsonl"
    assert not asked


def test_without_the_datasets_library_it_is_one_sentence(files, invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = invoke("evaluate", "--model", files / "model", "--data", "org/rows:test")
    assert done.rc == 1
    assert "needs the datasets library" in done.stderr
