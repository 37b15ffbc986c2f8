"""jinaclip export: what it refuses and how it says so, what it leaves behind, and what the graphs look like."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from jinaclip import BundleError, ClipModel, InputError
from jinaclip.bundle.manifest import MANIFEST, Bundle
from jinaclip.cli import main
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint import hub
from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint
from jinaclip_export.checkpoint.reader import WEIGHTS, Checkpoint
from jinaclip_export.errors import CheckpointError, ParityError
from jinaclip_export.onnx_export import graphs
from tests.conftest import PHOTOS, TEXTS, MakeCheckpoint

ROOT = Path(__file__).parents[2]
TEXT = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64,
}  # fmt: skip
VISION = {"width": 32, "layers": 1, "image_size": 28, "head_width": 32}
ROBERTA = "text_model.transformer.roberta."
COMMAND = (sys.executable, "-m", "jinaclip")


@pytest.fixture(scope="module")
def good(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint of one block a tower; copied by `checkpoint`."""
    return make_checkpoint(32, text=TEXT, vision=VISION)


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """refused(checkpoint, *parts, options=…): the command fails with 1 and one line, and leaves nothing."""

    def check(checkpoint: Path | str, *parts: str, options: tuple[str, ...] = (), output: Path | None = None) -> None:
        output = output or tmp_path / "new" / "bundle"
        if output.parent == tmp_path / "new":
            output.parent.mkdir(exist_ok=True)
        before = listing(tmp_path)
        capsys.readouterr()
        assert main(["export", str(checkpoint), "--output", str(output), *options]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("jinaclip: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err, f"{part!r} is not in: {err}"
        assert listing(tmp_path) == before

    return check


def listing(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


Refused = Callable[..., None]


def export(checkpoint: Path, output: Path, *towers: str, **options: Any) -> Bundle:
    return export_bundle(
        Checkpoint(checkpoint, options.pop("adaptation", None)), output, identity=Identity("test"),
        towers=towers or ("text", "image"), **options,
    )  # fmt: skip


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# Files of the checkpoint


def test_what_is_no_checkpoint(tmp_path: Path, refused: Refused, small_bundle: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", "nowhere is not a directory", "expected a jina-clip-v2 checkpoint")
    refused(tmp_path / "file", "file is not a directory")
    refused(tmp_path / "empty", "empty has no config.json (it has: nothing)", "files of a jina-clip-v2 checkpoint")
    refused(small_bundle, "has no config.json (it has: bundle.json, golden-0.png")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint: Path, refused: Refused, name: str) -> None:
    (checkpoint / name).unlink()
    refused(checkpoint, f"has no {name} (it has: ", "expected the files of a jina-clip-v2 checkpoint")
    (checkpoint / name).mkdir()
    refused(checkpoint, f"has no {name}")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "is not readable JSON"), (b"{'a': 1}", "is not readable JSON"), (b"\xff", "is not readable JSON"),
     (b"[" * 100_000, "is not readable JSON"), (b"[]", "holds a list, expected an object")],
    ids=["empty", "quotes", "not UTF-8", "deep", "list"],
)  # fmt: skip
def test_json_files_that_are_none(checkpoint: Path, refused: Refused, name: str, content: bytes, part: str) -> None:
    (checkpoint / name).write_bytes(content)
    refused(checkpoint, name, part)


