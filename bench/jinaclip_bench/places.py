"""Where our sides run on a GPU: with every backend that can, or with the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jinaclip.backends.selection import BACKENDS as KNOWN
from jinaclip.backends.selection import Place, choose_place
from jinaclip.backends.tensorrt.plans import find_plan
from jinaclip.bundle.manifest import Bundle
from jinaclip.errors import BackendError, BackendMissing

BACKENDS = KNOWN[1:]  # without "auto"


def places_on_gpu(
    bundle: Bundle, towers: Sequence[str], device: str, backend: str | None, *, tell: Callable[[str], None]
) -> tuple[Place, ...]:
    """The places of our sides, at least one.

    Args:
        towers: that are measured.
        device: "cuda" or "cuda:N".
        backend: of BACKENDS; None for every one that can run, with a sentence to `tell` for one that cannot.

    Raises:
        BackendMissing, EngineMismatch: what was asked for cannot run, or nothing can; says what is missing.
    """
    places, problems = [], []
    for name in BACKENDS if backend is None else (backend,):
        try:
            place = choose_place(bundle, towers, backend=name, device=device)
            if place.library is not None and place.gpu is not None:
                for tower in towers:
                    find_plan(bundle, tower, place.library, place.gpu, hashes=False)
        except BackendError as error:
            if backend is not None:
                raise
            problems.append(f"{name} is left out: {error}")
        else:
            places.append(place)
    if not places:
        raise BackendMissing("; ".join(problems))
    for problem in problems:
        tell(problem)
    return tuple(places)
