"""Docstrings of the public API: each has one short example, and the examples print what they show."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import jinaclip
from jinaclip import ClipModel
from jinaclip.errors import status_of
from tests.conftest import PHOTOS

PAGE = Path(__file__).parents[2] / "docs/reference/python.md"
LONGEST = 7  # lines of an example
# Runs the example of share_threads, which has to come before the first ClipModel of a process.
CHILD = """
import doctest, sys, jinaclip
names, words = vars(jinaclip).copy(), jinaclip.share_threads.__doc__
test = doctest.DocTestParser().get_doctest(words, names, "share_threads", None, 0)
sys.exit(doctest.DocTestRunner().run(test).failed)
"""


def members(thing: Any) -> Iterator[Any]:
    """A function, or a class with its public methods and properties; all of them for a module."""
    if inspect.ismodule(thing):
        for value in vars(thing).values():
            if getattr(value, "__module__", None) == thing.__name__ and not value.__name__.startswith("_"):
                yield from members(value)
        return
    yield thing
    if inspect.isclass(thing):
        for name, value in vars(thing).items():
            member = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if not name.startswith("_") and (isinstance(member, property) or callable(member)):
                yield member


def on_the_page() -> Iterator[Any]:
    """What docs/reference/python.md shows."""
    for name in re.findall(r"^::: ([\w.]+)$", PAGE.read_text("utf-8"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            yield getattr(importlib.import_module(module), attribute)
        except ImportError:
            yield importlib.import_module(name)


def name_of(thing: Any) -> str:
    return str(getattr(thing, "fget", thing).__qualname__)  # that of a property is its function's


EXPORTED = [getattr(jinaclip, name) for name in jinaclip.__all__ if name != "__version__"]
PUBLIC = {name_of(member): member for thing in [*EXPORTED, *on_the_page()] for member in members(thing)}
PARSER = doctest.DocTestParser()


@pytest.fixture(scope="module")
def directory(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: with bundle/, coffee.jpg and cat.jpg."""
    directory = tmp_path_factory.mktemp("examples")
    (directory / "bundle").symlink_to(small_bundle)
    for name, photo in (("coffee.jpg", PHOTOS[1]), ("cat.jpg", PHOTOS[2])):
        Image.open(photo).convert("RGB").save(directory / name)
    return directory


def test_what_is_public() -> None:
    shown = {name_of(member) for thing in on_the_page() for member in members(thing)}
    assert shown == set(PUBLIC), "docs/reference/python.md shows all that is public"
    assert {"ClipModel.similarity", "ClipModel.dims", "TextEncoder.run_all", "share_threads", "status_of"} <= shown


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_has_one_short_example(name: str) -> None:
    words = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    (section,) = re.findall(r"^Examples:\n((?:(?:    .*)?(?:\n|\Z))+)", words, re.MULTILINE)
    examples = PARSER.get_examples(words)
    assert examples and len(PARSER.get_examples(section)) == len(examples), "an example outside of its section"
    assert len(section.strip().splitlines()) <= LONGEST


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_names_what_a_caller_has_to_know(name: str) -> None:
    thing = PUBLIC[name]
    words = inspect.cleandoc(thing.__doc__ or "")
    if inspect.isfunction(thing):
        for parameter in set(inspect.signature(thing).parameters) - {"self"}:
            assert re.search(rf"\b{parameter}\b", words), f"{parameter} is not described"
    for names in re.findall(r"^Raises:\n((?:    .*(?:\n|\Z))+)", words, re.MULTILINE):
        for error in re.findall(r"^    (\w+(?:, \w+)*):", names, re.MULTILINE):
            for cls in error.split(", "):
                assert hasattr(jinaclip, cls) or cls == "TypeError", f"{cls} is not public"


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_prints_what_it_shows(
    name: str, model: ClipModel, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    if name == "share_threads":
        done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    names = {exported: getattr(jinaclip, exported) for exported in jinaclip.__all__}
    names |= {"model": model, "np": np, "status_of": status_of}
    test = PARSER.get_doctest(PUBLIC[name].__doc__ or "", names, name, None, 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not report, "".join(report)
