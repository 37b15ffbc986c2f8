"""The engine store: the engines and prepared graphs that `jinaclip build` makes, each in a directory `engines/<key>/`.

An engine is valid for one graph, one version of its library and one kind of machine. These facts are recorded in its
sidecar, engine.json, and the engine's key is their hash. Before an engine is opened, they are compared with the graph,
the library and the machine in use. docs/bundle.md describes the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinaclip.bundle.files import facts_hash, file_sha256, read_json
from jinaclip.bundle.manifest import Bundle

ENGINES = "engines"
SIDECAR = "engine.json"
SIDECAR_VERSION = 1


def engine_facts(bundle: Bundle, tower: str, precision: str, backend: str) -> dict[str, Any]:
    """The facts that the sidecars of all backends' engines have."""
    return {
        "format_version": SIDECAR_VERSION,
        "backend": backend,
        "tower": tower,
        "precision": precision,
        "graph": bundle.graph_identity(tower, precision),
    }


def engine_key(facts: Mapping[str, Any]) -> str:
    """Name of an engine's directory: tower, precision, backend, and a hash of all facts."""
    return f"{facts['tower']}-{facts['precision']}-{facts['backend']}-{facts_hash(facts)}"


def engines_of(bundle: Bundle, tower: str, precision: str, backend: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Directory and sidecar of every engine of a tower's graph. The sidecar is {} if it cannot be read."""
    for path, sidecar in all_engines(bundle):
        if path.name.rpartition("-")[0] == f"{tower}-{precision}-{backend}":
            yield path, sidecar


def all_engines(bundle: Bundle) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Directory and sidecar of every complete engine, valid for this machine or not. The cache directory's engines come
    first, then the bundle's.
    """
    for root in dict.fromkeys((bundle.note_directory, bundle.directory)):
        with suppress(OSError):
            for path in sorted((root / ENGINES).iterdir()):
                if path.is_dir() and not path.name.startswith("."):
                    yield path, read_json(path / SIDECAR) or {}


def difference(sidecar: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first of the expected facts that differs in an engine's sidecar, as a message; None if all are equal."""
    for field, value in expected.items():
        if sidecar.get(field) != value:
            return f"its {field} is {sidecar.get(field)!r:.120}, expected {value!r:.120}"
    return None


def damage(directory: Path, sidecar: Mapping[str, Any], main: str, *, hashes: bool = False) -> str | None:
    """A message about the first damaged file of an engine; None if its files are unchanged.

    Args:
        directory: the engine's directory.
        sidecar: its sidecar.
        main: name of the file that the engine must have.
        hashes: also read the files and compare their sha256, in addition to their sizes.
    """
    files = sidecar.get("files")
    if not isinstance(files, dict) or main not in files:
        return f"its {SIDECAR} does not list {main}"
    for name, entry in files.items():
        path = directory / Path(str(name)).name
        listed = entry if isinstance(entry, dict) else {}
        if not path.is_file() or path.stat().st_size != listed.get("bytes"):
            return f"{path.name} is missing or does not have {listed.get('bytes')} bytes"
        if hashes and file_sha256(path) != listed.get("sha256"):
            return f"{path.name} does not have the sha256 that {SIDECAR} lists"
    return None
