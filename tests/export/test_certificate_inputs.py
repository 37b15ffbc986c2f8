"""What a certificate is measured on: the built-in texts and pictures, and what counts as the same item."""

from __future__ import annotations

import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.bundle.certificates import MIN_ITEMS
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import InputError
from jinaclip_export.certification import captions, inputs
from jinaclip_export.certification.measure import without_duplicates
from jinaclip_export.certification.pictures.generated import generated_pictures
from tests.conftest import PHOTOS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built_in_images() -> inputs.Items:
    return inputs.built_in_images()


def rows(name: str) -> list[list[str]]:
    """A file of texts: one with the cells of each line."""
    content = (ROOT / "export/jinaclip_export" / name).read_text("utf-8")
    return [line.split("\t") for line in content.splitlines()]


def test_texts() -> None:
    texts = inputs.built_in_texts().items
    assert texts == captions.built_in_texts() and len(texts) == len(set(texts)) >= MIN_ITEMS["text"]
    assert len(texts) == 1230  # what certify's help says
    words = [len(str(text).split()) for text in texts if str(text).isascii()]
    assert words.count(1) > 10 and min(words) == 1 and sum(40 <= n <= 80 for n in words) >= 3 and max(words) <= 80
    scripts = {unicodedata.name(c).split()[0] for text in texts for c in str(text) if c.isalpha()}
    assert len(scripts) >= 12, scripts


def test_sentences() -> None:
    sentences = rows("certificate_texts.tsv")
    assert all(len(row) == 2 and row[1] == row[1].strip() for row in sentences)
    assert len(sentences) == len({row[1] for row in sentences}) == 260
    assert {row[1] for row in sentences} <= set(captions.built_in_texts())


def test_captions() -> None:
    """Every language has all parts, and no part is that of another language."""
    parts = rows("certificate_captions.tsv")
    assert all(len(row) == 3 and row[2] == row[2].strip() == unicodedata.normalize("NFC", row[2]) for row in parts)
    assert {row[1] for row in parts} == {"order", "noun", "place", "whole"}
    languages = {row[0] for row in rows("certificate_texts.tsv")}
    count = Counter((language, part) for language, part, _ in parts)
    for language in languages:
        assert [count[language, part] for part in ("order", "noun", "place", "whole")] == [1, 8, 5, 2], language
    texts = [text for _, part, text in parts if part != "order"]
    assert len(texts) == len(set(texts))
    found = captions.captions({"order": ["{noun} {place}"], "noun": ["a", "b", "c"], "place": ["1", "2"]})
    assert found == ["a 2", "b 1", "c 2"]


def test_pictures(built_in_images: inputs.Items) -> None:
    pictures = [np.asarray(picture) for picture in generated_pictures()]
    again = [np.asarray(picture) for picture in built_in_images.items[: len(pictures)]]
    assert all(np.array_equal(a, b) for a, b in zip(pictures, again, strict=True))
    assert len({p.tobytes() for p in pictures}) == len(pictures) >= MIN_ITEMS["image"]
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.std() > 3 for p in pictures)
    assert len(pictures) == 234 and len(built_in_images) == 246  # what certify's help says
    heights, widths = np.array([p.shape[:2] for p in pictures]).T
    assert len(set(zip(heights, widths, strict=True))) > 200
    assert (widths / heights).min() < 0.5 and (widths / heights).max() > 2
    assert min(heights.min(), widths.min()) >= 200 and max(heights.max(), widths.max()) > 700
    saturation = np.array([np.ptp(p.reshape(-1, 3).mean(axis=0)) for p in pictures])
    assert (saturation < 1).sum() > 5  # grey ones


def test_no_two_pictures_are_nearly_the_same(model: ClipModel, built_in_images: inputs.Items) -> None:
    """The nearest pair had a cosine of 0.9933, and two crops of one photo up to 0.9997."""
    vectors = model.encode_image(built_in_images.items).astype(np.float64)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    nearest = cosine.max(axis=1)
    assert nearest.max() < 0.995 and np.median(nearest) < 0.9


def test_items_that_are_equal_for_the_graph_count_once(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(small_bundle)
    texts = inputs.Items(["a cat", " a  cat", "a dog", "a cat\u3000"], "sha256:1")
    found = without_duplicates(bundle, "text", texts)
    assert (found.items, found.source) == (["a cat", "a dog"], "sha256:1")
    picture = generated_pictures()[0]
    for name in ("a.png", "b.bmp"):  # other bytes, the same pixels
        picture.save(tmp_path / name)
    shutil.copy(PHOTOS[0], tmp_path / "c.png")
    images = inputs.images_of(str(tmp_path))
    assert len(images) == 3
    found = without_duplicates(bundle, "image", images)
    assert [Path(str(path)).name for path in found.items] == ["a.png", "c.png"] and found.source == images.source
    with pytest.raises(InputError, match="--images has 1 different images, expected at least 2"):
        without_duplicates(bundle, "image", inputs.Items([picture, picture], "x"))
