"""Reader of bundles, the directories that `jinaclip export` writes. docs/bundle.md describes the format.

Opening a bundle reads bundle.json and checks that every file exists with the listed size. `verify_hashes` also
compares the sha256 of every file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jinaclip.bundle.files import facts_hash, file_sha256, read_json, write_atomically
from jinaclip.errors import BundleError
from jinaclip.preprocessing.image import ImagePreprocessing, normalise
from jinaclip.preprocessing.text import TextTokenizer

FORMAT = "jinaclip-bundle"
FORMAT_VERSION = 1
OLDEST_VERSION = 1
MANIFEST = "bundle.json"
TOWERS = ("text", "image")
PRECISION_CLASS = {"fp32": "float", "fp16": "float", "int8": "int8"}
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Golden:
    """A golden: an input with the expected result of preprocessing and the expected fp32 vector.

    Attributes:
        name: name for messages.
        text: the text, or None for an image.
        path: the image file, or None for a text.
        input_ids: expected token ids of the text, special tokens included.
        pixels_sha256: expected sha256 of the image's pixels, uint8 [size, size, 3].
        embedding: the golden vector, float32 [D] with norm 1.
    """

    name: str
    embedding: np.ndarray
    text: str | None = None
    path: Path | None = None
    input_ids: tuple[int, ...] = ()
    pixels_sha256: str = ""


@dataclass(frozen=True)
class TowerManifest:
    """One tower's graphs, and the sizes from which its memory is predicted."""

    name: str
    input_name: str
    input_dtype: str
    graphs: Mapping[str, Path]  # precision -> .onnx
    layers: int
    width: int
    heads: int
    hidden_size: int


