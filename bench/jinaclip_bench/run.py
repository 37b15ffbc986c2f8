"""Measure cases one after another, one tower in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinaclip.terminal import Progress, say
from jinaclip_bench.cases.settings import Embed, Settings
from jinaclip_bench.cases.table import CASES, Case
from jinaclip_bench.errors import BenchError, NotCompiled
from jinaclip_bench.measuring.timing import Side, agreement, interleave
from jinaclip_bench.reporting.record import records_of, run_facts
from jinaclip_bench.scenarios.in_process import KINDS, USES_TORCH
from jinaclip_bench.tell import tell

if TYPE_CHECKING:
    from jinaclip_export.checkpoint.reader import Checkpoint

Write = Callable[[dict[str, Any]], None]


def run_cases(names: Iterable[str], settings: Settings, write: Write) -> None:
    """Measure, and hand each record to `write` as soon as its case is done.

    Args:
        names: of CASES; they run in its order.

    Raises:
        BenchError: sides return different vectors, or one cannot run. BundleError: the bundle lacks a tower or a
            precision; nothing was measured.
    """
    wanted = set(names)
    cases = [case for case in CASES.values() if case.name in wanted]
    for case in cases:
        for precision in settings.precisions if case.kind != "preprocess" else ():
            settings.bundle.graph(case.tower, precision)
        if case.kind != "preprocess" and not any(settings.ours(case.tower)):
            raise BenchError(
                f"{settings.backends[0].name} runs no graph of the {case.tower} tower in "
                f"{', '.join(settings.precisions)}; leave --precision or --backend out"
            )
    facts = run_facts(settings.bundle, settings.suite, settings.backends)
    for (tower, uses_torch), group in groupby(cases, key=lambda case: (case.tower, case.kind in USES_TORCH)):
        _run_group(list(group), tower if uses_torch else None, settings, facts, write)


def _run_group(
    cases: Sequence[Case], tower: str | None, settings: Settings, facts: Mapping[str, Any], write: Write
) -> None:
    """Cases that share torch's towers; these are freed on return."""
    with ExitStack() as stack:
        torch: dict[str, Embed] = {}
        if tower is not None and settings.checkpoint is not None:
            settings.bundle.tower(tower)
            say(f"torch {tower}: loading")
            torch = stack.enter_context(_open_torch(settings.checkpoint, tower, settings))
        for case in cases:
            for record in measure(case, settings, torch, facts):
                write(record)


def _open_torch(checkpoint: Checkpoint, tower: str, settings: Settings) -> AbstractContextManager[dict[str, Embed]]:
    if settings.gpu is None:
        from jinaclip_bench.sides.torch_cpu import open_torch

        return open_torch(checkpoint, settings.bundle, tower, threads=settings.threads)
    from jinaclip_bench.sides.torch_cuda import open_torch_cuda

    return open_torch_cuda(
        checkpoint, settings.bundle, tower, settings.gpu.index, max_autotune=settings.max_autotune, tell=tell
    )


def measure(
    case: Case, settings: Settings, torch: Mapping[str, Embed], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One case: burn in, compare what the sides return, then time them in turn.

    On a GPU the rate of large matrices is measured after each round, for that round's share of it.
    """
    say(f"{case.name}: loading")
    with KINDS[case.kind](case, settings, torch) as opened:
        sides, outputs = _burn_in(opened.sides, opened.burn_in)
        cosines = agreement(outputs)
        progress = Progress(f"{case.name} rounds", opened.rounds)
        rates: list[float] = []

        def advance() -> None:
            if opened.matmul_tflops is not None:
                rates.append(opened.matmul_tflops())
            progress.advance()

        samples = interleave(sides, opened.rounds, advance=advance)
        return records_of(case, opened, settings, samples, cosines, facts, rates)


def _burn_in(sides: Mapping[str, Side], calls: int) -> tuple[dict[str, Side], dict[str, Any]]:
    """Call the sides untimed. Returns them, without those that do not compile, and what they return."""
    kept, outputs = dict(sides), dict[str, Any]()
    for _ in range(calls):
        for name, side in list(kept.items()):
            try:
                outputs[name] = side().output
            except NotCompiled as error:
                tell(f"{error}; this side is left out")
                del kept[name]
                outputs.pop(name, None)
    return kept, outputs
