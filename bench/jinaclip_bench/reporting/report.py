"""Render records as Markdown, for the terminal and for the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.machine import SERVER_PACKAGES
from jinaclip_bench.measuring.timing import is_jinaclip
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
    """Render each run as a line about its machine and model, and tables.

    The tables are for steady calls, new processes, stages, servers and bounds. The output depends only on the records.
    """
    parts = []
    for _, run in groupby(records, key=lambda record: record["run"]):
        lines = list(run)
        steady = [record for record in lines if record["items_per_s"] is not None]
        starting = [record for record in lines if record["items_per_s"] is None]
        staged = [record for record in lines if record["stages_ms"]]
        served = [record for record in lines if record["served"]]
        compared = _compared(lines)
        tables: list[tuple[Sequence[Record], Columns]]
        tables = [(steady, _STEADY + compared), (starting, _STARTING + compared), (staged, _stages(staged))]
        tables += [(served, _SERVED), (_bounds(lines), _BOUNDS)]
        parts += [_header(lines), *("\n".join(_table(rows, columns)) for rows, columns in tables if rows)]
    return "\n\n".join(parts) + "\n" if parts else ""


def render_bounds(records: Iterable[Record]) -> str:
    """Render the table of bounds and measured values of all runs."""
    return "\n".join(_table(_bounds(list(records)), _BOUNDS)) + "\n"


def _header(records: Sequence[Record]) -> str:
    """The line that describes the machine, the versions and the model of a run."""
    first = records[0]
    machine, found = first["machine"], first["versions"]
    gpu, threads = machine.get("gpu"), max(record["threads"] for record in records)
    device = machine["cpu"] or "unknown processor"
    if gpu is not None:
        capability = f"capability {gpu['capability']}, {gpu['sm_count']} SMs, {gpu['memory_mib']:,} MiB"
        device = f"{gpu['name']} ({capability}), {device}"
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    load = "" if first["load"] is None else f", load average {first['load']:.1f} before the run"
    commit = f" ({_short_commit(first['commit'])})" if first["commit"] else ""
    server_packages = SERVER_PACKAGES if any(record["served"] for record in records) else ()
    names = ("onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "python", "cuda", "driver", *server_packages)
    libraries = ", ".join(f"{name} {found[name]}" for name in names if found.get(name))
    provenances = dict.fromkeys(record["provenance"] for record in records if record["provenance"])
    model = ", ".join([first["model"] or "model", f"weights {first['weights_sha256'][:12]}", *provenances])
    return (
        f"{device}, {threads} of {machine['cores']} cores{memory}, {machine['os']}{load}; "
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


Columns = tuple[tuple[str, Callable[[Record], str]], ...]


def _columns(paths: Mapping[str, str]) -> Columns:
    """Columns of numbers, by title. A path is a field's name, and keys of nested objects after dots."""
    return tuple((title, partial(_cell, path.split("."))) for title, path in paths.items())


def _cell(path: Sequence[str], record: Record) -> str:
    value: Any = record
    for key in path:
        value = None if value is None else value[key]
    return _number(value)


_NAMES: Columns = (
    ("case", lambda record: record["case"]),
    ("implementation", lambda record: record["side"]),
    ("n", lambda record: str(record["repeats"])),
)
_STEADY = _NAMES + _columns(
    {"p50 ms": "p50", "p90": "p90", "p99": "p99", "min": "min", "max": "max"}
    | {"items/s": "items_per_s", "tokens/s": "tokens_per_s", "MiB added by the call": "above_load_mib.p50"}
    | {"device ms": "device_ms.p50", "TFLOP/s": "tflops", "share of matmul": "matmul_share.p50"}
)
_STARTING = _NAMES + _columns(
    {"to first vector, p50 ms": "p50", "min": "min", "max": "max"}
    | {"peak RSS MiB": "peak_rss_mib", "PSS MiB": "pss_mib"}
)
_SERVED = _NAMES + _columns(
    {"request p50 ms": "served.request_ms.p50", "request p99 ms": "served.request_ms.p99"}
    | {"server CPU ms per request": "served.server_cpu_ms", "client CPU ms per request": "served.clients_cpu_ms"}
)
_SERVED += (
    ("mean items per batch", lambda record: _number(_mean_size(record["served"]["batches"]))),
    ("most items per batch", lambda record: max(record["served"]["batches"], key=int)),
)
_BOUNDS: Columns = (
    ("case", lambda row: row["bound"].case),
    ("figure", lambda row: row["bound"].description),
    ("bound", lambda row: _limit(row["bound"], row["bound"].limit)),
    ("target", lambda row: _limit(row["bound"], row["bound"].target)),
    ("measured (p10 … p90)", lambda row: _spread(row["measured"] and row["measured"].figures, _number)),
    ("compared", lambda row: _sides(row["bound"], row["measured"])),
    ("verdict", lambda row: row["verdict"]),
)


