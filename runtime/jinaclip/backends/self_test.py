"""The self-test: compares a session's vectors with the bundle's golden vectors before the session is used.

The vectors of a miscompiled engine, a wrong provider or a changed tokenizer look plausible. For every golden, the
distance between its vector and its golden vector must be a small fraction of the distance to the nearest other golden
vector, so that the error cannot change the order of search results.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version

import numpy as np

from jinaclip.backends.base import Session
from jinaclip.bundle.files import facts_hash, safe_name
from jinaclip.bundle.manifest import Bundle, Golden
from jinaclip.embeddings import truncate
from jinaclip.errors import InputError, SelfTestFailed
from jinaclip.preprocessing.image import preprocess
from jinaclip.preprocessing.text import TextTokenizer

# Largest allowed error, relative to the distance to the nearest other golden vector.
TOLERANCE = {"fp32": 0.001, "fp16": 0.02, "int8": 0.2}


def run_self_test(
    bundle: Bundle,
    tower: str,
    precision: str,
    session: Session,
    *,
    tokenizer: TextTokenizer | None = None,
    always: bool = False,
) -> dict[str, float | bool]:
    """Run the self-test, unless the result of an earlier pass is recorded.

    The test of the text tower takes two short texts and always runs. The test of the image tower takes two images and
    is slower, so a pass is recorded in the bundle or the cache directory. The record applies to the same graph,
    backend version, device and Pillow version.

    Args:
        bundle: the bundle.
        tower: name of the tower.
        precision: the session's precision, which sets the tolerance.
        session: the session to test.
        tokenizer: tokenizer of the text tower, which is also tested. None opens the bundle's.
        always: run the test even if a pass is recorded.

    Returns:
        {"ratio": largest error ÷ distance to the nearest other golden vector, "remembered": bool}. "remembered" is
        True if the result is that of an earlier run.

    Raises:
        SelfTestFailed: the test failed; the message names the golden and the error.
    """
    facts = {
        "graph": bundle.graph_fingerprint(tower, precision),
        "goldens": [golden.embedding.tobytes().hex()[:32] for golden in bundle.goldens[tower]],
        "session": session.describe() | {"threads": None},
        "preprocessing": [bundle.manifest.get("image"), version("pillow")],
    }
    name = safe_name(f"{tower}-{precision}-{session.backend}-{session.device}")
    note = f"selftest/{name}-{facts_hash(facts)}.json"
    if tower == "image" and not always:
        passed = (bundle.read_note(note) or {}).get("ratio")
        if isinstance(passed, float) and 0 <= passed <= TOLERANCE[precision]:
            return {"ratio": passed, "remembered": True}
    ratio = _test(bundle, tower, precision, session, tokenizer)
    if tower == "image":
        bundle.write_note(note, {"ratio": ratio, **session.describe()})
    return {"ratio": ratio, "remembered": False}


def _test(bundle: Bundle, tower: str, precision: str, session: Session, tokenizer: TextTokenizer | None) -> float:
    goldens = bundle.goldens[tower]
    expected = np.stack([golden.embedding for golden in goldens])
    if tower == "text":
        tokenizer = tokenizer or bundle.open_tokenizer()
        batch = tokenizer.padded([_ids(golden, tokenizer, bundle.max_tokens) for golden in goldens])
    else:
        batch = bundle.image_input(np.stack([_pixels(golden, bundle) for golden in goldens]))
    outputs = session.run({bundle.tower(tower).input_name: batch})
    where = f"self-test of {tower} {precision} on {session.backend} {session.device}"
    advice = "the session is not used; check the files with `jinaclip verify`, then export or build again"
    apart = np.linalg.norm(expected[:, None] - expected[None], axis=-1) + np.diag([np.inf] * len(goldens))
    largest = 0.0
    for output in (f"{tower}_embeddings", f"l2norm_{tower}_embeddings"):  # encoding uses the first
        if output not in outputs:
            raise SelfTestFailed(f"{where}: the graph has no output {output}, only {', '.join(outputs)}; {advice}")
        found = outputs[output]
        if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != expected.shape:
            raise SelfTestFailed(
                f"{where}: {output} is {getattr(found, 'dtype', type(found).__name__)} "
                f"{list(getattr(found, 'shape', ()))}, expected float32 {list(expected.shape)}; {advice}"
            )
        if not np.isfinite(found).all():
            raise SelfTestFailed(f"{where}: {output} contains NaN or infinity; {advice}")
        unit = found if output.startswith("l2norm") else truncate(found, found.shape[1])
        ratios = np.linalg.norm(unit - expected, axis=1) / np.maximum(apart.min(axis=1), 1e-6)
        worst = int(ratios.argmax())
        if not ratios[worst] <= TOLERANCE[precision]:
            raise SelfTestFailed(
                f"{where}: the error of {output} for {goldens[worst].name} is {ratios[worst]:.2g} of the distance to "
                f"the nearest other golden vector, expected at most {TOLERANCE[precision]}; {advice}"
            )
        largest = max(largest, float(ratios[worst]))
    return largest


def _ids(golden: Golden, tokenizer: TextTokenizer, max_tokens: int) -> list[int]:
    ids = tokenizer.encode([golden.text or ""])[0][:max_tokens]
    if tuple(ids) != golden.input_ids:
        raise SelfTestFailed(
            f"{golden.name}: the tokenizer returns {ids[:8]}…, expected {list(golden.input_ids[:8])}…; the installed "
            "version of tokenizers reads the file differently"
        )
    return ids


def _pixels(golden: Golden, bundle: Bundle) -> np.ndarray:
    assert golden.path is not None  # Bundle has checked that an image golden has a file
    try:
        pixels = preprocess(golden.path, bundle.preprocessing)
    except InputError as error:
        raise SelfTestFailed(f"{golden.name}: {error}; check the files with `jinaclip verify`") from error
    found = hashlib.sha256(pixels.tobytes()).hexdigest()
    if found != golden.pixels_sha256:
        raise SelfTestFailed(
            f"{golden.name}: preprocessing returns other pixels than when the bundle was made; the installed version "
            "of Pillow decodes or resizes differently"
        )
    return pixels
