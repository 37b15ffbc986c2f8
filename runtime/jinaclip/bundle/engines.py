"""The engine store: what `jinaclip build` made of a bundle's graphs, each in `engines/<key>/` beside the bundle.

An engine is tied to facts: the graph it was made of, the library's version, the machine. They stand in its sidecar,
engine.json, and their hash is its key; before anything of it is opened they are compared with what is here and now.
docs/bundle.md has the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinaclip.bundle.manifest import Bundle

ENGINES = "engines"
SIDECAR = "engine.json"
SIDECAR_VERSION = 1


def engine_key(facts: Mapping[str, Any]) -> str:
    """Name of an engine's directory: readable, and different whenever a fact is."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{facts['tower']}-{facts['precision']}-{facts['backend']}-{digest}"


def engines_of(bundle: Bundle, tower: str, precision: str, backend: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Directory and sidecar of every engine of a tower's graph; the sidecar is {} where it cannot be read."""
    prefix = f"{tower}-{precision}-{backend}-"
    for path, sidecar in all_engines(bundle):
        rest = path.name.removeprefix(prefix)
        if rest != path.name and "-" not in rest:  # tensorrt is not tensorrt-rtx
            yield path, sidecar


def all_engines(bundle: Bundle) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Directory and sidecar of every engine that is whole, whether it fits here or not: in a cache, then the bundle."""
    for root in dict.fromkeys((*bundle.note_directories(), bundle.directory)):
        with suppress(OSError):
            for path in sorted((root / ENGINES).iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    yield path, _read_sidecar(path)


def difference(sidecar: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first of the expected facts that an engine was not made for, in words; None if it fits."""
    for field, value in expected.items():
        if sidecar.get(field) != value:
            return f"its {field} is {sidecar.get(field)!r:.120}, here it is {value!r:.120}"
    return None


def damage(directory: Path, sidecar: Mapping[str, Any], main: str, *, hashes: bool = False) -> str | None:
    """What is wrong with an engine's files, in words; None if they are as they were written.

    Args:
        main: the file that must be among them.
        hashes: read them, and not only their sizes.
    """
    files = sidecar.get("files")
    if not isinstance(files, dict) or main not in files:
        return f"its {SIDECAR} lists no {main}"
    for name, entry in files.items():
        path = directory / Path(str(name)).name
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not path.is_file() or path.stat().st_size != size:
            return f"{path.name} is missing or not of the {size} bytes that were written"
        if hashes:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{path.name} has another sha256 than when it was written"
    return None


def _read_sidecar(directory: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        sidecar = json.loads((directory / SIDECAR).read_text("utf-8"))
        if isinstance(sidecar, dict):
            return sidecar
    return {}
