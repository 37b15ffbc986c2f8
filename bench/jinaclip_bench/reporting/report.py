"""Render records as Markdown, for the terminal and for the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.machine import SERVE
from jinaclip_bench.measuring.timing import is_ours
from jinaclip_bench.reporting.bounds import BOUNDS, Bound, Measured
from jinaclip_bench.reporting.record import FIELDS, SCHEMA, STAGES, upgraded

Record = Mapping[str, Any]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a .jsonl file.

    Raises:
        BenchError: a line is not a record of a supported schema. The message has the line number.
    """
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BenchError(
                f"{path} line {number} is not JSON ({error}); expected a file written by `bench run`"
            ) from error
        if isinstance(record, dict):
            record = upgraded(record)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or not record.keys() >= FIELDS.keys():
            raise BenchError(f"{path} line {number} is not a record of schema {SCHEMA}; measure again")
        records.append(record)
    return records


def render(records: Iterable[Record]) -> str:
    """Render each run as a line of facts and tables: steady calls, new processes, stages, servers, bounds.

    The output depends only on the records.
    """
    parts = []
    for _, run in groupby(records, key=lambda record: record["run"]):
        lines = list(run)
        parts.append(_facts(lines))
        steady = [record for record in lines if record["items_per_s"] is not None]
        starting = [record for record in lines if record["items_per_s"] is None]
        for rows, columns in ((steady, _STEADY), (starting, _STARTING)):
            if rows:
                parts.append("\n".join(_table(rows, columns + _compared(lines))))
        if staged := [record for record in lines if record["stages_ms"]]:
            parts.append("\n".join(_table(staged, _stages(staged))))
        if served := [record for record in lines if record["served"]]:
            parts.append("\n".join(_table(served, _SERVED)))
        if bounds := _bounds(lines):
            parts.append("\n".join(_table(bounds, _BOUNDS)))
    return "\n\n".join(parts) + "\n" if parts else ""


def render_bounds(records: Iterable[Record]) -> str:
    """Render the table of bounds and measured values of all runs."""
    return "\n".join(_table(list(_bounds(list(records))), _BOUNDS)) + "\n"


