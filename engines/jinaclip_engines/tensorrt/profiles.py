"""Read optimisation profiles from TOML: the built-in sets "server" and "edge", or a user's file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinaclip.backends.shapes import Profile
from jinaclip.bundle.manifest import TOWERS
from jinaclip_engines.errors import ProfileError

NAMED = ("server", "edge")
TOKEN_BUDGET = 32768  # default if a file has no token_budget


def load_profiles(name: str, *, max_tokens: int | None = None) -> dict[str, tuple[Profile, ...]]:
    """Load the profiles of each tower.

    Args:
        name: one of NAMED, or the path of a TOML file in the same format.
        max_tokens: the model's limit; larger lengths are reduced to it.

    Returns:
        The profiles by tower.

    Raises:
        ProfileError: the file is missing or invalid. The message names the field.
    """
    if name in NAMED:
        where, text = name, files("jinaclip_engines.tensorrt").joinpath(f"profile-sets/{name}.toml").read_text("utf-8")
    else:
        where = name
        try:
            text = Path(name).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ProfileError(f"--profile {name} is not {' or '.join(NAMED)} or a readable file ({error})") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{where} is not valid TOML: {error}") from error
    if unknown := set(document) - set(TOWERS):
        raise ProfileError(f"{where}: {sorted(unknown)[0]!r} is not a tower, expected {' or '.join(TOWERS)}")
    return {tower: _tower(where, tower, section, max_tokens) for tower, section in document.items()}


def _tower(where: str, tower: str, section: Any, max_tokens: int | None) -> tuple[Profile, ...]:
    known = {"profile", "token_budget"} if tower == "text" else {"profile"}
    if not isinstance(section, dict) or not isinstance(section.get("profile"), list) or not section["profile"]:
        raise ProfileError(f"{where}: expected a list [[{tower}.profile]]")
    if unknown := set(section) - known:
        raise ProfileError(f"{where}: [{tower}] has {sorted(unknown)[0]!r}, expected {' and '.join(sorted(known))}")
    budget = section.get("token_budget", TOKEN_BUDGET)
    if type(budget) is not int or budget < 1:
        raise ProfileError(f"{where}: token_budget is {budget!r}, expected a whole number")
    found: list[Profile] = []
    for number, entry in enumerate(section["profile"]):
        profile = _profile(f"{where}: {tower}.profile {number}", tower, entry, max_tokens)
        if profile.name in {other.name for other in found}:
            raise ProfileError(f"{where}: two {tower} profiles have the name {profile.name!r}")
        if tower == "text" and profile.corner > budget:
            raise ProfileError(
                f"{where}: {tower} profile {profile.name!r} has up to {profile.batch[2]} × "
                f"{profile.tokens[2] if profile.tokens else 1} tokens, more than its token_budget of {budget}"
            )
        found.append(profile)
    return tuple(found)


def _profile(where: str, tower: str, entry: Any, max_tokens: int | None) -> Profile:
    wanted = {"name", "batch", "tokens"} if tower == "text" else {"name", "batch"}
    if not isinstance(entry, dict) or set(entry) != wanted:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ProfileError(f"{where} has {found!r}, expected {', '.join(sorted(wanted))}")
    if not isinstance(entry["name"], str) or not entry["name"]:
        raise ProfileError(f"{where}: name is {entry['name']!r}, expected a word")
    tokens = None
    if tower == "text":
        least, best, most = _rising(where, entry, "tokens")
        limit = max_tokens or most
        tokens = (min(least, limit), min(best, limit), min(most, limit))
    return Profile(entry["name"], _rising(where, entry, "batch"), tokens)


def _rising(where: str, entry: Mapping[str, Any], field: str) -> tuple[int, int, int]:
    values = entry[field]
    if (
        not isinstance(values, list)
        or len(values) != 3
        or any(type(value) is not int for value in values)
        or not 1 <= values[0] <= values[1] <= values[2] < 1 << 20
    ):
        raise ProfileError(
            f"{where}: {field} is {values!r}, expected three whole numbers in ascending order, from 1 and below 2^20: "
            "smallest, optimal, largest"
        )
    return values[0], values[1], values[2]
