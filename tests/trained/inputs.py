"""The inputs: texts in many languages, and photos.

Texts are the messages of Django and their translations, the docstrings of Django, and the captions of the stamps of Tux
Paint with their translations. Pictures are those stamps that are photos. The choice is the same on every machine.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from jinaclip.preprocessing.image import resize
from jinaclip.preprocessing.text import TextTokenizer
from tests.trained.fetch import stamps, wheel
from tests.trained.mapped import IMAGENET

# Directory of the language in Django -> language of the captions.
LANGUAGES = {
    name: name for name in "ar bg cs da de el es fa fi fr he hu id it ko lv nl pl ro ru sk sv th tr uk vi".split()
}
LANGUAGES |= {"ja": "ja", "pt_BR": "pt_BR", "zh_Hans": "zh_CN", "hi": "hi"}
MESSAGES = 30  # of each language other than English
CAPTIONS = 12
ENGLISH = 150  # captions, and as many docstrings
LEAST_BYTES, MOST_CHARACTERS = 20, 400  # of a message or a docstring
PLACEHOLDERS = re.compile(r"[%{}<>&`*]|::")
LEAST_PIXELS = 64  # of each side of a picture
# Directories of stamps that are drawings, or photos of one thing many times.
DRAWINGS = {"symbols", "cartoon", "seasonal", "roadsigns", "flags"}


def messages(content: str) -> Iterator[str]:
    """The translations of a .po file, without those that are fuzzy, obsolete, empty or in several numbers."""
    for entry in re.split(r"\n\s*\n", content):
        lines = entry.splitlines()
        if any(
            line.startswith(("#~", "msgid_plural")) or (line.startswith("#,") and "fuzzy" in line) for line in lines
        ):
            continue
        # A field is a name and strings, on as many lines as there are strings.
        fields: dict[str, str] = {}
        name = ""
        for line in lines:
            if match := re.match(r'(?:(msgctxt|msgid|msgstr) )?(".*")\s*$', line):
                name = match[1] or name
                fields[name] = fields.get(name, "") + json.loads(match[2])
        if fields.get("msgid") and fields.get("msgstr"):  # the file's header has an empty msgid
            yield fields["msgstr"]


def sentence(text: str) -> str | None:
    """The text on one line; None if it is too short or long, or has placeholders or markup."""
    line = " ".join(text.split())
    short = len(line.encode()) < LEAST_BYTES or len(line) > MOST_CHARACTERS
    return None if short or PLACEHOLDERS.search(line) else line


def captions(content: str, language: str) -> Iterator[str]:
    """The caption in one language, from a stamp's text file. The first line is English."""
    first, *others = content.splitlines() or [""]
    lines = [first] if language == "en" else [o.partition("=")[2] for o in others if o.startswith(f"{language}.utf8=")]
    yield from (line.strip() for line in lines if line.strip())


def docstrings(source: str) -> Iterator[str]:
    """The first paragraph of each docstring of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield (ast.get_docstring(node) or "").partition("\n\n")[0]


def texts(tokenizer: TextTokenizer, unknown: int, *, prefix: str = "") -> dict[str, list[str]]:
    """Texts by language, whose token ids are all different. Texts with characters that the tokenizer does not know are
    left out.

    Args:
        tokenizer: the model's tokenizer.
        unknown: id of its unknown token.
        prefix: what is put before every text.
    """
    seen: set[tuple[int, ...]] = set()

    def choose(pool: Iterable[str | None], count: int, seed: str) -> list[str]:
        shuffled = sorted({text for text in pool if text})
        random.Random(seed).shuffle(shuffled)
        chosen: list[str] = []
        for text in shuffled:
            ids = tuple(tokenizer.encode([text], instruction=prefix)[0])
            if len(chosen) < count and unknown not in ids and ids not in seen:
                seen.add(ids)
                chosen.append(text)
        return chosen

    django = wheel("django") / "django"
    stamp_files = [path.read_text("utf-8", "replace") for path in sorted(stamps().rglob("*.txt"))]
    sources = (path.read_text("utf-8") for path in sorted(django.rglob("*.py")))
    found = {
        "en": choose((caption for file in stamp_files for caption in captions(file, "en")), ENGLISH, "captions en")
        + choose((sentence(text) for source in sources for text in docstrings(source)), ENGLISH, "docstrings")
    }
    for language, of_captions in sorted(LANGUAGES.items()):
        files = [path.read_text("utf-8") for path in sorted(django.rglob(f"locale/{language}/LC_MESSAGES/*.po"))]
        translated = (sentence(text) for file in files for text in messages(file))
        found[language] = choose(translated, MESSAGES, f"messages {language}")
        pool = (caption for file in stamp_files for caption in captions(file, of_captions))
        found[language] += choose(pool, CAPTIONS, f"captions {language}")
    return found


def pictures() -> dict[str, Image.Image]:
    """Different photos by name, on a white background."""
    directory = stamps()
    found: dict[bytes, tuple[str, Image.Image]] = {}
    for path in sorted(directory.rglob("*.png")):
        place = path.relative_to(directory)
        if not DRAWINGS.isdisjoint(place.parts) or path.stem.endswith("_mirror"):
            continue
        picture = on_white(path)
        one_colour = picture.getcolors(maxcolors=1) is not None
        if min(picture.size) >= LEAST_PIXELS and not one_colour:
            found.setdefault(resize(picture, IMAGENET).tobytes(), ("-".join(place.with_suffix("").parts), picture))
    return dict(found.values())


def on_white(path: Path) -> Image.Image:
    """A picture in mode RGB. What is transparent in the file is white."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
