"""ClipModel and the server on a GPU, from the bundle to the answer."""

from __future__ import annotations

import base64
import gc
import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jinaclip import ClipModel
from jinaclip.backends import self_test as selftest
from jinaclip.backends.cuda import gpu
from tests.gpu.dry_run.journal import Journal
from tests.gpu.dry_run.test_sessions import check_threads, used_bytes
from tests.gpu.dry_run.without_comparison import UNBOUNDED
from tests.support.running import running, vectors_of

TEXTS = ["a", "A beautiful sunset over the beach", "海滩上美丽的日落", "one two three four five six seven " * 20, ""]


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (90, 120, 3), np.uint8))


def data_uri(number: int) -> str:
    file = io.BytesIO()
    picture(number).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def uncompared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not computed: the self-test runs, and compares nothing."""
    monkeypatch.setattr(selftest, "TOLERANCE", UNBOUNDED)


@pytest.mark.usefixtures("uncompared")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_a_model_encodes_on_the_device(bundle: Path, journal: Journal, device: str) -> None:
    mark = journal.mark()
    with ClipModel(bundle, device=device, precision="fp16", self_test="always") as model:
        for tower, facts in model.info()["towers"].items():
            assert (facts["backend"], facts["device"], facts["precision"]) == ("onnxruntime", "cuda", "fp16"), tower
            assert facts["prepared"].startswith(f"{tower}-fp16-onnxruntime-")
        assert model.encode_text(TEXTS * 20).shape == (100, model.dims[-1])
        assert model.encode_text(TEXTS, truncate_dim=model.dims[0], batch_size=2).shape == (5, model.dims[0])
        assert model.encode_image([picture(number) for number in range(20)]).shape == (20, model.dims[-1])
        assert model.encode_image(picture(0)).shape == (model.dims[-1],)
    record = journal.since(mark)
    assert record.faults == []
    check_threads(record)


@pytest.mark.usefixtures("uncompared")
def test_closing_gives_the_memory_back(bundle: Path, journal: Journal) -> None:
    def once() -> None:
        with ClipModel(bundle, device="cuda", precision="fp16") as model:
            model.encode_text(TEXTS)
            model.encode_image(picture(0))
        gc.collect()

    once()
    used, mark = used_bytes(), journal.mark()
    for _ in range(3):
        once()
    assert used_bytes() <= used and journal.since(mark).faults == []


@pytest.mark.usefixtures("uncompared")
def test_another_device_is_another_device(bundle: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_DEVICES", "2")
    gpu._ask_driver.cache_clear()
    mark = journal.mark()
    try:
        with ClipModel(bundle, device="cuda:1", precision="fp16") as model:
            model.encode_text(TEXTS)
    finally:
        gpu._ask_driver.cache_clear()
    record = journal.since(mark)
    assert record.faults == []
    assert {e["device"] for e in record.of("allocate", where="device")} == {1}


def test_the_server_on_a_device(bundle: Path, journal: Journal) -> None:
    mark = journal.mark()
    words = ("--device", "cuda", "--precision", "fp16")
    with running(bundle, *words, module="tests.gpu.dry_run.without_comparison") as server:

        def ask(number: int) -> int:
            items: list[Any] = [{"text": f"{number}"}] * (number % 4)
            items.append({"image": data_uri(number)} if number % 3 == 0 else {"text": TEXTS[number % 4]})
            return len(vectors_of(server.post({"model": "random-small", "input": items})))

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(ask, range(90))) == sum(1 + number % 4 for number in range(90))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert "rror" not in server.log and "arning" not in server.log, server.log
    record = journal.since(mark)
    assert record.faults == []
    assert record.of("graph launch")
    check_threads(record)
    assert os.getpid() not in record.threads
