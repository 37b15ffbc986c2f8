"""Measure the CUDA backend on the machine it is run on, in one of two passes of a few minutes each.

Every part is a process of its own with a time limit, and writes its results at once: what fails or hangs costs itself
alone. In --output lie at the end results.jsonl, log.txt and files.tar.gz; the last lines printed are a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.gpu.proof.context import RESULTS, read_results, write_result
from tests.gpu.proof.kit import unpack
from tests.gpu.proof.plan import BUDGET, PASSES, Part
from tests.gpu.proof.table import table
from tests.support.from_checkout import ROOT, SOURCES, write_metadata

LOG, ARCHIVE = "log.txt", "files.tar.gz"
MOST_FILES = 48 << 20  # bytes that go into the archive, small files first
RESERVE = 6.0  # seconds for the archive and the table
NEEDED = 20 << 30  # bytes of work space for the full size


def main(words: list[str] | None = None) -> int:
    args = _arguments(words)
    chosen = [part for part in PASSES[args.which] if args.parts is None or part.name in args.parts]
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG, ARCHIVE):
        (output / name).unlink(missing_ok=True)
    work = args.work or _work_folder()
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as metadata, (output / LOG).open("w", encoding="utf-8") as log:
        run = _Run(args, work, output, Path(metadata), log)
        with suppress(KeyboardInterrupt):
            run.parts(chosen)
        run.close()
    _archive(output)
    results = read_results(output)
    print(table(results), flush=True)
    return 1 if any(line["name"] == "part" and line["state"] in ("failed", "stopped") for line in results) else 0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prove.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=PASSES, help="first: right, fast, profile; second: variants")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu", metavar="DIR", help="of pack_kit.py (default: .gpu)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results (default: $OUT, else KIT/out)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for 20 GB that are not kept (default: in memory)")
    parser.add_argument("--parts", type=lambda text: text.split(","), metavar="a,b", help="only these")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for the whole pass; later parts are cut")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of torch (default: cuda)")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, vectors are not checked: over a stand-in")
    args = parser.parse_args(words)
    args.budget = args.budget or BUDGET[args.which]
    args.output = args.output or Path(os.environ.get("OUT") or args.kit / "out")
    known = [part.name for part in PASSES[args.which]]
    if unknown := set(args.parts or ()) - set(known):
        parser.error(f"--parts names {sorted(unknown)[0]}; {args.which} has {', '.join(known)}")
    return args


class _Run:
    """A pass: runs parts, keeps to the budget."""

    def __init__(self, args: argparse.Namespace, work: Path, output: Path, metadata: Path, log: IO[str]) -> None:
        self._args, self._work, self._output, self._log = args, work, output, log
        self._start = time.monotonic()
        self._end = self._start + args.budget - RESERVE
        self._beside: dict[str, tuple[Part, subprocess.Popen[bytes], float]] = {}
        self._say(f"pass {args.which}, {args.budget:.0f} s, work in {work}")
        site = self._unpack()
        write_metadata(metadata)
        self._environment = environment(site, metadata, work)

    def parts(self, parts: Sequence[Part]) -> None:
        for number, part in enumerate(parts):
            try:
                self._one(part, parts[number + 1 :])
            except Exception as error:  # the next part is run all the same
                self._say(f"{part.name}: {type(error).__name__}: {error}")

    def _one(self, part: Part, later: Sequence[Part]) -> None:
        for name in part.after:
            self._finish(name, wait=part.least)
        kept = sum(other.least for other in later if not other.beside)
        left = self._end - time.monotonic()
        limit = min(part.limit, left if part.beside else max(part.least, left - kept))
        if limit > left or limit < part.least:
            self._state(part, "skipped", 0.0, f"{left:.0f} s were left")
            return
        process, begun = self._start_part(part, limit), time.monotonic()
        if part.beside:
            self._beside[part.name] = (part, process, begun)
        else:
            self._wait(part, process, begun, limit)

    def close(self) -> None:
        """Wait for what still runs, at most until its limit."""
        for name, (part, _, begun) in list(self._beside.items()):
            self._finish(name, wait=max(0.0, begun + part.limit - time.monotonic()))

    def _finish(self, name: str, wait: float) -> None:
        if name in self._beside:
            part, process, begun = self._beside.pop(name)
            self._wait(part, process, begun, max(0.0, min(wait, self._end - time.monotonic())))

    def _start_part(self, part: Part, limit: float) -> subprocess.Popen[bytes]:
        self._say(f"{part.name}: begins, at most {limit:.0f} s")
        command = [
            sys.executable, "-u", "-m", "tests.gpu.proof.part", part.name, part.run, "--work", str(self._work),
            "--output", str(self._output), "--device", self._args.device, "--limit", f"{limit:.1f}",
            *(["--dry-run"] if self._args.dry_run else []),
        ]  # fmt: skip
        with self._log_of(part).open("wb") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _wait(self, part: Part, process: subprocess.Popen[bytes], begun: float, limit: float) -> None:
        try:
            process.wait(limit)
            state = "ok" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "stopped"
        finally:
            _stop(process)
        try:
            lines = self._log_of(part).read_text("utf-8", "replace").splitlines()
        except OSError as error:
            lines = [str(error)]
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        reason = {"ok": "", "failed": last[:300], "stopped": "at its limit"}[state]
        self._state(part, state, time.monotonic() - begun, reason)
        self._log.write("\n".join(f"  {line}" for line in lines[-200:]) + "\n")

    def _state(self, part: Part, state: str, seconds: float, reason: str) -> None:
        facts = {"state": state, "seconds": round(seconds, 1), "reason": reason}
        write_result(self._output, {"part": part.name, "name": "part", **facts})
        self._say(f"{part.name}: {state}, {seconds:.1f} s {reason}")

    def _log_of(self, part: Part) -> Path:
        folder = self._output / "files"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{part.name}.log"

    def _unpack(self) -> Path:
        start, site = time.monotonic(), self._work / "kit"
        facts: dict[str, Any] = {"state": "ok"}
        try:
            shutil.rmtree(site, ignore_errors=True)
            index = unpack(self._args.kit, site)
            facts |= {key: index.get(key) for key in ("onnxruntime", "python", "capability")}
        except Exception as error:  # torch's side can be measured all the same
            facts = {"state": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        facts["seconds"] = round(time.monotonic() - start, 1)
        write_result(self._output, {"part": "unpack", "name": "part", **facts})
        return site / "site"

    def _say(self, line: str) -> None:
        stamped = f"{time.monotonic() - self._start:6.1f} s  {line}"
        print(stamped, flush=True)
        self._log.write(stamped + "\n")
        self._log.flush()


def environment(site: Path, metadata: Path, work: Path) -> dict[str, str]:
    """What parts run in: the kit's onnxruntime before an installed one, this checkout, and CUDA's libraries."""
    python = [str(site), *(str(ROOT / source) for source in SOURCES), str(metadata)]
    libraries = [os.environ.get("LD_LIBRARY_PATH", ""), *(str(path) for path in cuda_folders())]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*python, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "CUDA_MODULE_LOADING": "LAZY",  # of the kit's library, code of kernels that are not used is not there
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "XDG_CACHE_HOME": str(work / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def cuda_folders() -> Iterator[Path]:
    """The folders of libraries of the installed nvidia packages, which torch finds by itself and others do not. That of
    cuDNN is left out: we must do without it.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folders = sorted(path for path in Path(place).glob("*/lib") if any(path.glob("lib*.so*")))
        yield from (path for path in folders if path.parent.name != "cudnn")


def _work_folder() -> Path:
    memory = Path("/dev/shm")
    enough = memory.is_dir() and shutil.disk_usage(memory).free >= NEEDED
    return (memory if enough else Path(tempfile.gettempdir())) / "jinaclip-proof"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a part and the processes it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2.0 if number == signal.SIGTERM else 5.0)


def _archive(output: Path) -> None:
    """files/ as one archive."""
    folder = output / "files"
    left = MOST_FILES
    with tarfile.open(output / ARCHIVE, "w:gz") as archive:
        paths = [path for path in folder.glob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: path.stat().st_size):
            left -= path.stat().st_size
            if left >= 0:
                archive.add(path, path.name)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
