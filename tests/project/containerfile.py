"""Run the Containerfile's own instructions without a container engine, and look at the server that comes of them.

    python -m tests.project.containerfile      # as root, with debootstrap installed; 2 minutes, 1 GB of temporary files

FROM makes a root with debootstrap, RUN and ENTRYPOINT run under chroot in namespaces of their own for processes and
mounts: nothing stays mounted, and the server is process 1, as in a container. Unlike there, the network is this
machine's, the root can be written to by its owner, and Debian's packages come without its security archive. Only what
our Containerfile uses is understood; anything else is an error.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jinaclip import ClipModel

ROOT = Path(__file__).resolve().parents[2]
KEYWORDS = ("FROM", "RUN", "COPY", "WORKDIR", "ENV", "LABEL", "USER", "EXPOSE", "ENTRYPOINT", "CMD")
BASE = re.compile(r"docker\.io/library/debian:([a-z]+)-slim")
NOT_IN_SLIM = ("doc", "info", "locale", "man")  # of /usr/share
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def parse(text: str) -> list[tuple[str, str]]:
    """The instructions, each as its keyword and what follows it; comments are left out and continued lines joined."""
    found, pending = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pending += line.rstrip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        keyword, _, rest = pending.partition(" ")
        if keyword not in KEYWORDS:
            raise ValueError(f"line {number} ends an instruction {keyword!r}, expected one of {', '.join(KEYWORDS)}")
        if "<<" in rest or "$" in rest or (keyword == "RUN" and rest.startswith("-")):
            raise ValueError(f"the {keyword} that ends at line {number} has a variable, an option or a here-document")
        found.append((keyword, rest.strip()))
        pending = ""
    if pending:
        raise ValueError(f"the last instruction has no end: {pending!r}")
    return found


def in_context(path: str, rules: Sequence[str]) -> bool:
    """Whether the builder may read a file; the last rule of .dockerignore that names it or its directory counts."""
    parts, kept = path.split("/"), True
    for rule in rules:
        pattern = rule.removeprefix("!")
        if pattern.startswith("**/"):
            matches = any(fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            matches = all(fnmatchcase(*pair) for pair in zip(parts, pattern.split("/"), strict=False))
            matches = matches and pattern.count("/") < len(parts)
        if matches:
            kept = rule.startswith("!")
    return kept


def context_rules() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@dataclass
class Image:
    """A root directory, and what the instructions said of it; LABEL and EXPOSE change nothing that runs."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # of CMD

    def command(self, words: Sequence[str], environment: Mapping[str, str], binds: Mapping[str, Path]) -> list[str]:
        """A command line that runs `words` in the image, with `binds` (read-only) at the places that are their keys."""
        root = shlex.quote(str(self.root))
        lines = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"mount --rbind /sys {root}/sys"]
        lines.append(f"mount -t tmpfs tmpfs {root}/mnt")  # what is bound in it leaves no trace
        for place, path in binds.items():
            inside, outside = f"{root}{shlex.quote(place)}", shlex.quote(str(path))
            lines += [f"mkdir -p {inside}" if path.is_dir() else f": > {inside}", f"mount --bind {outside} {inside}"]
            lines.append(f"mount -o remount,bind,ro {inside}")
        settings = [f"{name}={value}" for name, value in (self.environment | dict(environment)).items()]
        chroot = ["chroot", f"--userspec={self.user}", "--groups=", str(self.root), "env", "-i", "-C", self.workdir]
        lines.append("exec " + shlex.join([*chroot, *settings, *words]))
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(lines)]


def debian(suite: str, root: Path, mirror: str | None) -> None:
    """What an image debian:SUITE-slim holds: no documentation, no translations, no packages' lists or files."""
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", suite, str(root)]
    subprocess.run([*command, *([mirror] if mirror else [])], check=True)
    for name in NOT_IN_SLIM:
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)
    excluded = "".join(f"path-exclude /usr/share/{name}/*\n" for name in NOT_IN_SLIM)
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(excluded)
    for pattern in ("var/lib/apt/lists/*_*", "var/cache/apt/archives/*.deb", "var/cache/apt/*.bin"):
        for file in root.glob(pattern):
            file.unlink()


def copy(words: Sequence[str], image: Image, stages: Mapping[str, Image]) -> None:
    """COPY: files into a directory, or what a directory holds into another."""
    rules = context_rules()
    source_root = ROOT
    if words[0].startswith("--from="):
        source_root, rules = stages[words[0].removeprefix("--from=")].root, []
    *names, destination = [word for word in words if not word.startswith("--from=")]
    target = image.root / os.path.join(image.workdir, destination).lstrip("/")
    for name in names:
        source = source_root / name.lstrip("/")

        def left_out(directory: str, inside: list[str], base: Path = source_root) -> set[str]:
            at = Path(directory).relative_to(base)
            return {entry for entry in inside if not in_context((at / entry).as_posix(), rules)}

        if left_out(str(source.parent), [source.name]):
            raise ValueError(f"COPY {name}: .dockerignore leaves it out")
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=left_out)
        elif destination.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        else:
            raise ValueError(f"COPY {name}: files are copied into a directory, whose name ends with a slash")


