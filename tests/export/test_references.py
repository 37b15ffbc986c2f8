"""The references against the outputs of the publisher's own code, and the settings they must not ignore."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.references import Floats, Tensors, image_reference, text_reference, unit

GOLDEN = Path(__file__).parents[1] / "data" / "golden-tiny"
UNIT_ATOL = 1e-5
RAW_ATOL = 2e-5  # raw vectors have norms near 8; measured 1e-6 (text) and 0 (image), 1e-7 on unit vectors

Variant = Callable[..., Path]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN / "io.npz") as file:
        return dict(file)


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    """A copy of the golden checkpoint with config entries replaced and its tensors passed through `edit`."""

    def make(
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        edit: Callable[[Tensors], Tensors] = dict,
    ) -> Path:
        config = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["hf_model_config_kwargs"] |= text or {}
        config["vision_config"] |= vision or {}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(edit(load_file(GOLDEN / "model.safetensors")), tmp_path / "model.safetensors")
        return tmp_path

    return make


def gap(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).max())


def assert_same(actual: Floats, expected: Floats) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert gap(unit(actual), unit(expected)) <= UNIT_ATOL
    assert gap(actual, expected) <= RAW_ATOL


def test_text_is_the_publishers(golden: dict[str, Any]) -> None:
    assert_same(text_reference(GOLDEN)(golden["input_ids"]), golden["text_embeddings"])


def test_image_is_the_publishers(golden: dict[str, Any]) -> None:
    assert_same(image_reference(GOLDEN)(golden["pixel_values"]), golden["image_embeddings"])


def test_a_row_does_not_feel_its_padding(golden: dict[str, Any]) -> None:
    row = golden["input_ids"][1:2]
    unpadded = text_reference(GOLDEN)(row[row != 1][np.newaxis])
    assert row.shape[1] > (row != 1).sum()
    assert_same(unpadded, golden["text_embeddings_row1_unpadded"])
    assert_same(unpadded, golden["text_embeddings"][1:2])


def test_alpha_scales_the_adapter_down_to_none(golden: dict[str, Any], variant: Variant) -> None:
    without = text_reference(variant(text={"lora_alpha": 0}))(golden["input_ids"])
    assert_same(without, golden["text_embeddings_without_adapter"])
    assert gap(unit(without), unit(golden["text_embeddings"])) > 0.01


def test_adaptations_are_told_apart_by_name(golden: dict[str, Any], variant: Variant) -> None:
    def prepend_zero_adapter(tensors: Tensors) -> Tensors:
        lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
        return tensors | {name: torch.cat((torch.zeros_like(t), t)) for name, t in lora.items()}

    checkpoint = variant({"lora_adaptations": ["separation", "retrieval.query"]}, edit=prepend_zero_adapter)
    ids = golden["input_ids"]
    assert_same(text_reference(checkpoint)(ids), golden["text_embeddings"])
    assert_same(text_reference(checkpoint, "separation")(ids), golden["text_embeddings_without_adapter"])
    with pytest.raises(ValueError, match="classification"):
        text_reference(checkpoint, "classification")


@pytest.mark.parametrize("overlay", [{"rotary_emb_base": 10000.0}, {"layer_norm_eps": 0.1}])
def test_text_settings_reach_the_model(overlay: dict[str, Any], golden: dict[str, Any], variant: Variant) -> None:
    changed = text_reference(variant(overlay))(golden["input_ids"])
    assert gap(unit(changed), unit(golden["text_embeddings"])) > 10 * UNIT_ATOL


def test_another_pad_id_masks_the_same_tokens(golden: dict[str, Any], variant: Variant) -> None:
    ids = np.where(golden["input_ids"] == 1, 96, golden["input_ids"])
    assert 96 not in golden["input_ids"]
    assert_same(text_reference(variant({"pad_token_id": 96}))(ids), golden["text_embeddings"])


def test_pixels_past_the_last_patch_are_not_read(golden: dict[str, Any], variant: Variant) -> None:
    pixels = np.pad(golden["pixel_values"], ((0, 0), (0, 0), (0, 5), (0, 5)), constant_values=9.0)
    assert_same(image_reference(variant(vision={"image_size": 75}))(pixels), golden["image_embeddings"])


def test_image_positions_scale_with_the_pretraining_grid(golden: dict[str, Any], variant: Variant) -> None:
    changed = image_reference(variant(vision={"pt_hw_seq_len": 5}))(golden["pixel_values"])
    assert gap(unit(changed), unit(golden["image_embeddings"])) > 10 * UNIT_ATOL


def test_float16_is_widened_before_the_adapter_is_merged(golden: dict[str, Any], variant: Variant) -> None:
    def halve(tensors: Tensors) -> Tensors:
        return {name: tensor.half() for name, tensor in tensors.items()}

    def round_trip(tensors: Tensors) -> Tensors:
        return {name: tensor.half().float() for name, tensor in tensors.items()}

    ids, pixels = golden["input_ids"], golden["pixel_values"]
    stored = variant(edit=halve)
    text, image = text_reference(stored)(ids), image_reference(stored)(pixels)
    widened = variant(edit=round_trip)
    np.testing.assert_array_equal(text, text_reference(widened)(ids))
    np.testing.assert_array_equal(image, image_reference(widened)(pixels))


@pytest.mark.parametrize("vision", [{"post_norm": True}, {"subln": False}, {"proj_type": "linear"}])
def test_another_architecture_is_refused(vision: dict[str, Any], variant: Variant) -> None:
    with pytest.raises(ValueError, match=next(iter(vision))):
        image_reference(variant(vision=vision))
