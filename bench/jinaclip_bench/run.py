"""Run the cases one after another, with one tower in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinaclip.terminal import progress, say
from jinaclip_bench.cases.settings import BenchSettings, Embed
from jinaclip_bench.cases.table import CASES, MAX_ROUNDS, Case
from jinaclip_bench.errors import BenchError, NotCompiled
from jinaclip_bench.measuring.timing import Side, agreement, interleave
from jinaclip_bench.reporting.record import records_of, run_fields
from jinaclip_bench.scenarios.in_process import KINDS, USES_TORCH

if TYPE_CHECKING:
    from jinaclip_export.checkpoint.reader import Checkpoint

logger = logging.getLogger("jinaclip")
Write = Callable[[dict[str, Any]], None]


def run_cases(names: Iterable[str], settings: BenchSettings, write: Write) -> None:
    """Measure the cases, and pass the records of a case to `write` when the case is done.

    Args:
        names: names of cases in CASES. They run in the order of CASES.
        settings: settings of the run.
        write: function that receives each record.

    Raises:
        BenchError: two sides return different vectors, or a side cannot run.
        BundleError: the bundle does not have a tower or a precision. Nothing was measured.
    """
    wanted = set(names)
    cases = [case for case in CASES.values() if case.name in wanted]
    for case in cases:
        settings.bundle.tower(case.tower)
        for precision in settings.precisions if case.kind != "preprocess" else ():
            settings.bundle.graph(case.tower, precision)
        if case.kind != "preprocess" and not any(settings.jinaclip_sides(case.tower)):
            raise BenchError(
                f"{settings.backends[0].name} cannot run the {case.tower} tower in "
                f"{', '.join(settings.precisions)}; remove --precision or --backend"
            )
    fields = run_fields(settings.bundle, settings.suite, settings.backends)
    for (tower, uses_torch), group in groupby(cases, key=lambda case: (case.tower, case.kind in USES_TORCH)):
        _run_group(list(group), tower if uses_torch else None, settings, fields, write)


def _run_group(
    cases: Sequence[Case], tower: str | None, settings: BenchSettings, fields: Mapping[str, Any], write: Write
) -> None:
    """Run cases that share torch's towers. The towers are freed on return."""
    with ExitStack() as stack:
        torch: dict[str, Embed] = {}
        if tower is not None and settings.checkpoint is not None:
            say(f"torch {tower}: loading")
            torch = stack.enter_context(_open_torch(settings.checkpoint, tower, settings))
        for case in cases:
            for record in measure(case, settings, torch, fields):
                write(record)


def _open_torch(
    checkpoint: Checkpoint, tower: str, settings: BenchSettings
) -> AbstractContextManager[dict[str, Embed]]:
    if settings.gpu is None:
        from jinaclip_bench.sides.torch_cpu import open_torch

        return open_torch(checkpoint, settings.bundle, tower, threads=settings.threads)
    from jinaclip_bench.sides.torch_cuda import open_torch_cuda

    return open_torch_cuda(checkpoint, settings.bundle, tower, settings.gpu.index, max_autotune=settings.max_autotune)


def measure(
    case: Case, settings: BenchSettings, torch: Mapping[str, Embed], fields: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Measure one case: call the sides untimed, compare their outputs, then time them in turn.

    On a GPU the rate of a large matrix product is measured after each round, to compute that round's share of it.
    """
    say(f"{case.name}: loading")
    with KINDS[case.kind](case, settings, torch) as opened:
        sides, outputs = _burn_in(opened.sides, opened.burn_in)
        cosines = agreement(outputs)
        rounds = min(settings.repeats, MAX_ROUNDS.get(case.kind, settings.repeats))
        advance_bar = progress(f"{case.name} rounds", rounds)
        rates: list[float] = []

        def advance() -> None:
            if opened.matmul_tflops is not None:
                rates.append(opened.matmul_tflops())
            advance_bar(1)

        samples = interleave(sides, rounds, advance=advance)
        return records_of(case, opened, settings, samples, cosines, fields, rates)


def _burn_in(sides: Mapping[str, Side], calls: int) -> tuple[dict[str, Side], dict[str, Any]]:
    """Call the sides untimed. Returns the sides, without those that do not compile, and their outputs."""
    working, outputs = dict(sides), dict[str, Any]()
    for _ in range(calls):
        for name, side in list(working.items()):
            try:
                outputs[name] = side().output
            except NotCompiled as error:
                logger.warning("%s; this side is skipped", error)
                del working[name]
                outputs.pop(name, None)
    return working, outputs
