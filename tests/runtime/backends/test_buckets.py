"""Shapes of engines: profiles from TOML, the buckets that batches are padded to, and the padding itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from jinaclip.backends.shapes import LADDER, SHORTEST, Bucket, Profile, bucket_for, most_rows, pad_into
from jinaclip_engines.errors import ProfileError
from jinaclip_engines.tensorrt.profiles import NAMED, load_profiles
from tests.runtime.backends.fake_tensorrt import holds

SERVER = load_profiles("server")


@pytest.mark.parametrize("name", NAMED)
def test_profiles_that_come_with_jinaclip(name: str) -> None:
    profiles = load_profiles(name)
    assert set(profiles) == {"text", "image"}
    assert most_rows(None, profiles["image"]) >= 4
    # Every length up to the longest has a bucket for one text, without a gap between profiles.
    longest = max(profile.tokens[2] for profile in profiles["text"] if profile.tokens)
    assert longest == (8192 if name == "server" else 512)
    for tokens in range(1, longest + 1):
        bucket = bucket_for(1, tokens, profiles["text"])
        assert bucket is not None and (bucket.tokens or 0) >= tokens
    assert bucket_for(1, longest + 1, profiles["text"]) is None and most_rows(longest + 1, profiles["text"]) == 0


def test_lengths_are_cut_to_the_models() -> None:
    profiles = load_profiles("server", max_tokens=600)["text"]
    assert max(profile.tokens[2] for profile in profiles if profile.tokens) == 600
    assert bucket_for(1, 600, profiles) == Bucket(2, 1, 600)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_bucket_holds_its_batch_in_a_profile_that_holds_it(tower: str) -> None:
    rng = np.random.default_rng(0)
    profiles = SERVER[tower]
    for _ in range(2000):
        tokens = int(np.clip(rng.lognormal(4, 1.5), 1, 8192)) if tower == "text" else None
        rows = int(rng.integers(1, most_rows(tokens, profiles) + 1))
        bucket = bucket_for(rows, tokens, profiles)
        assert bucket is not None and holds(profiles[bucket.profile], bucket.rows, bucket.tokens)
        assert bucket.rows >= rows and (tokens is None or (bucket.tokens or 0) >= tokens)
        for found, wanted in ((bucket.rows, rows), (bucket.tokens, tokens)):
            if found is not None and wanted is not None and wanted > SHORTEST:
                assert found <= 1.5 * wanted + 1
        assert bucket_for(bucket.rows, bucket.tokens, profiles) == bucket  # a bucket is its own


def test_few_shapes_stand_for_all() -> None:
    """Each has kernels to choose and a CUDA graph to capture."""
    found = {bucket_for(rows, tokens, SERVER["text"]) for tokens in range(1, 8193, 7) for rows in (1, 3, 8, 20, 64)}
    assert len(found - {None}) <= 80
    assert list(LADDER) == sorted(set(LADDER))
    assert all(b <= 1.5 * a for a, b in itertools.pairwise(LADDER[1:]))


def test_the_profile_with_the_least_memory_is_taken() -> None:
    assert bucket_for(1, 20, SERVER["text"]) == Bucket(0, 1, 24)
    assert bucket_for(9, 20, SERVER["text"]) == Bucket(1, 12, 24)
    assert bucket_for(1, 4000, SERVER["text"]) == Bucket(2, 1, 4096)
    assert bucket_for(5, 4000, SERVER["text"]) is None and most_rows(4000, SERVER["text"]) == 4
    assert bucket_for(1, None, SERVER["image"]) == Bucket(0, 1, None)
    assert bucket_for(33, None, SERVER["image"]) is None and most_rows(None, SERVER["image"]) == 32


def test_padding_keeps_rows_and_gives_every_other_row_a_token() -> None:
    """A row of padding alone has nothing to attend to: in an engine it is NaN, and spoils what is checked."""
    batch = np.array([[5, 6, 7], [8, 9, 1]])
    staging = np.full((4, 6), -1, np.int32)
    pad_into(staging, batch, 1)
    assert staging.tolist() == [[5, 6, 7, 1, 1, 1], [8, 9, 1, 1, 1, 1], [5, 6, 7, 1, 1, 1], [5, 6, 7, 1, 1, 1]]
    pixels = np.full((3, 2, 2, 3), 9, np.uint8)
    pad_into(pixels, np.zeros((1, 2, 2, 3), np.uint8), 0)
    assert not pixels[0].any() and (pixels[1:] == 9).all()


def test_a_profile_survives_its_sidecar() -> None:
    for profiles in SERVER.values():
        for profile in profiles:
            assert Profile.from_json(profile.to_json()) == profile
    for damaged in ({"name": "a"}, {"name": "a", "batch": [2, 1, 3], "tokens": None}, {"name": "a", "batch": [1, 2]}):
        with pytest.raises((KeyError, ValueError)):
            Profile.from_json({"tokens": None, **damaged} if "tokens" in damaged else damaged)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[text]\n[[text.profile]]\nname = "only"\nbatch = [1, 2, 4]\ntokens = [16, 64, 300]\n', "utf-8")
    assert load_profiles(str(path)) == {"text": (Profile("only", (1, 2, 4), (16, 64, 300)),)}


GOOD = 'name = "a"\nbatch = [1, 1, 8]\ntokens = [16, 32, 128]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[text", "is not valid TOML"),
        ("[audio]\n", "'audio' is not a tower, expected text or image"),
        ("[text]\n", r"expected a list \[\[text.profile\]\]"),
        (f"[text]\nbudget = 3\n[[text.profile]]\n{GOOD}", r"\[text\] has 'budget', expected profile and token_budget"),
        (f"[image]\ntoken_budget = 3\n[[image.profile]]\n{GOOD}", r"\[image\] has 'token_budget'"),
        (f"[text]\ntoken_budget = 0\n[[text.profile]]\n{GOOD}", "token_budget is 0"),
        (f"[text]\ntoken_budget = 1023\n[[text.profile]]\n{GOOD}", "'a' has up to 8 × 128 tokens, more than"),
        (f"[[text.profile]]\n{GOOD}[[text.profile]]\n{GOOD}", "two text profiles have the name 'a'"),
        ('[[text.profile]]\nname = "a"\nbatch = [1, 1, 8]\n', "text.profile 0 has"),
        (f"[[image.profile]]\n{GOOD}", "image.profile 0 has"),
        ("[[image.profile]]\nname = 3\nbatch = [1, 1, 8]\n", "name is 3, expected a word"),
        ('[[image.profile]]\nname = "a"\nbatch = [1, 8]\n', "three whole numbers in ascending order"),
        ('[[image.profile]]\nname = "a"\nbatch = [1, 9, 8]\n', "three whole numbers in ascending order"),
        ('[[image.profile]]\nname = "a"\nbatch = [0, 1, 8]\n', "three whole numbers in ascending order"),
        ('[[image.profile]]\nname = "a"\nbatch = [1, 1, 9999999999]\n', "three whole numbers in ascending order"),
        ('[[image.profile]]\nname = "a"\nbatch = [1.0, 2, 8]\n', "three whole numbers in ascending order"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content, "utf-8")
    with pytest.raises(ProfileError, match=message):
        load_profiles(str(path))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ProfileError, match="--profile laptop is not server or edge or a readable file"):
        load_profiles("laptop")
