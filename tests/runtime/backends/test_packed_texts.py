"""Texts without padding: the arrays of a packed graph hold the texts, whatever their lengths."""

from __future__ import annotations

import numpy as np
import pytest

from jinaclip.backends.onnxruntime import packed_texts

PAD = 1


def filled(ids: np.ndarray) -> dict[str, np.ndarray]:
    texts = packed_texts.Texts(ids, PAD)
    shape = packed_texts.shape_of(texts.lengths)
    shapes = packed_texts.input_shapes(shape)
    inputs = {
        name: np.full(shapes[name], -7, np.int64 if name == packed_texts.IDS else np.int32)
        for name in (packed_texts.IDS, packed_texts.POSITIONS, packed_texts.OFFSETS)
    }
    texts.write(inputs)
    return inputs


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_found_between_its_offsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 1 + rng.choice([3, 40, 600]), rng.integers(1, 70))
    ids = np.full((len(lengths), lengths.max()), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(4, 1000, length)
    inputs = filled(ids)
    offsets = inputs[packed_texts.OFFSETS]
    for row, length in enumerate(lengths):
        part = slice(offsets[row], offsets[row + 1])
        np.testing.assert_array_equal(inputs[packed_texts.IDS][part], ids[row, :length])
        np.testing.assert_array_equal(inputs[packed_texts.POSITIONS][part], np.arange(length))
    assert (offsets[len(lengths) :] == lengths.sum()).all()  # the texts beyond are empty
    assert (inputs[packed_texts.IDS][offsets[-1] :] == PAD).all()
    assert (inputs[packed_texts.POSITIONS][offsets[-1] :] == 0).all()


def test_padding_inside_a_text_keeps_the_positions_of_what_follows() -> None:
    """As in the padded graph, where such a token is masked and positions count on."""
    inputs = filled(np.array([[0, 5, PAD, 6, 2]]))
    assert inputs[packed_texts.POSITIONS][:4].tolist() == [0, 1, 3, 4]
    assert inputs[packed_texts.OFFSETS].tolist() == [0, 4]


def test_few_shapes_and_little_padding() -> None:
    shapes = set()
    for tokens in range(1, 16385):
        found, texts, longest = packed_texts.shape_of(np.array([tokens]))
        assert tokens <= found <= max(16, tokens * 9 / 8 + 15) and texts == 1 and longest >= min(tokens, 16)
        shapes.add(found)
    assert len(shapes) <= 8 * 11
    assert packed_texts.shape_of(np.array([3] * 33))[1:] == (64, 16)
