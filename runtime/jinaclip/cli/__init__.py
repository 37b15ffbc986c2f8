"""The command `jinaclip VERB`. Verbs are entry points of the group `jinaclip.commands`, imported when used or listed.

A verb is a module with a docstring whose first line is its summary, EXTRA (the pip extra that installs its libraries,
or None), add_arguments(parser) and run(args) -> exit status. MIXED = True allows positional arguments between options.

Data is written to stdout, messages to stderr. The exit status is 0 on success, 1 after an error (reported on one
line), 2 for wrong usage and 130 after Ctrl-C.

Imports all of jinaclip; no other part of jinaclip imports this package.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import NoReturn

from jinaclip.errors import JinaClipError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    if os.getpid() == 1:  # in a container: the kernel ignores signals to process 1 that have no handler
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
        sys.stdout.reconfigure(errors="backslashreplace")  # file names are not always UTF-8
    words = sys.argv[1:] if argv is None else [*argv]
    verbs = {entry.name: entry for entry in entry_points(group="jinaclip.commands")}
    verb = words[0] if words and words[0] in verbs else _refuse_verb(words, verbs)
    logging.basicConfig(format="jinaclip: %(message)s", level=logging.WARNING)
    module = verbs[verb].load()
    parser = argparse.ArgumentParser(
        prog=f"jinaclip {verb}", description=module.__doc__, formatter_class=_HelpFormatter
    )
    module.add_arguments(parser)
    parse = parser.parse_intermixed_args if getattr(module, "MIXED", False) else parser.parse_args
    args = parse(words[1:])
    args.usage_error = parser.error
    try:
        status: int = module.run(args)
        sys.stdout.flush()
        return status
    except JinaClipError as error:
        return _fail(str(error))
    except ImportError as error:
        if module.EXTRA is None or (error.name or "").startswith("jinaclip"):
            raise
        return _fail(f"{verb} needs {error.name}; run: pip install 'jinaclip[{module.EXTRA}]'")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids a second error at exit
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")


def _refuse_verb(words: Sequence[str], verbs: Mapping[str, EntryPoint]) -> NoReturn:
    """Answer --help and --version, or report that the first word is not a verb."""
    summaries = {name: verbs[name].load().__doc__.partition("\n")[0].rstrip(".") for name in sorted(verbs)}
    parser = argparse.ArgumentParser(
        prog="jinaclip",
        description="Jina CLIP v2: export, verify and serve bundles; encode texts and images.",
        epilog="verbs:\n" + "\n".join(f"  {name:<9} {summary}" for name, summary in summaries.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jinaclip {version('jinaclip')}")
    parser.add_argument("verb", metavar="VERB", choices=summaries, help="see below; VERB --help describes a verb")
    parser.parse_args(words)
    parser.error("the verb must be the first word")


def _fail(message: str) -> int:
    print(f"jinaclip: {' '.join(message.split())}", file=sys.stderr)
    return 1


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)
