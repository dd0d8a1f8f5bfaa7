"""Classification of texts, pairs and images through the command: learnt, loaded again, refused."""

from __future__ import annotations

import json
import random

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import training_tiny

from htsr_alloc.allocation import allocate
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import dumps
from htsr_alloc.training import labelled, models, tasks

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QUICK = ["--device", "cpu", "--dtype", "float32", "--lora-dropout", "0", "--lora-r", "4"]
LEARN = ["--learning-rate", "2e-2", "--steps", "40", "--batch-size", "16", "--log-every", "5"]


def roberta(folder):
    """A random RoBERTa of width 32 without a head for these classes, and a tokenizer."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64,
        max_position_embeddings=40,
        pad_token_id=0,
        type_vocab_size=1,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    training_tiny.tokenizer(None).save_pretrained(folder)
    return folder


def vit(folder):
    """A random ViT of width 32 for images of 16 x 16."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **SIZES)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def texts(count, seed=0):
    """The class is the word that every text begins with."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(["calm", "loud", "odd"])
        first = {"calm": 10, "loud": 11, "odd": 12}[label]
        rest = [f"w{draw.randrange(20, 60)}" for _ in range(draw.randint(1, 5))]
        rows.append({"text": " ".join([f"w{first}", *rest]), "label": label})
    return rows


def pairs(count, seed=0):
    """Class 1 where the second text has the word w10."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randrange(2)
        words = [f"w{draw.randrange(20, 60)}" for _ in range(draw.randint(1, 4))]
        pair = [f"w{10 + label}", f"w{draw.randrange(20, 60)}"]
        rows.append({"text": " ".join(words), "text_pair": " ".join(pair), "label": label})
    return rows


