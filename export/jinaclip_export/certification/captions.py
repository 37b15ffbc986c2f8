"""Built-in texts of a certificate, written for this project.

`certificate_texts.tsv` has 260 sentences: 26 languages, ten each, 2 to 61 words. `certificate_captions.tsv` has what
the other texts are made from, one part per line: a language or kind, the name of the part, and its text. The parts:

    order    how a caption of the language is put together, e.g. "{noun} {place}"
    noun     a thing that pictures show; eight in each language, different ones in each
    place    a place or circumstance; five in each language. Every noun can be combined with every place.
    whole    a text as it is: single words and names, and, under the name of a kind, product titles, code, dates,
             addresses, mail, emoji and chat

A caption is made of every noun and four of the five places, 32 in each language. For each language there is also one
long text: its third to seventh sentence joined.
"""

from __future__ import annotations

from importlib.resources import files

JOINED = slice(2, 7)  # the sentences of a language that are joined to a long text
NO_SPACES = ("zh", "ja")


def built_in_texts() -> list[str]:
    """The sentences, captions, long texts and texts of other kinds. All are different."""
    sentences, parts = _sentences(), _parts()
    texts = [text for language in sentences.values() for text in language]
    for of_language in parts.values():
        texts += of_language.get("whole", [])
        texts += captions(of_language)
    texts += [("" if name in NO_SPACES else " ").join(some[JOINED]) for name, some in sentences.items()]
    return texts


def captions(parts: dict[str, list[str]]) -> list[str]:
    """The captions of one language: every noun with every place but one."""
    return [
        order.format(noun=noun, place=place)
        for order in parts.get("order", [])
        for i, noun in enumerate(parts["noun"])
        for j, place in enumerate(parts["place"])
        if i % len(parts["place"]) != j
    ]


def _sentences() -> dict[str, list[str]]:
    """The sentences of each language."""
    found: dict[str, list[str]] = {}
    for language, text in _rows("certificate_texts.tsv"):
        found.setdefault(language, []).append(text)
    return found


def _parts() -> dict[str, dict[str, list[str]]]:
    """The texts by language or kind, and by part."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, part, text in _rows("certificate_captions.tsv"):
        found.setdefault(name, {}).setdefault(part, []).append(text)
    return found


def _rows(file: str) -> list[list[str]]:
    content = files("jinaclip_export").joinpath(file).read_text("utf-8")
    return [line.split("\t") for line in content.split("\n") if line]
