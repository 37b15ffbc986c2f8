"""The Containerfile fits the project: its files, extras, port and options. `make container-test` runs its steps."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jinaclip.cli.serve import add_arguments
from tests.project.containerfile import BASE, ROOT, Image, context_rules, copy, in_context, parse

INSTRUCTIONS = parse((ROOT / "Containerfile").read_text("utf-8"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def all_of(keyword: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == keyword]


def requirements(extra: str) -> set[str]:
    """Names of what an extra installs, those of the extras it names included."""
    found: set[str] = set()
    for requirement in PYPROJECT["project"]["optional-dependencies"][extra]:
        own = re.match(r"jinaclip\[([\w,-]+)\]", requirement)
        names = set().union(*map(requirements, own[1].split(","))) if own else {re.split(r"[^\w-]", requirement)[0]}
        found |= names
    return found


def test_instructions_are_read() -> None:
    text = '# a comment\nFROM a AS b\n\nRUN one \\\n# within\n && two\\\n  three\nENTRYPOINT ["x"]\n'
    assert parse(text) == [("FROM", "a AS b"), ("RUN", "one  && two  three"), ("ENTRYPOINT", '["x"]')]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM a\nVOLUME /x\n", "line 2 ends an instruction 'VOLUME'"),
        ("run x\n", "'run'"),
        ("RUN x \\\n", "no end"),
        ("RUN --mount=type=cache x\n", "an option"),
        ("ENV PATH=/x:$PATH\n", "a variable"),
        ("RUN <<EOF\n", "a here-document"),
    ],
)
def test_what_is_not_understood_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_the_last_rule_counts() -> None:
    rules = ["*", "!kept", "!one/two", "**/*.onnx", "**/cache"]
    for path, expected in (
        ("kept", True), ("kept/a/b.py", True), ("kept2", False), ("other/kept", False), ("one", False),
        ("one/two/three.py", True), ("one/three.py", False), ("kept/a/b.onnx", False), ("kept/cache/c", False),
    ):  # fmt: skip
        assert in_context(path, rules) == expected, path


def test_context_is_what_the_wheel_is_made_of(tmp_path: Path) -> None:
    """Every COPY of the build stage works here, and together they hold all that a wheel is built from."""
    for rest in all_of("COPY"):
        if not rest.startswith("--from="):
            copy(shlex.split(rest), Image(tmp_path, workdir="/source"), {})
    project = PYPROJECT["project"]
    files = {"pyproject.toml", project["readme"], *project["license-files"]}
    for package in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()}
        files |= {name for name in found if "__pycache__" not in name}
    copied = {path.relative_to(tmp_path / "source").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert copied == files
    rules = context_rules()
    for name in (".git/config", ".venv/bin/python", "bundle/bundle.json", "runtime/jinaclip/text-fp32.onnx.data"):
        assert not in_context(name, rules), name
    with pytest.raises(ValueError, match="leaves it out"):
        copy(["tests", "tests"], Image(tmp_path), {})


def test_what_is_installed() -> None:
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", " ".join(all_of("RUN")))
    names = set().union(*map(requirements, extras.split(",")))
    assert {"onnxruntime", "uvicorn"} <= names and not names & {"torch", "onnx", "huggingface_hub"}
    assert not re.search(r"torch|https?:|build-essential|gcc|--trusted-host", " ".join(all_of("RUN")))


def test_stages_are_debian_or_earlier_stages() -> None:
    known: set[str] = set()
    for words in map(str.split, all_of("FROM")):
        assert BASE.fullmatch(words[0]) or words[0] in known, words
        known |= set(words[2:])
    for rest in all_of("COPY"):
        assert not rest.startswith("--from=") or rest.split()[0].removeprefix("--from=") in known, rest


def test_it_serves_as_the_command_line_says() -> None:
    """Its settings are options of `jinaclip serve`; the host asks for a key; the port is the default one."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {f"JINACLIP_SERVE_{action.dest.upper()}" for action in parser._actions if action.option_strings}
    settings = dict(word.split("=", 1) for rest in all_of("ENV") for word in shlex.split(rest))
    assert {name for name in settings if name.startswith("JINACLIP_")} <= options
    assert settings["JINACLIP_SERVE_HOST"] == "0.0.0.0" and "JINACLIP_SERVE_API_KEY" not in settings
    ((entrypoint,),), (words,) = map(json.loads, all_of("ENTRYPOINT")), map(json.loads, all_of("CMD"))
    assert entrypoint in PYPROJECT["project"]["scripts"]  # SageMaker puts `serve` in the place of CMD
    assert words[0] in PYPROJECT["project"]["entry-points"]["jinaclip.commands"]
    assert parser.parse_args(words[1:]).bundle == "/bundle" and all_of("EXPOSE") == ["8000"]


def test_it_does_not_run_as_root() -> None:
    (user,) = all_of("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user), "a number, so that runAsNonRoot can see that it is not root"
    keywords = [keyword for keyword, _ in INSTRUCTIONS]
    assert "RUN" not in keywords[keywords.index("USER") :]
    labels = dict(word.split("=", 1) for rest in all_of("LABEL") for word in shlex.split(rest))
    assert labels["org.opencontainers.image.licenses"] == PYPROJECT["project"]["license"]
    assert "Weights are not included" in labels["org.opencontainers.image.description"]


def test_no_root_no_run() -> None:
    """make container-test says what it needs, before it touches anything."""
    command = [sys.executable, "-m", "tests.project.containerfile"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert done.returncode == 1 and "needs root" in done.stderr