def _facts(records: Sequence[Record]) -> str:
    first = records[0]
    machine, found = first["machine"], first["versions"]
    threads, cores = max(record["threads"] for record in records), machine["cores"]
    serve = SERVE if any(record["served"] for record in records) else ()
    names = ("onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "python", "cuda", "driver", *serve)
    libraries = ", ".join(f"{name} {found[name]}" for name in names if found.get(name))
    commit = f" ({_short_commit(first['commit'])})" if first["commit"] else ""
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    provenances = dict.fromkeys(record["provenance"] for record in records if record["provenance"])
    model = ", ".join([first["model"] or "model", f"weights {first['weights_sha256'][:12]}", *provenances])
    load = "" if first["load"] is None else f", load average {first['load']:.1f} before the run"
    gpu = machine.get("gpu")
    on = "" if gpu is None else (
        f"{gpu['name']} (capability {gpu['capability']}, {gpu['sm_count']} SMs, {gpu['memory_mib']:,} MiB), "
    )  # fmt: skip
    return (
        f"{on}{machine['cpu'] or 'unknown processor'}, {threads} of {cores} cores{memory}, {machine['os']}{load}; "
        f"jinaclip {found['jinaclip']}{commit}, {libraries}; {model}; {first['run']}"
    )


def _short_commit(commit: str) -> str:
    name, dash, dirty = commit.partition("-")
    return name[:10] + dash + dirty


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(figures: Mapping[str, float] | None, number: Callable[[float], str] = "{:.2f}".format) -> str:
    if not figures:
        return ""
    p50, p10, p90 = (number(figures[name]) for name in ("p50", "p10", "p90"))
    return f"{p50} ({p10} … {p90})"


def _figure(name: str) -> Callable[[Record], str]:
    return lambda record: _number(record[name])


Columns = tuple[tuple[str, Callable[[Record], str]], ...]

_NAMES: Columns = (
    ("case", lambda record: record["case"]),
    ("implementation", lambda record: record["side"]),
    ("n", lambda record: str(record["repeats"])),
)
_STEADY: Columns = (
    *_NAMES,
    ("p50 ms", _figure("p50")),
    ("p90", _figure("p90")),
    ("p99", _figure("p99")),
    ("min", _figure("min")),
    ("max", _figure("max")),
    ("items/s", _figure("items_per_s")),
    ("tokens/s", _figure("tokens_per_s")),
    ("MiB added by the call", lambda record: _number((record["above_load_mib"] or {}).get("p50"))),
    ("device ms", lambda record: _number((record["device_ms"] or {}).get("p50"))),
    ("TFLOP/s", _figure("tflops")),
    ("share of matmul", lambda record: _number((record["matmul_share"] or {}).get("p50"))),
)
_STARTING: Columns = (
    *_NAMES,
    ("to first vector, p50 ms", _figure("p50")),
    ("min", _figure("min")),
    ("max", _figure("max")),
    ("peak RSS MiB", _figure("peak_rss_mib")),
    ("PSS MiB", _figure("pss_mib")),
)
_SERVED: Columns = (
    *_NAMES,
    ("request p50 ms", lambda record: _number(record["served"]["request_ms"]["p50"])),
    ("request p99 ms", lambda record: _number(record["served"]["request_ms"]["p99"])),
    ("server CPU ms per request", lambda record: _number(record["served"]["server_cpu_ms"])),
    ("client CPU ms per request", lambda record: _number(record["served"]["clients_cpu_ms"])),
    ("mean items per batch", lambda record: _number(_mean_size(record["served"]["batches"]))),
    ("most items per batch", lambda record: max(record["served"]["batches"], key=int)),
)
_BOUNDS: Columns = (
    ("case", lambda row: row["bound"].case),
    ("figure", lambda row: row["bound"].what),
    ("bound", lambda row: _limit(row["bound"], row["bound"].limit)),
    ("target", lambda row: _limit(row["bound"], row["bound"].target)),
    ("measured (p10 … p90)", lambda row: _spread(row["measured"] and row["measured"].figures, _number)),
    ("compared", lambda row: _sides(row["bound"], row["measured"])),
    ("verdict", lambda row: row["verdict"]),
)


def _compared(records: Sequence[Record]) -> Columns:
    """Columns that compare every side with each of jinaclip's: the ratios, then the cosines."""
    sides = [side for side in dict.fromkeys(record["side"] for record in records) if is_ours(side)]

    def ratio(side: str) -> Callable[[Record], str]:
        return lambda record: _spread(record["against"].get(side))

    def cosine(side: str) -> Callable[[Record], str]:
        return lambda record: f"{record['against'][side]['cosine']:.6f}" if side in record["against"] else ""

    return (
        *((f"time ÷ {side} (p10 … p90)", ratio(side)) for side in sides),
        *((f"cosine, {side}", cosine(side)) for side in sides),
    )


def _mean_size(batches: Mapping[str, int]) -> float:
    return sum(int(size) * count for size, count in batches.items()) / sum(batches.values())


def _limit(bound: Bound, limit: float | None) -> str:
    return "" if limit is None else f"{'≥' if bound.at_least else '≤'} {_number(limit)}"


def _sides(bound: Bound, measured: Measured | None) -> str:
    """The compared sides, or an empty string if the bound's description names them."""
    return "" if measured is None or bound.what.startswith(measured.between) else measured.between


def _stages(records: Sequence[Record]) -> Columns:
    """One column for each stage that at least one record has."""

    def cell(stage: str) -> Callable[[Record], str]:
        def text(record: Record) -> str:
            if stage not in record["stages_ms"]:
                return ""
            found = record["stages_ms"][stage]
            return "not available" if found is None else _number(found)

        return text

    stages = [stage for stage in STAGES if any(stage in record["stages_ms"] for record in records)]
    return (
        *_NAMES,
        ("p50 ms", _figure("p50")),
        *((f"{stage} ms", cell(stage)) for stage in stages),
        ("first call ms", _figure("first_call_ms")),
    )


def _bounds(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Rows of the table of bounds: all that were measured, and those of the run's suite that were not."""
    rows = []
    for bound in BOUNDS:
        measured = bound.measured(records)
        if measured or bound.suite == records[0]["suite"]:
            verdict = bound.verdict(measured.figures["p50"]) if measured else "not measured"
            rows.append({"bound": bound, "measured": measured, "verdict": verdict})
    return rows


def _table(records: Sequence[Record], columns: Columns) -> Iterator[str]:
    """Lines of a Markdown table, padded for reading on a terminal. Empty columns are omitted."""
    cells = [[cell(record) for record in records] for _, cell in columns]
    kept = [(title, column) for (title, _), column in zip(columns, cells, strict=True) if any(column)]
    widths = [max(3, *map(len, (title, *column))) for title, column in kept]

    def row(words: Sequence[str]) -> str:
        padded = [w.ljust(n) if i < 2 else w.rjust(n) for i, (w, n) in enumerate(zip(words, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    yield row([title for title, _ in kept])
    yield row(["-" * n if i < 2 else "-" * (n - 1) + ":" for i, n in enumerate(widths)])
    for index in range(len(records)):
        yield row([column[index] for _, column in kept])
