"""What every test gets, and may ask for."""

import os
import random

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():  # Triton asks for this when it is imported, which the package leaves until later
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cross_entropies import V  # noqa: E402
from toy_corpus import TEXT  # noqa: E402

from lvsoftmax.ops.backends import interprets_triton  # noqa: E402
from lvsoftmax.ops.linear_cross_entropy import BACKENDS, native, reference  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=list(BACKENDS.obstacles))
def backend(request):
    """Every backend of the linear cross-entropy that can run here, tensors being made on its device.

    Triton's interpreter runs on the CPU.
    """
    kind = "cuda" if request.param == "triton" and not interprets_triton() else "cpu"
    reason = BACKENDS.obstacles[request.param](torch.device(kind))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with torch.device(kind):
        yield request.param


@pytest.fixture
def blocks_of_few_tokens(monkeypatch):
    """Several blocks, the last of them shorter: of four tokens, and of a whole register of them in C++."""
    monkeypatch.setattr(reference, "BLOCK", 4 * V)
    monkeypatch.setattr(reference, "FEWEST", 4)
    monkeypatch.setattr(native, "TOKENS", 32)


@pytest.fixture
def without_type_checks():
    """Annotations checked by nobody, as for users: for compilers to trace, and for wrong values to reach the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def in_double():
    """Tensors made without a type are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of a few thousand words in which the next word depends on the last."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"w{index}" for index in range(40)]
    chance = random.Random(0)
    for split, lines in {"train": 400, "valid": 30, "test": 30}.items():
        with (folder / f"{split}.txt").open("w") as file:
            for _ in range(lines):
                first = chance.randrange(20)
                file.write(" ".join(words[min(first + chance.randrange(3), 39)] for _ in range(12)) + "\n")
            file.write("hapax\n" * (split == "train"))  # seen once, so cut: the vocabulary has an <unk>
    return folder


@pytest.fixture
def overrides(text, tmp_path):
    """The overrides of a small run: two epochs of 32 steps with dropout, 4 x 40 tokens a step."""
    return [
        "data=text",
        *(f"data.{split}={text}/{split}.txt" for split in ("train", "valid", "test")),
        f"data.cache={text}/cache",
        f"run.root={tmp_path}",
        "model.backbone.hidden_size=16",
        "model.backbone.layers=2",
        "model.backbone.dropout=0.3",
        "model.dropout=0.3",
        "batch.size=4",
        "batch.length=40",
        "budget.epochs=2",
        "log_every=5",
        "evaluate.every_tokens=1500",
        "progress=false",
        "wandb.mode=disabled",
        "checkpoint_every=0.0001",
        "device=cpu",
    ]


@pytest.fixture
def toy(tmp_path):
    """A folder with the three parts of the toy text."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for split, text in TEXT.items():
        (folder / f"{split}.txt").write_text(text, "utf-8")
    return folder