def _compared(records: Sequence[Record]) -> Columns:
    """Columns that compare every side with each of jinaclip's: the ratios, then the cosines."""
    sides = [side for side in dict.fromkeys(record["side"] for record in records) if is_jinaclip(side)]
    ratios = [(f"time ÷ {side} (p10 … p90)", partial(_ratio, side)) for side in sides]
    cosines = [(f"cosine, {side}", partial(_cosine, side)) for side in sides]
    return (*ratios, *cosines)


def _ratio(side: str, record: Record) -> str:
    return _spread(record["against"].get(side))


def _cosine(side: str, record: Record) -> str:
    return f"{record['against'][side]['cosine']:.6f}" if side in record["against"] else ""


def _mean_size(batches: Mapping[str, int]) -> float:
    return sum(int(size) * count for size, count in batches.items()) / sum(batches.values())


def _limit(bound: Bound, limit: float | None) -> str:
    return "" if limit is None else f"{'≥' if bound.at_least else '≤'} {_number(limit)}"


def _sides(bound: Bound, measured: Measured | None) -> str:
    """The compared sides, or an empty string if the bound's description names them."""
    return "" if measured is None or bound.description.startswith(measured.sides) else measured.sides


def _stages(records: Sequence[Record]) -> Columns:
    """One column for each stage that at least one record has."""
    stages = [stage for stage in STAGES if any(stage in record["stages_ms"] for record in records)]
    columns = [(f"{stage} ms", partial(_stage, stage)) for stage in stages]
    return (*_NAMES, *_columns({"p50 ms": "p50"}), *columns, *_columns({"first call ms": "first_call_ms"}))


def _stage(stage: str, record: Record) -> str:
    stages = record["stages_ms"]
    return "not available" if stages.get(stage, 0) is None else _number(stages.get(stage))


def _bounds(records: Sequence[Record]) -> list[Record]:
    """Rows of the table of bounds: all that were measured, and those of the run's suite that were not."""
    rows: list[Record] = []
    for bound in BOUNDS:
        measured = bound.measured(records)
        if measured or bound.suite == records[0]["suite"]:
            verdict = bound.verdict(measured.figures["p50"]) if measured else "not measured"
            rows.append({"bound": bound, "measured": measured, "verdict": verdict})
    return rows


def _table(records: Sequence[Record], columns: Columns) -> Iterator[str]:
    """Lines of a Markdown table, padded for reading on a terminal. Empty columns are omitted."""
    cells = [[cell(record) for record in records] for _, cell in columns]
    shown = [(title, column) for (title, _), column in zip(columns, cells, strict=True) if any(column)]
    widths = [max(3, *map(len, (title, *column))) for title, column in shown]

    def row(words: Sequence[str]) -> str:
        padded = [w.ljust(n) if i < 2 else w.rjust(n) for i, (w, n) in enumerate(zip(words, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    yield row([title for title, _ in shown])
    yield row(["-" * n if i < 2 else "-" * (n - 1) + ":" for i, n in enumerate(widths)])
    for index in range(len(records)):
        yield row([column[index] for _, column in shown])