def images(folder, count, seed=0):
    """Noise with a bright left or right half, as class folders."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(seed)
    for number in range(count):
        label = ("left", "right")[number % 2]
        pixels = draw.integers(0, 120, (20, 24, 3))
        half = slice(0, 12) if label == "left" else slice(12, 24)
        pixels[:, half] += 120
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype("uint8")).save(folder / label / f"{number}.png")
    return folder


def image_rows(folder, path):
    """The same images as rows with paths."""
    found = sorted(folder.glob("*/*.png"))
    rows = [{"image": f"{folder.name}/{p.parent.name}/{p.name}", "label": p.parent.name}
            for p in found]  # fmt: skip
    return training_tiny.write(path, rows)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "a.json").write_text(dumps(allocate(None, strategy="explicit", experts=(3, 2))))
    return tmp_path


def train(invoke, *more, system="alphalora", allocation="a.json"):
    given = [allocation] if allocation else []
    return invoke(
        "train", *given, "--model", "model", "--task", "classification", "--system", system,
        "-o", "out", *QUICK, *LEARN, *more,
    )  # fmt: skip


def score(invoke, data, *more):
    done = invoke(
        "evaluate", "--model", "model", "--task", "classification", "--data", data, "--json",
        "--device", "cpu", "--dtype", "float32", *more,
    )  # fmt: skip
    assert done.rc == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("rows", "system", "rate"),
    [(texts, "alphalora", "2e-2"), (pairs, "goat", "2e-2"), (pairs, "pissa", "3e-3")],
)
def test_texts_are_learnt_and_the_head_is_saved(rows, system, rate, invoke, work):
    roberta(work / "model")
    training_tiny.write(work / "train.jsonl", rows(96))
    training_tiny.write(work / "test.jsonl", rows(60, seed=1))
    done = train(invoke, "--data", "train.jsonl", "--learning-rate", rate, system=system)
    assert done.rc == 0, done.stderr
    after = score(invoke, "test.jsonl", "--adapter", "out", "--batch-size", "7")
    classes = len({row["label"] for row in rows(60)})
    assert after["n"] == 60
    assert after["low"] > 1 / classes
    run = json.loads((work / "out" / "run.json").read_text())
    assert run["labels"] == (["calm", "loud", "odd"] if rows is texts else ["0", "1"])
    # By hand, one row at a time, without padding.
    read, made = tasks.readers_of("classification")
    given = read(work / "test.jsonl")
    task = made(work / "model", given, run["labels"], 512, False)
    model = models.open_adapter(task.open_model(torch.float32), work / "out").eval()
    hits, losses = "", []
    for row in given:
        one = task.processor(row.text, row.pair, return_tensors="pt")
        with torch.no_grad():
            logits = model(**one).logits[0].double()
        right = run["labels"].index(str(row.label))
        hits += "1" if int(logits.argmax()) == right else "0"
        losses.append(float(logits.logsumexp(0) - logits[right]))
    assert after["hits"] == hits
    assert after["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    # As the card says.
    card = (work / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification\n" in card
    assert f"* Classes, from 0: {', '.join(run['labels'])}\n" in card
    code, made = card.split("```python\n")[1].split("```")[0], {}
    exec(
        code.replace("FOLDER_OR_HUB_ID", "out").replace('"model"', repr(str(work / "model"))), made
    )
    with torch.no_grad():
        again = made["model"].eval()(**one).logits[0].double()
    assert torch.allclose(again, logits, atol=1e-5)


def test_images_are_learnt_from_folders_and_from_rows(invoke, work):
    vit(work / "model")
    images(work / "train", 48)
    image_rows(images(work / "test", 40, seed=1), work / "test.jsonl")
    done = train(invoke, "--data", "train", "--validation", "test.jsonl")
    assert done.rc == 0, done.stderr
    by_rows = score(invoke, "test.jsonl", "--adapter", "out")
    assert by_rows == score(invoke, "test", "--adapter", "out")
    assert by_rows["low"] > 0.5
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert "pipeline_tag: image-classification\n" in (work / "out" / "README.md").read_text()
    assert (work / "out" / "preprocessor_config.json").is_file()


def test_full_fine_tuning_is_a_model_with_its_classes(invoke, work):
    roberta(work / "model")
    training_tiny.write(work / "train.jsonl", texts(32))
    done = invoke(
        "train", "--model", "model", "--task", "classification", "--system", "full", "-o", "out",
        "--data", "train.jsonl", "--device", "cpu", "--dtype", "float32", "--learning-rate", "3e-3",
        "--steps", "20",
    )  # fmt: skip
    assert done.rc == 0, done.stderr
    found = invoke(
        "evaluate", "--model", "out", "--task", "classification", "--data", "train.jsonl", "--json",
        "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert found.rc == 0, found.stderr
    assert json.loads(found.stdout)["low"] > 1 / 3
    assert models.head_labels(work / "out") == ("calm", "loud", "odd")
    refused = invoke(
        "train", "--model", "model", "--system", "full", "--data", "train.jsonl", "--push", "a/b",
    )  # fmt: skip
    assert (refused.rc, "--push uploads an adapter" in refused.stderr) == (1, True)


def test_accumulated_batches_are_one_batch(invoke, work):
    """Two micro-batches of 4 have the loss and the gradient of one of 8."""
    roberta(work / "model")
    training_tiny.write(work / "train.jsonl", texts(8))
    logs = []
    for size, accumulate in ((8, 1), (4, 2)):
        done = invoke(
            "train", "a.json", "--model", "model", "--task", "classification", "-o", f"out{size}",
            "--data", "train.jsonl", *QUICK, "--steps", "1", "--batch-size", str(size),
            "--accumulate", str(accumulate), "--set", "router_aux_loss_coef=0",
        )  # fmt: skip
        assert done.rc == 0, done.stderr
        logs.append(json.loads((work / f"out{size}" / "log.jsonl").read_text().splitlines()[0]))
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], abs=1e-4)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-3)


def test_an_encoder_is_told_of_the_task(invoke, work):
    roberta(work / "model")
    training_tiny.write(work / "train.jsonl", training_tiny.learnable_rows(8))
    done = invoke(
        "train", "a.json", "--model", "model", "--data", "train.jsonl", "--steps", "1", *QUICK,
    )  # fmt: skip
    assert done.rc == 1
    assert "--task classification" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "w3"}'], "line 1 has no label that is a text or a whole number"),
        (['{"text": "w3", "label": true}'], "line 1 has no label"),
        (['{"label": 1}'], "line 1 has no text"),
        (['{"text": 3, "label": 1}'], "line 1 has no text"),
        (['{"text": "a", "text_pair": 3, "label": 1}'], "line 1 has no text_pair"),
        (['{"image": "no.png", "label": 1}'], "names the image no.png, which is not there"),
        (["[1]"], "line 1 is not an object"),
        (["{"], "line 1 is not JSON"),
        ([""], "holds no row"),
    ],
)
def test_bad_rows_are_named(lines, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(HtsrError) as caught:
        labelled.read_labelled(tmp_path / "rows.jsonl")
    assert said in caught.value.message


def row(label, line=1):
    return labelled.Labelled(line, label, text="w3")


def test_classes_are_the_head_s_or_the_data_s():
    assert labelled.labels_of([row("b"), row("a")]) == ("a", "b")
    assert labelled.labels_of([row(2), row(0)]) == ("0", "1", "2")
    assert labelled.labels_of([row("b")], ["c", "b"]) == ("c", "b")
    assert labelled.labels_of([row(1)], ["c", "b"]) == ("c", "b")
    assert labelled.labels_of([row("x"), row("b")], ["c", "b"]) == ("b", "x")
    assert labelled.class_of(row(1), ["c", "b"]) == 1
    assert labelled.class_of(row("b"), ["c", "b"]) == 1
    for rows, said in (
        ([row("a")], "Every row has the label a"),
        ([row("a"), row(1)], "Some labels are texts"),
        ([row(-1), row(1)], "The label -1 is negative"),
    ):
        with pytest.raises(HtsrError, match=said):
            labelled.labels_of(rows)
    with pytest.raises(HtsrError, match="Line 7 has the label z"):
        labelled.class_of(row("z", 7), ["a", "b"])


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    vit(tmp_path / "model")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    task = tasks.Images(tmp_path / "model", ("a", "b"), 512)
    given = labelled.read_labelled(tmp_path.joinpath("."))
    with pytest.raises(HtsrError, match="is not an image"):
        task.collate(task.encode([r for r in given if r.label == "a"]))


def bert(folder):
    """A random BERT of width 32 with the head of its pretraining, and so without a pooler."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    training_tiny.tokenizer(None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("system", ["alphalora", "lora"])