def build(directory: Path, mirror: str | None, environment: Mapping[str, str], binds: Mapping[str, Path]) -> Image:
    """The image of the last stage; roots of the stages lie in `directory`. Settings and binds are for RUN alone."""
    stages: dict[str, Image] = {}
    for number, (keyword, rest) in enumerate(parse((ROOT / "Containerfile").read_text("utf-8")), 1):
        print(f"{number:2} {keyword} {rest}", flush=True)
        words = shlex.split(rest)
        if keyword == "FROM":
            root, suite = directory / f"root-{number}", BASE.fullmatch(words[0])
            if suite:
                debian(suite[1], root, mirror)
                image = Image(root)
            else:
                subprocess.run(["cp", "--archive", str(stages[words[0]].root), str(root)], check=True)
                image = Image(root, dict(stages[words[0]].environment))
            stages[words[2] if words[1:2] == ["AS"] else "last"] = image
        elif keyword == "RUN":
            subprocess.run(image.command(["/bin/sh", "-c", rest], environment, binds), check=True)
        elif keyword == "COPY":
            copy(words, image, stages)
        elif keyword == "WORKDIR":
            image.workdir = os.path.join(image.workdir, words[0])
            (image.root / image.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif keyword == "ENV":
            image.environment.update((name, value) for name, _, value in (word.partition("=") for word in words))
        elif keyword == "USER":
            image.user = words[0]
        elif keyword == "ENTRYPOINT":
            image.entrypoint = json.loads(rest)
        elif keyword == "CMD":
            image.words = json.loads(rest)
    return stages["last"]


def check_content(image: Image) -> None:
    """Nothing lies in the root that only a build needs, nor anything like weights."""
    names = (path.relative_to(image.root).as_posix() for path in image.root.rglob("*"))
    unwanted = r".*/(bin/(gcc|cc|pip)|site-packages/(torch|onnx|pip|hatchling)|[^/]+\.(onnx|safetensors|engine))"
    found = [name for name in names if re.fullmatch(unwanted, name) and "/onnxruntime/datasets/" not in name]
    assert not found, found
    size = int(subprocess.check_output(["du", "-sxb", str(image.root)]).split()[0])
    print(f"the root holds {size / 2**20:.0f} MiB; no weights, compiler, pip, torch or onnx", flush=True)


@contextmanager
def running(image: Image, bundle: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """ENTRYPOINT and CMD; all that they started ends with the block."""
    command = image.command([*image.entrypoint, *image.words], environment, {"/bundle": bundle})
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check_server(image: Image, bundle: Path) -> None:
    """What `docker run` would give, with a bundle: refusal without a key, vectors with one, an end by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"HOME": "/", "JINACLIP_SERVE_PORT": str(port)}
    with running(image, bundle, settings) as process:
        said = process.communicate(timeout=120)[1].strip()
        assert process.returncode == 1 and "no --api-key is set" in said, (process.returncode, said)
        print(f"without a key: status 1, {said}", flush=True)

    before = sorted(bundle.rglob("*"))
    with running(image, bundle, settings | {"JINACLIP_SERVE_API_KEY": "key"}) as process:
        began = time.monotonic()
        while ask(port, "/ready")[0] != 200:
            assert process.poll() is None and time.monotonic() < began + 120, "the server does not become ready"
            time.sleep(0.05)
        took = time.monotonic() - began
        server = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines())
        uid, gid = ({*status[name].split()} for name in ("Uid", "Gid"))
        assert [uid, gid] == [{word} for word in image.user.split(":")] and "0" not in uid | gid, status
        assert int(status["CapEff"], 16) == 0 and status["NSpid"].split()[-1] == "1", status
        print(f"ready after {took:.1f} s, as process 1, user and group {image.user}, no capabilities", flush=True)

        picture = bundle / "golden-0.png"
        body = {"input": ["a cup of coffee", {"image": base64.b64encode(picture.read_bytes()).decode()}]}
        assert ask(port, "/v1/embeddings", body)[0] == 401
        code, answer = ask(port, "/v1/embeddings", body, "key")
        assert code == 200, answer
        notes = [path.relative_to(image.root).as_posix() for path in (image.root / "cache").rglob("*.json")]
        assert notes and sorted(bundle.rglob("*")) == before, notes
        with ClipModel(bundle) as model:
            expected = [model.encode_text("a cup of coffee"), model.encode_image(str(picture))]
        error = max(float(abs(e - d["embedding"]).max()) for e, d in zip(expected, answer["data"], strict=True))
        assert error <= 1e-6, error
        print(f"a text and a picture: at most {error:.1e} from ClipModel here; notes in {', '.join(notes)}", flush=True)

        os.kill(server, signal.SIGTERM)
        said = process.communicate(timeout=60)[1].strip()
        assert process.returncode == 0, (process.returncode, said)
        print(f"SIGTERM: status 0; it had said: {said}")


def ask(port: int, route: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    """Status and answer of a request to this machine; status 0 where nobody listens."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{route}", data, headers)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mirror", metavar="URL", help="of Debian, for debootstrap (default: debootstrap's)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for RUN alone")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="RUN sees it at /mnt/NAME")
    args = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print("container-test needs root, for chroot and mounts, and the command debootstrap", file=sys.stderr)
        return 1
    binds = {f"/mnt/{Path(path).name}": Path(path).resolve() for path in args.bind}
    environment = dict(word.split("=", 1) for word in args.env)
    with tempfile.TemporaryDirectory(prefix="container") as temporary:
        directory = Path(temporary)
        image = build(directory, args.mirror, environment, binds)
        check_content(image)
        bundle = directory / "bundle"
        export = [sys.executable, "-m", "jinaclip", "export", "--random", "small", "--output", str(bundle)]
        subprocess.run(export, check=True)
        check_server(image, bundle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
