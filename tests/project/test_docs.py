"""Documentation that can rot: commands, options, links, names and fields in the pages are those of the code."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinaclip import ClipModel
from tests.support.running import running

ROOT = Path(__file__).parents[2]
NAMES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/bundle.md",
    "docs/gpu.md",
    "docs/parity.md",
    "docs/index.md",
    "docs/how-it-works.md",
    "docs/server.md",
    *(f"docs/guides/{name}.md" for name in
      ("photo-search", "cpu-server", "gpu-server", "edge", "operations", "troubleshooting")),
)  # fmt: skip
MADE = ("reference/command-line.md", "clients.md")  # by docs/hooks.py
DECISIONS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
PAGES = [*(ROOT / name for name in (*NAMES, "docs/decisions/index.md", "examples/README.md")), *DECISIONS]
VERBS = {entry.name: entry for entry in entry_points(group="jinaclip.commands")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def options_of(verb: str) -> set[str]:
    """Every option a verb takes, those of its own sub-verbs included."""
    parser = argparse.ArgumentParser()
    VERBS[verb].load().add_arguments(parser)
    pending, found = [parser], set()
    while pending:
        for action in pending.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                pending += action.choices.values()
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for verb, rest in re.findall(r"(?:^\s*|`)jinaclip ([a-z]+)([^`\n]*)", text, re.MULTILINE):
        assert verb in VERBS, verb
        for option in re.findall(r"(?<![\w-])--[a-z-]+", rest.split("  ")[0].split("#")[0]):
            assert option in options_of(verb), f"{verb} {option}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert "://" in target or target.endswith(MADE) or (page.parent / target).exists(), target


def test_extras_in_the_pages_exist() -> None:
    for page in PAGES:
        for extras in re.findall(r"jinaclip\[([a-z,-]+)\]", page.read_text("utf-8")):
            assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"]), extras


def test_every_verb_names_an_extra_that_exists() -> None:
    for name, entry in VERBS.items():
        module = entry.load()
        assert module.EXTRA is None or module.EXTRA in PROJECT["project"]["optional-dependencies"], name
        assert (module.__doc__ or "").strip(), name


def test_first_example_of_the_readme_runs(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(small_bundle)
    for name in ("coffee.jpg", "cat.jpg"):
        Image.new("RGB", (60, 40), "brown").save(tmp_path / name)
    # The small random model has fewer dims than the published one.
    names: dict[str, Any] = {}
    exec(code.group(1).replace("truncate_dim=256", "truncate_dim=64"), names)
    assert names["texts"].shape == names["images"].shape == (2, 64)


@pytest.mark.parametrize("name", ["docs/index.md", "docs/guides/photo-search.md", "docs/guides/edge.md"])
def test_programs_of_the_pages_run(
    name: str, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page, one after the other, as a reader types them."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").symlink_to(small_bundle)
    (tmp_path / "photos").mkdir()
    for directory in (tmp_path, tmp_path / "photos"):
        for file, color in (("coffee.jpg", "brown"), ("cat.jpg", "gray")):
            Image.new("RGB", (60, 40), color).save(directory / file)
    names: dict[str, Any] = {}
    for code in programs_of(name):
        exec(code, names)
    assert capsys.readouterr().out.strip()
    for picture in tmp_path.glob("*.webp"):  # in the page is what its program draws; decoders differ by little
        drawn, shown = (
            np.asarray(Image.open(path).convert("RGB"), np.float32)
            for path in (picture, ROOT / "docs/images" / picture.name)
        )
        assert drawn.shape == shown.shape and np.abs(drawn - shown).mean() < 8


def programs_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)


def test_the_client_of_the_server_guide_runs(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = programs_of("docs/guides/cpu-server.md")
    with running(small_bundle, "--model-name", "jina-clip-v2") as server:
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out == "2 64\n"


def literal_texts(path: Path) -> set[str]:
    """Every string of a source file, with … for the values that an f-string or % formats into it. A variable is every
    string that the file assigns to it.
    """
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    named: dict[str, list[str]] = {}

    def texts_of(node: ast.expr) -> list[str]:
        if isinstance(node, ast.JoinedStr):
            return ["".join(parts) for parts in product(*map(texts_of, node.values))]
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
            return named.get(node.value.id, ["…"])
        return [re.sub(r"%[sdr]", "…", str(node.value)) if isinstance(node, ast.Constant) else "…"]

    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    named.setdefault(target.id, []).extend(texts_of(node.value))
    return {text for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant) for text in texts_of(node)}


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs/guides/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^#### `(.+)`$", page, re.MULTILINE)
    assert len(messages) >= 15 and len(messages) == page.count("\n#### ")
    texts: set[str] = set()
    for top in ("runtime", "engines", "export"):
        texts = texts.union(*map(literal_texts, (ROOT / top).rglob("*.py")))
    for message in messages:
        assert len(message.replace("…", "")) >= 20, message
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in texts), message


def test_options_and_metrics_of_the_guides_exist() -> None:
    from jinaclip.server import metrics

    every = set().union(*(options_of(verb) for verb in VERBS)) | {"--gpus"}  # a container engine's
    names = literal_texts(Path(inspect.getfile(metrics)))
    for page in (ROOT / "docs/guides").glob("*.md"):
        text = page.read_text("utf-8")
        assert set(re.findall(r"`(--[a-z-]+)", text)) <= every, page
        for name in re.findall(r"`(jinaclip_[a-z_]+)`", text):
            assert name.removesuffix("_total") in names, name
    table = (ROOT / "docs/guides/operations.md").read_text("utf-8")
    for name in names:
        if re.fullmatch(r"jinaclip_[a-z_]+", name):
            assert re.search(rf"`{name}(_total)?`", table), f"docs/guides/operations.md does not tell of {name}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    python = (tmp_path / "reference/python/index.html").read_text("utf-8")
    assert "encode_text" in python and "TextEncoder" in python and "SelfTestFailed" in python
    assert "usage: jinaclip encode" in (tmp_path / "reference/command-line/index.html").read_text("utf-8")
    clients = (tmp_path / "guides/clients/index.html").read_text("utf-8")
    programs = [path.name for path in (ROOT / "examples").rglob("*.py")]
    assert sorted(re.findall(r'id="program-\d+">([\w.]+)', clients)) == sorted(programs)


def test_the_command_line_page_has_every_verb() -> None:
    hooks = runpy.run_path(str(ROOT / "docs/hooks.py"))
    page = hooks["page"]()
    for verb in VERBS:
        assert f"## {verb}\n" in page and f"usage: jinaclip {verb}" in page


def test_signatures_are_the_contract() -> None:
    """Names and defaults that users' code depends on."""
    for function, expected in (
        (ClipModel.__init__, "self bundle backend=auto device=auto precision=auto threads=None "
                             "towers=('text', 'image') cache_dir=None self_test=auto"),
        (ClipModel.encode_text, "self texts task=None truncate_dim=None normalize_embeddings=True batch_size=None "
                                "max_length=8192 show_progress_bar=False"),
        (ClipModel.encode_image, "self images truncate_dim=None normalize_embeddings=True batch_size=None "
                                 "show_progress_bar=False allow_urls=False resize_mode=None exif_transpose=False"),
    ):  # fmt: skip
        found = [
            name if p.default is inspect.Parameter.empty else f"{name}={p.default}"
            for name, p in inspect.signature(function).parameters.items()
        ]
        assert " ".join(found) == expected