class Bundle:
    """An opened bundle.

    Args:
        directory: the bundle's directory.
        cache_dir: directory for self-test results, certificates and engines when the bundle is read-only. None writes
            them to the bundle.

    Attributes:
        note_directory: directory for files made for this bundle: its own folder in `cache_dir`, or the bundle without
            one.

    Raises:
        BundleError: the directory is not a bundle, is damaged, is newer than this reader, or names a file outside it.
    """

    def __init__(self, directory: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None):
        self.directory = Path(directory)
        try:
            self.manifest = _read_manifest(self.directory)
            self._read()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise BundleError(
                f"{self.directory / MANIFEST} does not follow the bundle format ({type(error).__name__}: "
                f"{error!s:.200}); export the bundle again"
            ) from error
        except (OSError, RuntimeError) as error:  # no permission, a name that is too long, circular links
            raise BundleError(f"{self.directory} cannot be read ({error!s:.300}); copy the bundle again") from error
        key = facts_hash(self.manifest["files"])
        self.note_directory = self.directory if cache_dir is None else Path(cache_dir) / key

    def _read(self) -> None:
        manifest = self.manifest
        self.files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        for name, (size, _) in self.files.items():
            path = self._inside(name)
            if not path.is_file():
                raise BundleError(f"{self.directory} has no {name}, which {MANIFEST} lists; copy the bundle again")
            if (found := path.stat().st_size) != size:
                raise BundleError(
                    f"{path} has {found} bytes, expected {size}; it is truncated or changed: copy the bundle again"
                )
        self.model = dict(manifest["model"])
        _text(self.model["weights_sha256"], "weights_sha256")
        _text(manifest["tokenizer_sha256"], "tokenizer_sha256")
        self.dims = tuple(sorted(_whole(dim, "dims") for dim in manifest["dims"]))
        self.logit_scale = float(manifest["logit_scale"])
        _require(math.isfinite(self.logit_scale), f"logit_scale is {self.logit_scale}, expected a finite number")
        self.towers = {name: self._tower(name, tower) for name, tower in manifest["towers"].items()}
        known = bool(self.towers) and set(self.towers) <= set(TOWERS)
        _require(known, f"towers are {list(self.towers)!r:.80}, expected some of {', '.join(TOWERS)}")
        self.max_tokens, self.tasks = 0, dict[str, str]()
        self.default_task: str | None = None
        if "text" in self.towers:
            self._read_text(manifest["text"])
        self.preprocessing = ImagePreprocessing.from_manifest(manifest["image"])
        self.goldens = {name: tuple(self._goldens(name)) for name in self.towers}

    def _read_text(self, text: Mapping[str, Any]) -> None:
        self.max_tokens = _whole(text["max_tokens"], "max_tokens", 3)  # <s>, one token, </s>
        self.tasks = {name: _text(instruction, name) for name, instruction in text["tasks"].items()}
        self.default_task = text["default_task"]
        known = self.default_task is None or self.default_task in self.tasks
        _require(known, f"default_task is {self.default_task!r:.80}, expected one of its tasks")
        name = text["tokenizer"]
        self.tokenizer = self._listed(name)
        same = self.files[name][1] == self.manifest["tokenizer_sha256"]
        _require(same, f"tokenizer_sha256 differs from the sha256 listed for {name!r:.80}")
        self.vocab_size = _whole(text["vocab_size"], "vocab_size")
        self.special_ids = {token: _whole(text["special_ids"][token], token, 0) for token in ("bos", "pad", "eos")}

    def tower(self, name: str) -> TowerManifest:
        """The manifest of a tower.

        Raises:
            BundleError: the bundle was exported without the tower.
        """
        if name not in self.towers:
            found = f"{self.directory} has no {name} tower (it has: {', '.join(self.towers)})"
            raise BundleError(f"{found}; export it with --towers text,image")
        return self.towers[name]

    def graph(self, tower: str, precision: str) -> Path:
        """Path of a tower's graph in a precision.

        Raises:
            BundleError: the bundle does not have this graph; the message lists its precisions.
        """
        graphs = self.tower(tower).graphs
        if precision not in graphs:
            raise BundleError(
                f"{self.directory} has no {precision} {tower} graph (it has: {', '.join(graphs)}); use one of these"
            )
        return graphs[precision]

    def open_tokenizer(self) -> TextTokenizer:
        """The text tower's tokenizer.

        Raises:
            BundleError: the bundle has no text tower, or the tokenizer does not match it.
        """
        self.tower("text")
        return TextTokenizer(self.tokenizer, vocab_size=self.vocab_size, special_ids=self.special_ids)

    def image_input(self, pixels: np.ndarray) -> np.ndarray:
        """Convert pixels to the input of the image graph.

        Args:
            pixels: uint8 [B, size, size, 3].

        Returns:
            The pixels unchanged, or the publisher's normalised float32 [B, 3, size, size] for graphs with that input.
        """
        return normalise(pixels, self.preprocessing) if self.tower("image").input_dtype == "float32" else pixels

    def provenance(
        self, precision: Mapping[str, str], *, resize_mode: str | None = None, exif_transpose: bool = False
    ) -> str:
        """Identifies everything that determines a vector: the weights, the preprocessing and the precision class.

        Vectors can share an index only if their ids are equal. fp32 and fp16 are one precision class, int8 is another.
        The task and the dim are not part of the id. A bundle with one tower has the id of the whole model.

        Args:
            precision: precision of each tower.
            resize_mode: the mode of `encode_image`. None means the bundle's mode.
            exif_transpose: the argument of `encode_image`.
        """
        classes = sorted({PRECISION_CLASS[p] for p in precision.values()})
        if len(classes) > 1:
            classes = [f"{tower}={PRECISION_CLASS[p]}" for tower, p in sorted(precision.items())]
        facts = {
            "weights": self.model["weights_sha256"],
            "adaptation": self.model.get("adaptation"),
            "tokenizer": self.manifest["tokenizer_sha256"],
            "image": self.preprocessing.to_manifest() | {"resize_mode": self.preprocessing.mode_of(resize_mode)},
            "exif_transpose": exif_transpose,
            "class": classes,
        }
        return f"jc1-{facts_hash(facts)}"

    def verify_hashes(self, progress: Callable[[str], None] = lambda name: None) -> None:
        """Read every file and compare its sha256 with the manifest.

        Args:
            progress: called with the name of each file before it is read.

        Raises:
            BundleError: a file differs; the message names the first.
        """
        for name, (_, expected) in self.files.items():
            progress(name)
            if (found := file_sha256(self._inside(name))) != expected:
                problem = f"{self.directory / name} has sha256 {found[:16]}…, expected {expected[:16]}…"
                raise BundleError(f"{problem}; the file is damaged or changed: copy or export the bundle again")

    def graph_fingerprint(self, tower: str, precision: str) -> str:
        """Hash over the listed hashes of a graph's files and their modification times. It changes if a file does."""
        names = self._graph_files(tower, precision)
        facts = [(name, *self.files[name], self._inside(name).stat().st_mtime_ns) for name in names]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def graph_identity(self, tower: str, precision: str) -> str:
        """Hash over the listed hashes of a graph's files, 16 hex digits. It is the same for every copy of the graph."""
        facts = [(name, self.files[name][1]) for name in self._graph_files(tower, precision)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def read_note(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of `cache_dir` or, if it is not there, of the bundle. None if neither has it."""
        return read_json(self.note_directory / name) or read_json(self.directory / name)

    def write_note(self, name: str, value: Mapping[str, Any]) -> bool:
        """Write a JSON file to `cache_dir`, or to the bundle without one, atomically. False if that is not possible."""
        path = self.note_directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(value, indent=1, allow_nan=False).encode())
        except OSError:
            return False
        return True

    def can_write_notes(self) -> bool:
        """Whether `write_note` would succeed. Lets a long measurement fail early."""
        try:
            self.note_directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.note_directory).close()
        except OSError:
            return False
        return True

    def _graph_files(self, tower: str, precision: str) -> list[str]:
        prefix = self.graph(tower, precision).relative_to(self.directory).as_posix()
        return sorted(name for name in self.files if name.startswith(prefix))

    def _inside(self, name: str) -> Path:
        """Path of a file named in the manifest. Paths outside the bundle are refused."""
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise BundleError(f"{MANIFEST} names the file {name!r:.200}, which leaves the bundle; do not use it")
        path = self.directory / pure
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise BundleError(f"{path} is a link that leaves the bundle; do not use it")
        return path

    def _listed(self, name: str) -> Path:
        _require(name in self.files, f"it uses {name!r:.200} but does not list it in files")
        return self._inside(name)

    def _tower(self, name: str, tower: Mapping[str, Any]) -> TowerManifest:
        graphs = {str(precision): self._listed(path) for precision, path in tower["graphs"].items()}
        unknown = sorted(set(graphs) - set(PRECISION_CLASS))
        _require(not unknown, f"precision is {unknown!r:.80}, expected {list(PRECISION_CLASS)}")
        sizes = {key: _whole(tower[key], key) for key in ("layers", "width", "heads", "hidden_size")}
        input_name, dtype = _text(tower["input"]["name"], "name"), _text(tower["input"]["dtype"], "dtype")
        return TowerManifest(name, input_name, dtype, graphs, **sizes)

    def _goldens(self, tower: str) -> Iterator[Golden]:
        goldens = self.manifest["goldens"][tower]
        enough = isinstance(goldens, list) and len(goldens) >= 2  # the self-test needs distances between goldens
        _require(enough, f"expected a list of at least two {tower} goldens")
        for index, golden in enumerate(goldens):
            name, size = f"{tower} golden {index}", max(self.dims)
            vector = np.frombuffer(base64.b64decode(golden["embedding"], validate=True), "<f4")
            good = vector.shape == (size,) and bool(np.isfinite(vector).all())
            _require(good, f"{name} is not a vector of {size} finite numbers")
            if tower == "text":
                text = _text(golden["text"], "text")
                yield Golden(name, vector, text=text, input_ids=tuple(golden["input_ids"]))
            else:
                sha256 = _text(golden["pixels_sha256"], "pixels_sha256")
                yield Golden(name, vector, path=self._listed(golden["path"]), pixels_sha256=sha256)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory; expected a bundle made by `jinaclip export`")
    if not path.is_file():
        hint = "; this looks like a checkpoint: run `jinaclip export` on it first"
        checkpoint = (directory / "config.json").is_file()
        raise BundleError(f"{directory} has no {MANIFEST}, so it is not a bundle{hint if checkpoint else ''}")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}")
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON ({error}); export the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is not a {FORMAT} manifest; expected a bundle made by `jinaclip export`")
    version = manifest.get("format_version")
    if type(version) is not int or not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version!r:.80}, this jinaclip reads {OLDEST_VERSION} to {FORMAT_VERSION}; "
            "upgrade jinaclip, or export the bundle again with this version"
        )
    return manifest


def _require(met: bool, problem: str) -> None:
    if not met:
        raise BundleError(f"{MANIFEST}: {problem}; export the bundle again")


def _whole(value: Any, name: str, least: int = 1) -> int:
    met = type(value) is int and least <= value < 1 << 31
    _require(met, f"{name} is {value!r:.80}, expected a whole number from {least}")
    return int(value)


def _text(value: Any, name: str) -> str:
    _require(isinstance(value, str), f"{name} is {value!r:.80}, expected a string")
    value.encode("utf-8")  # raises ValueError for a lone surrogate
    return str(value)
