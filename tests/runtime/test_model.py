"""ClipModel as its users see it: shapes, order, dims, padding, batch invariance, threads, fork, pickle."""

from __future__ import annotations

import base64
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jinaclip import BackendError, BackendMissing, BundleError, ClipModel, InputError
from tests.conftest import PHOTOS, TEXTS

# Alone and in company a row goes through the same float32 sums, but in GEMMs of another height.
INVARIANT = 1e-6


def test_shapes_and_types(model: ClipModel) -> None:
    D = model.dims[-1]
    for one, many, none in (
        (model.encode_text("cat"), model.encode_text(["cat", "dog"]), model.encode_text([])),
        (model.encode_image(PHOTOS[0]), model.encode_image(PHOTOS[:2]), model.encode_image([])),
    ):
        assert (one.shape, many.shape, none.shape) == ((D,), (2, D), (0, D))
        assert one.dtype == many.dtype == none.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-6)
    assert model.text_encoder.run([]).shape == model.image_encoder.run([]).shape == (0, D)


def test_ids_and_pixels_that_no_graph_takes_are_refused(model: ClipModel) -> None:
    """By every backend alike: a GPU's kernels take ids beyond the table, and arrays are copied to it as they come."""
    vocabulary, size = model.bundle.vocab_size, model.bundle.preprocessing.size
    for bad, words in (
        ([], "0 tokens"),
        ([0] * (model.max_tokens + 1), f"expected 1 to {model.max_tokens}"),
        ([0, vocabulary, 2], f"0 to {vocabulary - 1}"),
        ([0, -1, 2], f"0 to {vocabulary - 1}"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            model.text_encoder.run([[0, 2], bad])
        assert refused.value.index == 1
    good = np.zeros((size, size, 3), np.uint8)
    for wrong in (good.astype(np.float32), good[1:], good.transpose(2, 0, 1)):
        with pytest.raises(InputError, match="expected uint8") as refused:
            model.image_encoder.run([good, wrong])
        assert refused.value.index == 1


def test_order_is_the_callers(model: ClipModel) -> None:
    """Texts are sorted by length inside; what comes back is not."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(TEXTS, rng.integers(1, 6))) for _ in range(60)]
    together = model.encode_text(texts)
    for index in (0, 7, 31, 59):
        np.testing.assert_allclose(together[index], model.encode_text(texts[index]), atol=INVARIANT)
    photos = PHOTOS * 3
    together = model.encode_image(photos, batch_size=4)
    for index in (0, 6, 14):
        np.testing.assert_allclose(together[index], model.encode_image(photos[index]), atol=INVARIANT)


def test_a_row_does_not_depend_on_its_batch(model: ClipModel) -> None:
    """Beside an outlier: a text of thousands of tokens, of rare characters; a picture of noise."""
    outlier = "\U0001f600龘" * 900
    for text in (*TEXTS, "", "a"):
        alone = model.encode_text(text)
        beside = model.encode_text([outlier, text, "b"], batch_size=3)[1]
        np.testing.assert_allclose(beside, alone, atol=INVARIANT)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    for photo in PHOTOS:
        alone = model.encode_image(photo)
        beside = model.encode_image([noise, photo, np.zeros((9, 9, 3), np.uint8)], batch_size=3)[1]
        np.testing.assert_allclose(beside, alone, atol=INVARIANT)


def test_padding_changes_nothing(model: ClipModel) -> None:
    """The graph itself, with more padding than ClipModel would ever make."""
    session = model.text_encoder.session
    ids = np.array([[0, 50, 60, 70, 2]])
    padded = np.concatenate([ids, np.ones((1, 300), np.int64)], axis=1)
    outputs = [session.run({"input_ids": x})["l2norm_text_embeddings"] for x in (ids, padded)]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=INVARIANT)


def test_every_dim_is_cut_first_and_normalised_after(model: ClipModel) -> None:
    full = model.encode_text(TEXTS, normalize_embeddings=False)
    pictures = model.encode_image(PHOTOS, normalize_embeddings=False)
    for dim in model.dims:
        for cut, raw in (
            (model.encode_text(TEXTS, truncate_dim=dim), full),
            (model.encode_image(PHOTOS, truncate_dim=dim), pictures),
        ):
            expected = raw[:, :dim] / np.linalg.norm(raw[:, :dim], axis=1, keepdims=True)
            assert cut.shape == (len(raw), dim)
            np.testing.assert_allclose(cut, expected, atol=INVARIANT)
    raw = model.encode_text(TEXTS, truncate_dim=32, normalize_embeddings=False)
    np.testing.assert_allclose(raw, full[:, :32], atol=1e-5)  # raw vectors have norms near 10


@pytest.mark.parametrize("dim", [0, -1, 1, 48, 129, 1024, 32.0, "64", True])
def test_other_dims_are_refused_with_the_list(model: ClipModel, dim: Any) -> None:
    with pytest.raises(InputError, match="expected one of 32, 64, 128"):
        model.encode_text("a", truncate_dim=dim)
    with pytest.raises(InputError, match="expected one of 32, 64, 128"):
        model.encode_image([], truncate_dim=dim)


def test_task_puts_its_instruction_before_the_text(model: ClipModel) -> None:
    assert model.tasks == ("retrieval.query",)
    sentence = "Represent the query for retrieving evidence documents: "
    plain = model.encode_text(sentence + "cat")
    np.testing.assert_allclose(model.encode_text("cat", task="retrieval.query"), plain, atol=INVARIANT)
    assert np.abs(model.encode_text("cat") - plain).max() > 0.01
    with pytest.raises(InputError, match=r"'retrieval\.passage' .* expected None or retrieval\.query"):
        model.encode_text("cat", task="retrieval.passage")


def test_max_length_counts_specials_and_instruction(model: ClipModel, caplog: pytest.LogCaptureFixture) -> None:
    words = "one two three four five six seven eight"
    with caplog.at_level(logging.WARNING, "jinaclip"):
        whole = model.encode_text(words, max_length=8192)
        assert caplog.messages == []
        cut = model.encode_text([words, "cat"], max_length=6)
    assert len(caplog.messages) == 1 and "1 of 2 texts were truncated to max_length=6 tokens" in caplog.messages[0]
    assert np.abs(cut[0] - whole).max() > 0.01
    np.testing.assert_allclose(cut[1], model.encode_text("cat"), atol=INVARIANT)
    for bad in (0, 2, -5, 8193, "512", 5.0, True):
        with pytest.raises(InputError, match=r"max_length is .* from 3 .* to 8192"):
            model.encode_text("cat", max_length=bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"max_length is 5, .* the task's instruction count"):
        model.encode_text("cat", task="retrieval.query", max_length=5)


def test_lengths_from_nothing_to_8192_tokens(model: ClipModel) -> None:
    texts = ["", "a", "<pad>", "</s>", "字 " * 8190, "字 " * 9000]
    logging.getLogger("jinaclip").setLevel(logging.ERROR)
    try:
        vectors = model.encode_text(texts)
    finally:
        logging.getLogger("jinaclip").setLevel(logging.NOTSET)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[4], vectors[5], atol=INVARIANT)  # the second is cut to the first
    assert len({tuple(v) for v in vectors[:5]}) == 5


def test_images_of_every_kind_are_one_picture(model: ClipModel, tmp_path: Path) -> None:
    photo = PHOTOS[0]
    expected = model.encode_image(photo)
    with Image.open(photo) as opened, photo.open("rb") as file:
        array = np.asarray(opened.convert("RGB"))
        data = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
        kinds: list[Any] = [str(photo), photo, photo.read_bytes(), file, opened, array, data]
        np.testing.assert_allclose(model.encode_image(kinds), [expected] * len(kinds), atol=INVARIANT)
        np.testing.assert_allclose(model.encode_image(array), expected, atol=INVARIANT)
    np.testing.assert_allclose(model.encode_image(iter([photo])), [expected], atol=INVARIANT)
    np.testing.assert_allclose(model.encode_image(np.stack([array, array])), [expected] * 2, atol=INVARIANT)


def test_resize_modes_and_exif_reach_the_picture(model: ClipModel, tmp_path: Path) -> None:
    vectors = [model.encode_image(PHOTOS[1], resize_mode=mode) for mode in (None, "shortest", "longest", "squash")]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=INVARIANT)
    assert min(np.abs(a - b).max() for i, a in enumerate(vectors[1:]) for b in vectors[2 + i :]) > 1e-3
    with pytest.raises(InputError, match="expected one of shortest, longest, squash"):
        model.encode_image(PHOTOS[1], resize_mode="crop")
    with Image.open(PHOTOS[0]) as image:
        exif = Image.Exif()
        exif[0x0112] = 3
        image.convert("RGB").save(tmp_path / "turned.png", exif=exif)
        upside_down = model.encode_image(image.convert("RGB").rotate(180))
    plain = model.encode_image(tmp_path / "turned.png")
    np.testing.assert_allclose(plain, model.encode_image(PHOTOS[0]), atol=INVARIANT)
    turned = model.encode_image(tmp_path / "turned.png", exif_transpose=True)
    np.testing.assert_allclose(turned, upside_down, atol=INVARIANT)


def test_a_bad_image_is_named_by_its_place(model: ClipModel, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"image 2: .*bad\.jpg") as caught:
        model.encode_image([PHOTOS[0], PHOTOS[1], tmp_path / "bad.jpg"])
    assert caught.value.index == 2
    results = list(model.image_encoder.run_all([tmp_path / "bad.jpg", PHOTOS[0], b"", PHOTOS[1]], batch_size=3))
    assert [isinstance(r, InputError) for r in results] == [True, False, True, False]
    with pytest.raises(InputError, match="allow_urls"):
        model.encode_image("https://localhost/cat.jpg")


def test_wrong_arguments_are_named(model: ClipModel, small_bundle: Path) -> None:
    for texts in (7, None, {"a": 1}):
        with pytest.raises(InputError, match="texts is a"):
            model.encode_text(texts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text 1 is a int"):
        model.encode_text(["a", 7])  # type: ignore[list-item]
    with pytest.raises(InputError, match="batch_size is 0"):
        model.encode_text("a", batch_size=0)
    for settings, error, message in (
        ({"backend": "tensorflow"}, InputError, "expected one of auto, onnxruntime, tensorrt, tensorrt-rtx"),
        ({"backend": "tensorrt"}, BackendMissing, "no NVIDIA driver|needs the package tensorrt"),
        ({"backend": "tensorrt-rtx", "device": "cpu"}, BackendMissing, "runs on NVIDIA GPUs, not on device 'cpu'"),
        ({"device": "cuda"}, BackendMissing, "no NVIDIA driver|has no CUDA provider"),
        ({"device": "tpu"}, InputError, "expected auto, cpu, cuda or cuda:N"),
        ({"precision": "fp8"}, InputError, "expected one of auto, fp32, fp16, int8"),
        ({"precision": "int8"}, BundleError, r"no int8 text graph \(it has: fp32\)"),
        ({"precision": {"image": "fp16"}}, BundleError, "no fp16 image graph"),
        ({"precision": {"audio": "fp16"}}, InputError, "tower 'audio'"),
        ({"threads": 0}, InputError, "threads is 0"),
        ({"towers": ("audio",)}, InputError, "towers is"),
        ({"self_test": "off"}, InputError, "expected one of auto, always"),
    ):
        with pytest.raises(error, match=message):
            ClipModel(small_bundle, **settings)


def test_similarity(model: ClipModel) -> None:
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [0.0, 2.0], [-1.0, 0.0]])
    np.testing.assert_allclose(model.similarity(a, b), [[1, 0.8, -0.6], [0.6, 0, -1]], atol=1e-6)
    assert model.similarity(a[0], b).shape == (3,)
    assert model.similarity(a[0], b[0]).shape == ()
    with pytest.raises(InputError, match="equal D"):
        model.similarity(a, np.ones((2, 3)))


def test_info_tells_what_auto_chose(model: ClipModel) -> None:
    import json

    info = json.loads(json.dumps(model.info()))
    assert info["provenance"] == model.provenance
    for tower in ("text", "image"):
        facts = info["towers"][tower]
        assert (facts["precision"], facts["backend"], facts["device"]) == ("fp32", "onnxruntime", "cpu")
        assert facts["providers"] == ["CPUExecutionProvider"]


def test_one_tower_is_loaded_alone(small_bundle: Path) -> None:
    with ClipModel(small_bundle, towers=("text",)) as model:
        assert model.encode_text("cat").shape == (128,)
        with pytest.raises(InputError, match="image tower was not loaded"):
            model.encode_image(PHOTOS[0])
        provenance = model.provenance
    with ClipModel(small_bundle, towers=("image",)) as model:
        assert model.provenance == provenance  # one id for both towers


def test_text_does_not_read_the_image_tower(small_bundle: Path) -> None:
    """Not mapped, not opened: text never pays for images."""
    script = (
        "import sys\nfrom jinaclip import ClipModel\n"
        f"m = ClipModel({str(small_bundle)!r}, towers=('text',)); m.encode_text('a')\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'image-fp32' not in maps\n"
        "print([n for n in ('torch', 'onnx', 'transformers', 'safetensors') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_threads_share_one_model(model: ClipModel) -> None:
    expected = model.encode_text(TEXTS)
    pictures = model.encode_image(PHOTOS)

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(TEXTS), 8):
            np.testing.assert_allclose(model.encode_text([TEXTS[i]])[0], expected[i], atol=INVARIANT)
        i = seed % len(PHOTOS)
        np.testing.assert_allclose(model.encode_image(PHOTOS[i]), pictures[i], atol=INVARIANT)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))


def test_images_are_taken_as_they_are_needed(model: ClipModel) -> None:
    """A batch and one picture for each reading thread, however long the source; a CPU runs one batch at a time."""
    session = model.image_encoder.session
    taken = 0

    def source() -> Iterator[Path]:
        nonlocal taken
        for photo in PHOTOS * 20:
            taken += 1
            yield photo

    vectors = model.image_encoder.run_all(source(), batch_size=2)
    next(vectors)
    assert session.concurrency == 1
    assert taken <= 2 + session.threads


def test_a_pickled_model_opens_its_bundle_again(model: ClipModel) -> None:
    copy = pickle.loads(pickle.dumps(model))
    with copy:
        np.testing.assert_array_equal(copy.encode_text("cat"), model.encode_text("cat"))
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        np.testing.assert_allclose(pool.apply(model.encode_text, ("cat",)), model.encode_text("cat"), atol=INVARIANT)


FORK = """
import gc, os, sys
from jinaclip import BackendError, ClipModel
model = ClipModel(sys.argv[1], threads=4)
expected = model.encode_text("cat")
child = os.fork()
if child == 0:
    try:
        model.encode_text("cat")
    except BackendError as error:
        print(error, flush=True)
    model.close()
    del model
    gc.collect()
    with ClipModel(sys.argv[1], towers=("text",)) as own:
        assert abs(own.encode_text("cat") - expected).max() < 1e-6
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert abs(model.encode_text("cat") - expected).max() == 0
print("child ended with", os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_is_told_and_lives(small_bundle: Path) -> None:
    """onnxruntime itself dies with SIGSEGV where a child frees its parent's session."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(small_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    message, ending = done.stdout.splitlines()
    assert "does not work after a fork" in message and "open a ClipModel in each process" in message
    assert ending == "child ended with 0"


def test_closed_models_say_so(small_bundle: Path) -> None:
    model = ClipModel(small_bundle)
    model.close()
    model.close()
    with pytest.raises(BackendError, match="closed"):
        model.encode_text("cat")
    del model
    gc.collect()


def test_ctrl_c_ends_a_long_run(small_bundle: Path) -> None:
    """In the middle of one run of the graph, not after it."""
    script = (
        "from jinaclip import ClipModel\n"
        f"m = ClipModel({str(small_bundle)!r}, towers=('text',))\n"
        "print('ready', flush=True)\n"
        "try:\n    while True: m.encode_text(['字' * 8000] * 50)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "print(m.encode_text('still works').shape)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (out, err) == ("interrupted\n(128,)\n", "")


def test_memory_is_given_back_after_a_long_text(small_bundle: Path) -> None:
    """A server that once saw a long text does not keep its gigabyte."""
    script = (
        "from jinaclip import ClipModel\n"
        "def rss(): return int([l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1]) >> 10\n"
        f"m = ClipModel({str(small_bundle)!r}, towers=('text',))\n"
        "m.encode_text(['字' * 100] * 50)\n"
        "before = rss(); m.encode_text('字' * 8100); print(rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert int(done.stdout) < 200  # MiB; the run itself takes more than 1 GiB


def test_logs_and_prints_nothing(model: ClipModel, capfd: pytest.CaptureFixture[str]) -> None:
    model.encode_text(TEXTS, show_progress_bar=True)
    model.encode_image(PHOTOS, show_progress_bar=True)
    assert capfd.readouterr() == ("", "")  # not a terminal: no progress either
    assert threading.active_count() < 20
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