def test_a_pooler_that_the_checkpoint_has_not_is_saved_with_the_head(system, invoke, work):
    bert(work / "model")
    training_tiny.write(work / "train.jsonl", texts(96))
    done = train(invoke, "--data", "train.jsonl", system=system)
    assert done.rc == 0, done.stderr
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    assert {"bert.pooler.dense", "classifier"} <= set(config["modules_to_save"])
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(score(invoke, "train.jsonl", "--adapter", "out"))
    assert found[0] == found[1]
    assert found[0]["low"] > 1 / 3


def test_weights_drawn_at_random_are_not_evaluated(invoke, work):
    """Neither without an adapter, nor with one that holds the head and not the pooler."""
    from peft import LoraConfig, get_peft_model

    bert(work / "model")
    training_tiny.write(work / "train.jsonl", texts(8))
    task = tasks.Texts(work / "model", ("calm", "loud", "odd"), 512)
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    get_peft_model(task.open_model(torch.float32), config).save_pretrained(str(work / "old"))
    run = json.dumps({"labels": ["calm", "loud", "odd"], "task": "classification"})
    (work / "old" / "run.json").write_text(run)
    for more in ([], ["--adapter", "old"]):
        done = invoke(
            "evaluate", "--model", "model", "--task", "classification", "--data", "train.jsonl",
            "--device", "cpu", *more,
        )  # fmt: skip
        assert done.rc == 1, done.stdout
        assert "nor an adapter holds bert.pooler.dense, which" in " ".join(done.stderr.split())


def test_a_layer_that_the_checkpoint_has_not_is_refused(tmp_path):
    import safetensors.torch

    path = bert(tmp_path / "model") / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    del tensors[name]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    task = tasks.Texts(tmp_path / "model", ("a", "b"), 512)
    with pytest.raises(HtsrError, match=f"does not hold {name}"):
        task.open_model(torch.float32)


def test_a_head_whose_linear_has_a_number_is_new(tmp_path):
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    task = tasks.Images(tmp_path, ("left", "right"), 512)
    task.open_model(torch.float32)
    assert (task.heads, task.drawn) == (("classifier",), ("classifier.1",))