def test_weights_that_are_none(checkpoint: Path, refused: Refused) -> None:
    path = checkpoint / WEIGHTS
    size = path.stat().st_size
    for content, part in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (path.read_bytes()[: size // 2], "is not a readable safetensors file"),
        (path.read_bytes()[:-1], "is not a readable safetensors file"),
        (path.read_bytes()[:5], "is not a readable safetensors file"),
        (b"", "is not a readable safetensors file"),
        (b"PK\x03\x04" + bytes(1000), "is not a readable safetensors file"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "is not a readable safetensors file"),
    ):
        path.write_bytes(content)
        refused(checkpoint, WEIGHTS, part)


# Settings


@pytest.mark.parametrize(
    ("where", "value", "parts"),
    [
        ("model_type", "clip", ["model_type 'clip', expected 'jina_clip'"]),
        ("model_type", None, ["model_type None, expected 'jina_clip'"]),
        ("add_projections", True, ["add_projections is True", "only False"]),
        ("text_config", None, ["no text_config object"]),
        ("vision_config", [], ["no vision_config object"]),
        ("projection_dim", "32", ["projection_dim is '32', expected a positive number"]),
        ("matryoshka_dimensions", [16, 64], ["matryoshka_dimensions is [16, 64]", "up to 32"]),
        ("matryoshka_dimensions", "16", ["matryoshka_dimensions is '16'"]),
        ("text_config.pooler_type", "cls_pooler", ["text_config.pooler_type is 'cls_pooler'", "only 'mean_pooler'"]),
        ("text_config.proj_type", "linear", ["text_config.proj_type is 'linear'"]),
        ("text_config.hf_model_name_or_path", "bert-base", ["hf_model_name_or_path is 'bert-base'", "embeddings-v3"]),
        ("text_config.hf_model_config_kwargs", [], ["no hf_model_config_kwargs object"]),
        ("text_config.embed_dim", 64, ["text embed_dim is 64 but hidden_size is 32"]),
        ("text_config.default_instruction_task", "none", ["'none' is not among task_instructions (retrieval.query)"]),
        ("kwargs.position_embedding_type", "absolute", ["position_embedding_type is 'absolute'", "only 'rotary'"]),
        ("kwargs.hidden_act", "relu", ["hidden_act is 'relu'", "only 'gelu'"]),
        ("kwargs.type_vocab_size", 2, ["type_vocab_size is 2", "only 1"]),
        ("kwargs.load_trained_adapters", True, ["load_trained_adapters is True", "only False"]),
        ("kwargs.lora_adaptations", "x", ["lora_adaptations is 'x', expected a list of names"]),
        ("kwargs.task_instructions", ["x"], ["task_instructions is ['x'], expected names and sentences"]),
        ("kwargs.hidden_size", 64, ["text embed_dim is 32 but hidden_size is 64"]),
        ("kwargs.num_attention_heads", 3, ["text width 32 cannot be divided into 3 heads"]),
        ("kwargs.num_attention_heads", 32, ["cannot be divided into 32 heads whose size is a multiple of 2"]),
        ("kwargs.pad_token_id", 512, ["pad_token_id 512 is outside the vocabulary of 512"]),
        ("kwargs.max_position_embeddings", 9, ["max_position_embeddings is 9, expected at least 10"]),
        ("kwargs.lora_alpha", float("inf"), ["lora_alpha is inf, expected a positive number"]),
        ("kwargs.rotary_emb_base", 0, ["rotary_emb_base is 0, expected a positive number"]),
        ("kwargs.vocab_size", float("nan"), ["vocab_size is nan, expected a positive number"]),
        ("kwargs.vocab_size", 10**400, ["vocab_size is 1000", "expected a positive number"]),
        ("kwargs.num_hidden_layers", 0, ["num_hidden_layers is 0, expected a positive number"]),
        ("kwargs.num_hidden_layers", 1.5, ["num_hidden_layers is 1.5, expected a positive number"]),
        ("kwargs.intermediate_size", True, ["intermediate_size is True, expected a positive number"]),
        ("kwargs.lora_rank", -4, ["lora_rank is -4, expected a positive number"]),
        ("vision_config.post_norm", True, ["vision_config.post_norm is True"]),
        ("vision_config.ls_init_value", 1e-4, ["vision_config.ls_init_value is 0.0001", "only None"]),
        ("vision_config.qkv_bias", False, ["vision_config.qkv_bias is False"]),
        ("vision_config.rope_embeddings", False, ["vision_config.rope_embeddings is False"]),
        ("vision_config.intp_freq", False, ["vision_config.intp_freq is False"]),
        ("vision_config.naive_swiglu", False, ["vision_config.naive_swiglu is False"]),
        ("vision_config.subln", False, ["vision_config.subln is False"]),
        ("vision_config.proj_type", "mlp", ["vision_config.proj_type is 'mlp'"]),
        ("vision_config.embed_dim", 64, ["vision embed_dim is 64 but width is 32"]),
        ("vision_config.head_width", 24, ["vision width 32 is not a multiple of head_width"]),
        ("vision_config.head_width", 64, ["vision width 32 cannot be divided into 0 heads"]),
        ("vision_config.head_width", 2, ["cannot be divided into 16 heads whose size is a multiple of 4"]),
        ("vision_config.head_width", 0, ["head_width is 0, expected a positive number"]),
        ("vision_config.patch_size", 0, ["patch_size is 0, expected a positive number"]),
        ("vision_config.patch_size", 29, ["image_size 28 is smaller than patch_size 29"]),
    ],
    ids=lambda v: f"{v}"[:40] if not isinstance(v, list) else "",
)
def test_settings_that_are_not_implemented_are_named(
    checkpoint: Path, refused: Refused, where: str, value: Any, parts: list[str]
) -> None:
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    *sections, name = where.replace("kwargs.", "text_config.hf_model_config_kwargs.").split(".")
    section = config
    for key in sections:
        section = section[key]
    section[name] = value
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    refused(checkpoint, "config.json", *parts)


def test_widths_that_differ_between_the_towers(checkpoint: Path, refused: Refused) -> None:
    config = published_config(32, TEXT, VISION) | {"projection_dim": 64}
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    refused(checkpoint, "text hidden_size is 32 but projection_dim is 64", "no projection")
    config = published_config(32, TEXT, VISION | {"width": 64, "embed_dim": 64})
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    refused(checkpoint, "vision width is 64 but projection_dim is 32", "no projection")


# Tensors


def reweigh(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def _put(name: str, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    tensors[name] = value


OUT = f"{ROBERTA}encoder.layers.0.mixer.out_proj.bias"
LORA = f"{ROBERTA}encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_A"
GATE = "vision_model.blocks.0.mlp.w1.weight"
NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))


@pytest.mark.parametrize("name", [OUT, LORA, GATE, "vision_model.pos_embed", "logit_scale"])
def test_missing_and_unknown_tensors_are_named(checkpoint: Path, refused: Refused, name: str) -> None:
    reweigh(checkpoint, lambda tensors: tensors.update({f"{name}_x": tensors.pop(name)}))
    refused(checkpoint, WEIGHTS, "lacks tensor", name)


@pytest.mark.parametrize("name", [f"{OUT}_x", "vision_model.head.weight", "text_projection.weight"])
def test_tensors_that_nothing_uses_are_refused(checkpoint: Path, refused: Refused, name: str) -> None:
    """A layer that is quietly left out gives vectors that look right."""
    reweigh(checkpoint, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refused(checkpoint, WEIGHTS, f"has unknown tensors: {name}")


def test_many_missing_tensors_are_counted(checkpoint: Path, refused: Refused) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vision_model.blocks.")]:
            del tensors[name]

    reweigh(checkpoint, drop)
    refused(checkpoint, "lacks tensors: vision_model.blocks.0.attn.inner_attn_ln.bias, ", " and 18 more; expected")


@pytest.mark.parametrize("name", [OUT, LORA, GATE, "logit_scale"])
def test_tensors_of_another_shape_or_type_are_named(checkpoint: Path, refused: Refused, name: str) -> None:
    good = load_file(checkpoint / WEIGHTS)[name]
    for value, part in (
        (good[None].contiguous(), f"has shape {[1, *good.shape]}, expected {list(good.shape)}"),
        (good.to(torch.int8), "is I8, expected one of ['BF16', 'F16', 'F32']"),
        (good.to(torch.float64), "is F64, expected one of ['BF16', 'F16', 'F32']"),
    ):
        reweigh(checkpoint, functools.partial(_put, name, value))
        refused(checkpoint, f"tensor {name} {part}")


@pytest.mark.parametrize("name", [OUT, LORA, GATE])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_tensors_with_nan_or_infinity_are_named(
    checkpoint: Path, refused: Refused, name: str, value: torch.Tensor
) -> None:
    reweigh(checkpoint, lambda tensors: tensors[name].view(-1)[-1:].copy_(value))
    tower = "image" if name == GATE else "text"
    refused(checkpoint, f"tensor {name} holds NaN or infinity", "damaged", options=("--towers", tower))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_stored_type_gives_the_same_towers(make_checkpoint: MakeCheckpoint, good: Path, dtype: Any) -> None:
    stored = Checkpoint(make_checkpoint(32, text=TEXT, vision=VISION, dtype=dtype))
    exact = Checkpoint(make_checkpoint(32, text=TEXT, vision=VISION, dtype=torch.float32))
    ids, pixels = torch.tensor([[0, 9, 40, 41, 2]]), torch.linspace(-2, 2, 3 * 28 * 28).view(1, 3, 28, 28)
    with torch.inference_mode():
        assert cosine(stored.text_tower()(ids).numpy(), exact.text_tower()(ids).numpy()) > 0.9995
        assert cosine(stored.image_tower()(pixels).numpy(), exact.image_tower()(pixels).numpy()) > 0.9995
    assert stored.logit_scale == pytest.approx(2.6592, rel=1e-2)


# Tokenizer and preprocessing


def test_a_tokenizer_of_another_checkpoint(checkpoint: Path, small_checkpoint: Path, refused: Refused) -> None:
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    document["added_tokens"][1]["content"] = "<padding>"
    document["model"]["vocab"][1][0] = "<padding>"
    path.write_text(json.dumps(document), "utf-8")
    refused(checkpoint, "tokenizer.json has no <pad>, the text tower expects 1", "tokenizer of the same checkpoint")
    shutil.copy(small_checkpoint / "tokenizer.json", path)
    largest = SIZES["small"]["text"]["vocab_size"] - 1
    refused(checkpoint, f"tokenizer.json has ids up to {largest}", "512 rows", "tokenizer of the same checkpoint")
    path.write_text("{}")
    refused(checkpoint, "is not a readable tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"size": 56}, ["has size 56, config.json has image_size 28", "expected both files from the same checkpoint"]),
        ({"size": "28"}, ["size is '28'"]),
        ({"interpolation": "lanczos"}, ["interpolation is 'lanczos'; expected 'bicubic'"]),
        ({"interpolation": None}, ["interpolation is None; expected 'bicubic'"]),
        ({"resize_mode": "fill"}, ["resize_mode is 'fill'", "'shortest', 'longest', 'squash'"]),
        ({"mean": [0.5]}, ["mean is (0.5,); expected three numbers"]),
        ({"std": [0.5, 0.5, 0]}, ["std is (0.5, 0.5, 0.0)", "above 0"]),
        ({"mean": "x"}, ["expected mean and std of three numbers"]),
        ({"fill_color": 300}, ["fill_color is 300; expected 0 ... 255"]),
    ],
    ids=str,
)
def test_preprocessing_that_does_not_fit(
    checkpoint: Path, refused: Refused, changes: dict[str, Any], parts: list[str]
) -> None:
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    refused(checkpoint, "preprocessor_config.json", *parts)


# Adaptations, and checkpoints by their hub id


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters and bfloat16, in a hub cache as its client leaves it."""
    top = tmp_path_factory.mktemp("hub") / "models--someone--clip"
    snapshot = top / "snapshots" / ("0123456789" * 4)
    adaptations = ["retrieval.query", "text-matching"]
    config = published_config(32, TEXT | {"lora_adaptations": adaptations}, VISION)
    write_random_checkpoint(snapshot, config, dtype=torch.bfloat16)
    (top / "refs").mkdir()
    (top / "refs/main").write_text(snapshot.name)
    return snapshot


@pytest.fixture(scope="module")
def adapted_bundle(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text tower of `adapted` with its default adapter."""
    return export(adapted, tmp_path_factory.mktemp("adapted") / "bundle", "text").directory


@pytest.fixture
def offline(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1 and HF_HUB_CACHE set before the client is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(adapted.parent.parent.parent))


def test_the_chosen_adaptation_is_in_the_vectors(
    adapted: Path, adapted_bundle: Path, offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chosen").mkdir()  # an empty directory is as good as none
    options = ["--towers", "text", "--adaptation", "text-matching"]
    assert main(["export", "someone/clip", "--output", str(tmp_path / "chosen"), *options]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "someone/clip, licence not stated" in err
    vectors = {}
    for path, adaptation in ((tmp_path / "chosen", "text-matching"), (adapted_bundle, "retrieval.query")):
        with ClipModel(path) as model:
            assert model.bundle.model["adaptation"] == adaptation
            vectors[adaptation] = model.encode_text(TEXTS)
            ids = [torch.tensor([row]) for row in model.text_encoder.tokenizer.encode(TEXTS)]
            with torch.inference_mode():
                tower = Checkpoint(adapted, adaptation).text_tower()
                expected = np.concatenate([torch.nn.functional.normalize(tower(row)).numpy() for row in ids])
            assert np.abs(vectors[adaptation] - expected).max() <= 1e-5
    assert cosine(*vectors.values()).max() < 0.999
    chosen, default = Bundle(tmp_path / "chosen"), Bundle(adapted_bundle)
    assert chosen.model["revision"] == adapted.name  # which weights these are, for good
    assert chosen.provenance({"text": "fp32"}) != default.provenance({"text": "fp32"})


def test_adaptations_that_are_not_there(adapted: Path, good: Path, checkpoint: Path, refused: Refused) -> None:
    other = ("--adaptation", "separation")
    refused(adapted, "no adaptation 'separation'; it has retrieval.query, text-matching: choose", options=other)
    config = json.loads((adapted / "config.json").read_text("utf-8"))
    config["text_config"]["default_lora_task"] = None
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    refused(checkpoint, "no default adaptation; it has retrieval.query, text-matching: choose one with --adaptation")
    config["text_config"]["hf_model_config_kwargs"]["lora_adaptations"] = None
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    refused(checkpoint, "'separation' was requested, but the checkpoint has no adapters", options=other)


def test_a_hub_checkpoint_that_cannot_be_had(offline: None, refused: Refused) -> None:
    refused("someone/other", "cannot download someone/other at its newest revision", "check the network, the id")
    refused("someone/clip", "cannot download someone/clip at v2", options=("--revision", "v2"))
    refused("jinaai/jina-clip-v2", f"jina-clip-v2 at {hub.PUBLISHED_REVISION}", "a directory that holds")
    refused("no/such/place", "is not a directory")
    refused("./someone/clip", "is not a directory")


def test_a_part_of_a_hub_checkpoint_is_not_the_whole(offline: None, adapted: Path, refused: Refused) -> None:
    """Who has used only the tokenizer has a snapshot too."""
    assert hub.fetch("someone/clip", None) == adapted
    (adapted / WEIGHTS).rename(adapted.parent / WEIGHTS)
    try:
        refused("someone/clip", WEIGHTS)
    finally:
        (adapted.parent / WEIGHTS).rename(adapted / WEIGHTS)


def test_offline_is_said_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    command = [*COMMAND, "export", "jinaai/jina-clip-v2", "--output", str(tmp_path / "bundle")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "cannot download jinaai/jina-clip-v2" in result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr
    assert not (tmp_path / "bundle").exists()


def download(endpoint: str, tmp_path: Path) -> list[str]:
    """What a failing download from a hub at `endpoint` says on stderr, line by line."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [*COMMAND, "export", "jinaai/jina-clip-v2", "--output", str(tmp_path / "bundle")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert not (tmp_path / "bundle").exists()
    return result.stderr.splitlines()


def test_a_hub_that_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    """As for a gated model without a login; the licence and the size are said before the request."""

    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        lines = download(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
    assert len(lines) == 2, lines
    assert "CC BY-NC 4.0 (no commercial use), 1.7 GB" in lines[0]
    assert "cannot download jinaai/jina-clip-v2" in lines[1] and "your login" in lines[1]


@pytest.mark.slow  # the client tries again for half a minute
def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path: Path) -> None:
    """The client's own warnings of every retry once stood between."""
    lines = download("http://127.0.0.1:9", tmp_path)
    assert len(lines) == 2, lines
    assert "cannot download jinaai/jina-clip-v2" in lines[1] and "check the network" in lines[1]


# Where the bundle goes


def test_outputs_that_cannot_be(good: Path, refused: Refused, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    refused(good, f"{full} already exists; choose another --output or remove it first", output=full)
    refused(good, "mine.txt already exists", output=full / "mine.txt")
    refused(good, "nowhere is not a directory; create it first", output=tmp_path / "nowhere" / "bundle")
    refused(good, "mine.txt is not a directory; create it first", output=full / "mine.txt" / "bundle")
    refused(good, "File name too long", output=tmp_path / ("x" * 300))
    assert (full / "mine.txt").read_text() == "keep"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mount(options): a file system of its own, where this process may make one."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        directory = tmp_path / f"disk-{len(mounted)}"
        directory.mkdir()
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mount -t tmpfs needs root")
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", directory], check=True)


def test_too_little_disk_is_seen_before_the_work(
    good: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000_000))
    refused(good, "has 0.1 GB free, the bundle needs 0.1 GB; free disk space or choose another --output")


def test_disks_that_are_full_or_read_only(
    good: Path, refused: Refused, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = mount("size=600k")
    refused(good, "has 0.0 GB free, the bundle needs 0.1 GB", output=small / "bundle")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))  # someone else fills it
    refused(good, "bundle: No space left on device; partial files were removed", output=small / "bundle")
    assert listing(small) == []
    refused(good, "Read-only file system", output=mount("ro") / "bundle")


def test_full_disk_for_random_weights_is_said_in_one_line(
    mount: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = mount("size=600k")
    assert main(["export", "--random", "small", "--output", str(small / "bundle")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot write the random checkpoint" in err and "No space left" in err
    assert listing(small) == []


def started(checkpoint: Path, output: Path, until: str) -> subprocess.Popen[str]:
    """An export of its own process that has come as far as the file `until` of the partial bundle."""
    command = [*COMMAND, "export", str(checkpoint), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = output.parent / f".{output.name}.partial-{process.pid}"
    deadline = time.monotonic() + 120
    while not (partial / until).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def test_a_killed_export_leaves_nothing_that_opens(adapted: Path, adapted_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    process = started(adapted, output, "text-fp32.onnx")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 2  # the half bundle, and the place for random weights
    for directory in left:
        with pytest.raises(BundleError, match=r"has no bundle\.json"):
            ClipModel(directory)
    (tmp_path / f".bundle.partial-{os.getpid()}0000000").mkdir()  # of a process that cannot be
    (tmp_path / ".bundle.partial-1").mkdir()  # of one that runs: another export of this name
    bundle = export(adapted, output, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.partial-1", "bundle"]
    other = Bundle(adapted_bundle)
    assert bundle.provenance({"text": "fp32"}) == other.provenance({"text": "fp32"})
    assert bundle.files == other.files  # the same bytes, too


def test_an_interrupted_export_leaves_nothing(good: Path, tmp_path: Path) -> None:
    process = started(good, tmp_path / "bundle", "tokenizer.json")
    time.sleep(0.5)  # into torch
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    # Where Ctrl-C meets an exec() inside torch, Python ends by the signal itself; a shell calls both 130.
    assert process.returncode in (130, -signal.SIGINT)
    assert (out, err) == ("", "jinaclip: interrupted\n")
    assert listing(tmp_path) == []


# A graph that is not the tower


def test_a_graph_that_differs_from_torch_is_not_written(
    good: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits of every weight are lost between export and comparison."""
    write = graphs._write

    def write_badly(*args: Any) -> None:
        write(*args)
        data = Path(f"{args[-1]}.data")
        weights = np.frombuffer(data.read_bytes(), np.uint32) & 0xFFFF8000
        data.write_bytes(weights.tobytes())

    monkeypatch.setattr(graphs, "_write", write_badly)
    refused(
        good, "the text graph differs from torch by ", "on unit vectors", "expected at most 1e-05",
        "nothing was written", options=("--towers", "text"),
    )  # fmt: skip
    assert issubclass(ParityError, Exception) and not issubclass(ParityError, CheckpointError)


# Random checkpoints


def test_random_weights_by_seed_and_float32_pixels(
    small_checkpoint: Path, small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed gives the same bytes; the published file's input gives the vectors of 8-bit pixels."""
    kept, output = tmp_path / "checkpoint", tmp_path / "bundle"
    options = ["--checkpoint-output", str(kept), "--towers", "image", "--pixels", "float32"]
    assert main(["export", "--random", "small", "--output", str(output), *options]) == 0
    assert "random-small, licence none: random weights" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    for name in (WEIGHTS, "config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (kept / name).read_bytes() == (small_checkpoint / name).read_bytes()
    assert sorted(path.name for path in output.iterdir()) == [
        MANIFEST, "golden-0.png", "golden-1.png", "image-fp32.onnx", "image-fp32.onnx.data",
    ]  # fmt: skip
    assert signature(load(output, "image").graph.input) == {"pixel_values": ("float32", "batch", 3, 140, 140)}
    with ClipModel(output) as one, ClipModel(small_bundle, towers=("image",)) as two:
        assert np.abs(one.encode_image(PHOTOS) - two.encode_image(PHOTOS)).max() <= 1e-6
        with pytest.raises(InputError, match="no text tower"):
            one.encode_text("cat")


def test_another_seed_gives_other_vectors(small_checkpoint: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, published_config(**SIZES["small"]), seed=1)
    assert (tmp_path / WEIGHTS).read_bytes() != (small_checkpoint / WEIGHTS).read_bytes()
    ids = torch.tensor([[0, 9, 40, 41, 2]])
    with torch.inference_mode():
        vectors = [Checkpoint(path).text_tower()(ids).numpy() for path in (small_checkpoint, tmp_path)]
    assert cosine(*vectors) < 0.9


def test_random_weights_are_refused_before_they_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path
) -> None:
    new = ["--output", str(tmp_path / "bundle"), "--checkpoint-output", str(tmp_path / "checkpoint")]
    assert main(["export", "--random", "small", "--tokenizer", str(tmp_path / "none.json"), *new]) == 1
    assert "none.json is not a file; expected a tokenizer.json" in capsys.readouterr().err
    assert listing(tmp_path) == []
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/mine").touch()
    assert main(["export", "--random", "small", *new]) == 1
    assert "checkpoint already exists; choose another one or remove it first" in capsys.readouterr().err
    for wrong, part in (
        ([str(good), "--tokenizer", "x"], "--tokenizer can only be used with --random"),
        ([str(good), "--checkpoint-output", "x"], "--checkpoint-output can only be used with --random"),
        ([str(good), "--random", "small"], "not allowed with argument"),
        ([], "one of the arguments CHECKPOINT --random is required"),
        (["--random", "small", "--seed", "9" * 30], "is too large"),
        ([str(good), "--towers", "sound"], "'sound', expected some of text,image"),
        ([str(good), "--precision", "bf16"], "'bf16', expected some of fp32"),
        ([str(good), "--pixels", "int8"], "invalid choice: 'int8'"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["export", *wrong, "--output", str(tmp_path / "bundle")])
        assert caught.value.code == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


# What comes out


def load(bundle: Path, tower: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"{tower}-fp32.onnx", load_external_data=False)


def signature(values: Any) -> dict[str, tuple[Any, ...]]:
    return {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            *(side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim),
        )
        for value in values
    }


def test_graphs_have_the_promised_inputs_and_outputs(small_bundle: Path) -> None:
    assert sorted(path.name for path in small_bundle.glob("*.onnx")) == ["image-fp32.onnx", "text-fp32.onnx"]
    text, image = load(small_bundle, "text").graph, load(small_bundle, "image").graph
    assert signature(text.input) == {"input_ids": ("int64", "batch", "tokens")}
    assert signature(image.input) == {"pixel_values": ("uint8", "batch", 140, 140, 3)}
    for tower, graph in (("text", text), ("image", image)):
        wanted = ("float32", "batch", 128)
        assert signature(graph.output) == {f"{tower}_embeddings": wanted, f"l2norm_{tower}_embeddings": wanted}
        assert graph.output[0].name == f"{tower}_embeddings"


@pytest.mark.parametrize("tower", ["text", "image"])
def test_graphs_are_standard_and_fused(small_bundle: Path, tower: str) -> None:
    model = load(small_bundle, tower)
    assert [entry.domain for entry in model.opset_import] == [""] and model.opset_import[0].version >= 23
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Attention") == 3  # one a block
    assert "Loop" not in operators and "If" not in operators
    onnx.checker.check_model(str(small_bundle / f"{tower}-fp32.onnx"), full_check=True)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_graphs_keep_their_weights_beside_them(small_bundle: Path, tower: str) -> None:
    name = f"{tower}-fp32.onnx"
    assert (small_bundle / name).stat().st_size < 100_000 < (small_bundle / f"{name}.data").stat().st_size
    weights = [t for t in load(small_bundle, tower).graph.initializer if np.prod(t.dims) > 1000]
    assert weights
    for tensor in weights:
        places = {entry.key: entry.value for entry in tensor.external_data}
        assert tensor.data_location == onnx.TensorProto.EXTERNAL and places["location"] == f"{name}.data"


@pytest.mark.parametrize("name", ["text-fp32.onnx", "image-fp32.onnx", MANIFEST])
def test_nothing_of_this_machine_is_in_a_bundle(small_bundle: Path, name: str) -> None:
    content = (small_bundle / name).read_bytes()
    for trace in (b".py", b"site-packages", b"/home", b"/tmp", b"/root", b"/usr", str(ROOT).encode(), b"stack_trace"):
        assert trace not in content
    if name.endswith(".onnx"):
        model = load(small_bundle, name[:-10])
        assert model.producer_name == "jinaclip" and not model.doc_string and not model.metadata_props
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 17), (5, 200)])
def test_text_graph_takes_any_batch_and_length(small_bundle: Path, shape: tuple[int, int]) -> None:
    session = onnxruntime.InferenceSession(small_bundle / "text-fp32.onnx", providers=["CPUExecutionProvider"])
    raw, unit = session.run(None, {"input_ids": np.full(shape, 9, np.int64)})
    assert raw.shape == unit.shape == (shape[0], 128)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6) and np.allclose(cosine(raw, unit), 1, atol=1e-6)


def test_image_graph_takes_any_batch(small_bundle: Path) -> None:
    session = onnxruntime.InferenceSession(small_bundle / "image-fp32.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (5, 140, 140, 3), np.uint8)
    raw, unit = session.run(None, {"pixel_values": pixels})
    assert raw.shape == (5, 128) and np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    for row in range(5):
        assert np.abs(session.run(None, {"pixel_values": pixels[row : row + 1]})[1] - unit[row]).max() <= 1e-6


def test_manifest_is_of_the_files_and_the_checkpoint(small_bundle: Path, small_checkpoint: Path) -> None:
    manifest = json.loads((small_bundle / MANIFEST).read_text("utf-8"))
    names = {path.name for path in small_bundle.iterdir() if path.is_file()} - {MANIFEST}
    assert set(manifest["files"]) == names
    sha256 = hashlib.sha256((small_checkpoint / WEIGHTS).read_bytes()).hexdigest()
    assert manifest["model"]["weights_sha256"] == sha256
    assert manifest["dims"] == [32, 64, 128] and manifest["text"]["max_tokens"] == 8192
    assert all(error["fp32"] <= graphs.MAX_ERROR for error in manifest["parity"].values())
    assert (small_bundle / "tokenizer.json").read_bytes() == (small_checkpoint / "tokenizer.json").read_bytes()
    Bundle(small_bundle).verify_hashes()


def test_odd_sizes_without_adapters(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Depth 1, wide heads, a picture that is no multiple of its patches, and 14 tokens at most."""
    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 16}
    text: dict[str, Any] = TEXT | sizes | {"lora_adaptations": []}
    vision = {"width": 48, "layers": 1, "head_width": 48, "image_size": 33, "patch_size": 16}
    checkpoint = make_checkpoint(48, text=text, vision=vision, dtype=torch.float32)
    bundle = export(checkpoint, tmp_path / "bundle")
    assert bundle.dims == (32, 48) and bundle.max_tokens == 14 and bundle.model["adaptation"] is None
    for tower in ("text", "image"):
        operators = [node.op_type for node in load(bundle.directory, tower).graph.node]
        assert operators.count("Attention") == 1
    with ClipModel(bundle.directory) as model:
        vectors = model.encode_text(TEXTS)
        assert vectors.shape == (len(TEXTS), 48) and np.isfinite(vectors).all()
        ids = torch.tensor(model.text_encoder.tokenizer.encode(["cat"]))
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(Checkpoint(checkpoint).text_tower()(ids)).numpy()
        assert np.abs(model.encode_text(["cat"]) - expected).max() <= 1e-5
        assert model.encode_image(PHOTOS[:2], truncate_dim=32).shape == (2, 32)
