"""`jinaclip VERB`: verbs are entry points of the group `jinaclip.commands`, loaded only when called.

A verb is a module with a one-line docstring, EXTRA (what pip installs its libraries, or None),
add_arguments(parser) and run(args) -> exit status; MIXED = True lets its words stand between its options.
stdout is data, stderr is for people; the exit status is 0, 1 for an error told in one line, 2 for wrong usage,
130 after Ctrl-C.

Imports all of jinaclip; nothing of jinaclip imports it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

from jinaclip.errors import JinaClipError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    if os.getpid() == 1:  # of a container: the kernel drops a signal that process 1 has no handler for
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("jinaclip: interrupted", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    if sys.stdout is None:
        return _fail("stdout is closed; redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    words = sys.argv[1:] if argv is None else [*argv]
    verbs = {entry.name: entry for entry in entry_points(group="jinaclip.commands")}
    # Read from every verb's file: not when one is called already.
    listed = [] if words[:1] and words[0] in verbs else sorted(verbs)
    parser = argparse.ArgumentParser(
        prog="jinaclip",
        description="Jina CLIP v2: export, verify, encode.",
        epilog="verbs:\n" + "\n".join(f"  {name:<9} {_summary(verbs[name])}" for name in listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jinaclip {version('jinaclip')}")
    parser.add_argument("verb", metavar="VERB", choices=sorted(verbs), help="see below; VERB --help tells more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    args = parser.parse_args(words)
    logging.basicConfig(format="jinaclip: %(message)s", level=logging.WARNING)
    module = verbs[args.verb].load()
    verb_parser = argparse.ArgumentParser(
        prog=f"jinaclip {args.verb}",
        description=module.__doc__,
        formatter_class=_HelpFormatter,
    )
    module.add_arguments(verb_parser)
    parse = verb_parser.parse_intermixed_args if getattr(module, "MIXED", False) else verb_parser.parse_args
    verb_args = parse(args.arguments)
    verb_args.usage_error = verb_parser.error
    try:
        status: int = module.run(verb_args)
        sys.stdout.flush()
        return status
    except JinaClipError as error:
        return _fail(str(error))
    except ImportError as error:
        if module.EXTRA is None or (error.name or "").startswith("jinaclip"):
            raise
        return _fail(f"{args.verb} needs {error.name}; run: pip install 'jinaclip[{module.EXTRA}]'")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")


def _fail(message: str) -> int:
    print(f"jinaclip: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _summary(entry: EntryPoint) -> str:
    """First line of a verb's docstring, read without importing the verb."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)
