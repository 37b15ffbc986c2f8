"""MkDocs: the page of the command line, made from `jinaclip VERB --help`."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from importlib.metadata import entry_points

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from jinaclip.cli import main

PAGE = "reference/command-line.md"
INTRODUCTION = """# Command line

`jinaclip VERB` writes data to stdout and messages to stderr. The exit status is 0, 1 after an error (one line on
stderr), 2 after wrong usage, or 130 after Ctrl-C. A verb whose libraries are missing says what to install.
"""


def help_of(*words: str) -> str:
    """What `jinaclip WORDS --help` prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue().strip()


def page() -> str:
    parts = [INTRODUCTION, f"```text\n{help_of()}\n```"]
    verbs = sorted(entry.name for entry in entry_points(group="jinaclip.commands"))
    parts += [f"## {verb}\n\n```text\n{help_of(verb)}\n```" for verb in verbs]
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, PAGE, content=page()))
    return files