def test_format_page_names_every_field(small_bundle: Path) -> None:
    page = (ROOT / "docs/bundle.md").read_text("utf-8")
    manifest = json.loads((small_bundle / "bundle.json").read_text("utf-8"))

    def names(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {n for v in value.values() for n in names(v)}
        return {n for v in value for n in names(v)} if isinstance(value, list) else set()

    values = {"retrieval.query", "fp32", *manifest["files"]}
    for name in names(manifest) - values:
        assert re.search(rf"\b{re.escape(name)}\b", page), f"docs/bundle.md does not tell of {name}"


def test_bundle_version_of_the_page_is_the_readers() -> None:
    from jinaclip.bundle.manifest import FORMAT_VERSION

    assert f"# The bundle format, version {FORMAT_VERSION}" in (ROOT / "docs/bundle.md").read_text("utf-8")


def test_errors_are_drawn_with_their_status() -> None:
    errors = importlib.import_module("jinaclip.errors")
    for line in (errors.__doc__ or "").splitlines():
        match = re.search(r"([A-Z]\w+)(?: \(\w+\))?\s+(\d{3})\s+(JINACLIP_\w+)", line)
        if match:
            assert errors.status_of(getattr(errors, match[1])("x")) == (int(match[2]), match[3]), line


def test_bench_tables_of_the_pages_are_the_ones_in_the_results() -> None:
    from jinaclip_bench.reporting.report import read_records, render, render_bounds

    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    for path in (ROOT / "bench/results").glob("*.jsonl"):
        assert render(read_records(path)) in page, path.name
    records = read_records(ROOT / "bench/results/cpu.jsonl")
    assert render_bounds(records) in (ROOT / "README.md").read_text("utf-8")


def test_tables_of_the_certificates_are_the_ones_in_the_results() -> None:
    from tests.support import certificates

    results = certificates.read()
    assert results.keys() == certificates.CHECKPOINTS.keys()
    assert certificates.PAGE.read_text("utf-8") == certificates.page(results), "run `make certificates`"


def test_page_of_the_trained_weights_is_that_of_the_results() -> None:
    from tests.trained import table

    results = json.loads(table.RESULTS.read_text("utf-8"))
    assert list(results) == list(table.MODELS)
    assert table.PAGE.read_text("utf-8") == table.page(results), "run `make trained`"


def test_every_decision_has_its_sections_and_its_row_in_the_index() -> None:
    index = (ROOT / "docs/decisions/index.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d{3}) \| \[(.+)\]\((.+)\) \|", index, re.MULTILINE)
    assert [number for number, _, _ in rows] == [f"{n:03}" for n in range(1, len(DECISIONS) + 1)]
    for page, (number, title, target) in zip(DECISIONS, rows, strict=True):
        text = page.read_text("utf-8")
        assert target == page.name and page.name.startswith(f"{number}-")
        assert text.startswith(f"# {number}: {title}\n"), page.name
        sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert sections == ["Context", "Decision", "Evidence", "Consequences"], page.name


def test_sources_name_decisions_that_exist() -> None:
    numbers = {page.name[:3] for page in DECISIONS}
    for top in ("runtime", "engines", "export", "bench", "tests"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".cu", ".h", ".cpp"):
                for number in re.findall(r"docs/decisions/(\d{3})", path.read_text("utf-8")):
                    assert number in numbers, f"{path} {number}"


def test_files_of_the_tests_that_are_named_exist() -> None:
    sources = [
        path for top in ("runtime", "engines", "export", "bench", "tests") for path in (ROOT / top).rglob("*.py")
    ]
    for path in (*PAGES, *sources, ROOT / "Makefile", ROOT / ".ci/run"):
        for name in re.findall(r"\btests/[\w/-]+\.(?:py|sh)\b", path.read_text("utf-8")):
            assert (ROOT / name).is_file(), f"{path} names {name}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
