"""MkDocs: the pages that are made from other files of the repository.

reference/command-line.md is what `jinaclip VERB --help` prints. guides/clients.md is examples/README.md with the
programs that it links to.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout, suppress
from importlib.metadata import entry_points
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from jinaclip.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
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
    """The page of the command line."""
    parts = [INTRODUCTION, f"```text\n{help_of()}\n```"]
    verbs = sorted(entry.name for entry in entry_points(group="jinaclip.commands"))
    parts += [f"## {verb}\n\n```text\n{help_of(verb)}\n```" for verb in verbs]
    return "\n\n".join(parts) + "\n"


def clients_page() -> str:
    """examples/README.md. Its links to programs lead to the programs' text, which follows."""
    text = (EXAMPLES / "README.md").read_text("utf-8").replace("# Examples", "# Clients", 1)
    text = text.replace("](photo-search.ipynb)", "](photo-search.md)")
    programs = list(dict.fromkeys(re.findall(r"\]\(([\w/]+\.py)\)", text)))
    for number, name in enumerate(programs):
        text = text.replace(f"]({name})", f"](#program-{number})")
    parts = [text.rstrip(), "## The programs"]
    for number, name in enumerate(programs):
        content = (EXAMPLES / name).read_text("utf-8").rstrip()
        parts.append(f"### {Path(name).name} {{ #program-{number} }}\n\n```python\n{content}\n```")
    return "\n\n".join(parts) + "\n"


PAGES = {"reference/command-line.md": page, "guides/clients.md": clients_page}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
