"""Records of measurements, one JSON object per line. Every line has exactly the fields in FIELDS."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from jinaclip.backends.base import Backend
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu
from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.cases.settings import BenchSettings, OpenCase
from jinaclip_bench.cases.table import Case
from jinaclip_bench.measuring.machine import commit, gpu_versions, load, machine_info, versions
from jinaclip_bench.measuring.timing import Requests, Sample, is_jinaclip, paired_ratio, precision_of, spread, summary

T = TypeVar("T")
SCHEMA = 4

FIELDS = {
    "schema": "version of this format",
    "run": "start of the run, UTC; the sides in lines of one run were measured in turn",
    "time": "time of this measurement, UTC",
    "suite": "a name in jinaclip_bench.cases.table.SUITES; null if cases were given by name",
    "case": "a name in jinaclip_bench.cases.table.CASES",
    "side": "jinaclip and a precision, then a backend on a GPU, or served; ClipModel if jinaclip's side is a server; "
    "torch-fp32, torch-fp32-unsorted, torch-bf16 or fused-onnx; on a GPU torch-fp16 alone (eager), -compiled, "
    "-compiled-graph, -max-autotune, -unpadded or -unpadded-compiled",
    "unit": "unit of samples, p50, p90, p99, min and max: ms",
    "samples": "durations of all timed calls in order; samples with the same index on two sides are from one round",
    "p50": "median of samples",
    "p90": "90th percentile",
    "p99": "99th percentile, close to max if there are few samples",
    "min": "shortest sample",
    "max": "longest sample",
    "items_per_s": "texts or images per second, from the median; null if each call is a new process",
    "tokens_per_s": "tokens per second, from the median; null for images",
    "against": "by jinaclip's other sides: p50, p10, p90 of this side's time ÷ theirs by round; lowest cosine",
    "peak_rss_mib": "peak resident set of the process (VmHWM), median; null for calls within one process",
    "pss_mib": "proportional set of the process after the first vector, median; null for calls within one process",
    "above_load_mib": "increase of the peak resident set during a call: p50, p10, p90; null if not measured",
    "device_ms": "the GPU's time for the tower: p50, p10, p90; null if not available",
    "stages_ms": "median by stage of STAGES, null for a stage that is not available; null if the case has no stages",
    "first_call_ms": "first call of the new session; null if not timed",
    "served": "a server's work in all samples: ms per request, p50 and p99; ms of CPU per request, of the server and "
    "of its clients; number of runs by their number of items; null if the side is not a server",
    "tflops": "useful floating-point operations per second, from the median, in 10^12; null if not counted",
    "matmul_tflops": "the GPU's rate for float16 matrices of 8192 × 8192, median over rounds; null on a CPU",
    "matmul_share": "tflops ÷ matmul_tflops of the same round: p50, p10, p90; null for precisions other than fp16",
    "shape": "input shape: [texts, most tokens], [images, height, width, 3] or one photo's [height, width, 3]",
    "threads": "number of cores that a call may use",
    "repeats": "number of samples",
    "burn_in": "number of untimed calls before the samples",
    "precision": "precision of the weights; null if the case does not use weights",
    "model": "random-small, random-full or the published id; null for other checkpoints",
    "weights_sha256": "SHA-256 of the checkpoint's weights",
    "provenance": "provenance of the bundle in this precision; null for other sides",
    "machine": "cpu, instructions that low precisions use, cores, memory_gib, os; gpu if a GPU is measured",
    "load": "average number of runnable processes in the minute before the run; above 0, timings may be disturbed",
    "versions": "python, jinaclip, onnxruntime, torch, uvicorn, …; on a GPU also driver, the CUDA it supports, …",
    "commit": "commit of the checkout, with -dirty if it was changed; null outside a checkout",
}
# Fields that each version added. They are null in records read from older versions.
SINCE = {
    3: ("device_ms", "stages_ms", "first_call_ms", "tflops", "matmul_tflops", "matmul_share"),
    4: ("served",),
}
OLDEST = min(SINCE) - 1
# Stages in the order of a call.
STAGES = ("tokenise", "decode and resize", "session", "copy in", "run", "copy out")
_PUBLIC_IDS = ("random-small", "random-full", "jinaai/jina-clip-v2")  # other ids may be names of directories


def run_fields(
    bundle: Bundle, suite: str | None = None, backends: Sequence[Backend] = (OnnxRuntimeCpu(),)
) -> dict[str, Any]:
    """The fields with the same value in all lines of a run."""
    gpu = backends[0].gpu
    libraries = {b.name: b.facts()["version"] for b in backends if b.name != OnnxRuntimeCpu.name}
    model_id = bundle.model.get("id")
    return {
        "schema": SCHEMA,
        "run": _now("milliseconds"),
        "suite": suite,
        "model": model_id if model_id in _PUBLIC_IDS else None,
        "weights_sha256": bundle.model["weights_sha256"],
        "machine": machine_info() | ({} if gpu is None else {"gpu": gpu.facts()}),
        "load": load(),
        "versions": versions() | ({} if gpu is None else gpu_versions(gpu)) | libraries,
        "commit": commit(),
    }


def records_of(
    case: Case,
    opened: OpenCase,
    settings: BenchSettings,
    samples: Mapping[str, Sequence[Sample]],
    cosines: Mapping[tuple[str, str], float],
    fields: Mapping[str, Any],
    rates: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """One record for each side, with fields in the order of FIELDS.

    Args:
        case: the case.
        opened: the opened case.
        settings: settings of the run.
        samples: samples by side, one for each round.
        cosines: result of `agreement`.
        fields: result of `run_fields`.
        rates: the GPU's rate for a large matrix product in each round, in TFLOP/s; () on a CPU.
    """
    times = {side: [sample.seconds * 1e3 for sample in of_side] for side, of_side in samples.items()}
    records = []
    for side, milliseconds in times.items():
        precision = None if case.kind == "preprocess" else precision_of(side)
        against = {
            base: {**_rounded(paired_ratio(milliseconds, times[base])), "cosine": round(cosine, 8)}
            for (other, base), cosine in cosines.items()
            if other == side
        }
        precisions = {} if precision is None else dict.fromkeys(settings.bundle.towers, precision)
        values = {
            **fields,
            **_time_fields(case, opened, milliseconds, rates if precision == "fp16" else ()),
            **_sample_fields(samples[side]),
            "time": _now("seconds"),
            "case": case.name,
            "side": side,
            "against": against,
            "first_call_ms": round(opened.first_calls[side] * 1e3, 4) if side in opened.first_calls else None,
            "matmul_tflops": round(statistics.median(rates), 3) if rates else None,
            "shape": list(opened.shape),
            "threads": opened.threads or settings.threads,
            "burn_in": opened.burn_in,
            "precision": precision,
            "provenance": settings.bundle.provenance(precisions) if precisions and is_jinaclip(side) else None,
        }
        records.append({name: values[name] for name in FIELDS})
    return records


def _time_fields(case: Case, opened: OpenCase, milliseconds: Sequence[float], rates: Sequence[float]) -> dict[str, Any]:
    """Fields that follow from the durations of the calls, and from the GPU's rate in each round."""
    figures = summary(milliseconds)
    calls_per_s = 1e3 / figures["p50"]
    flops = opened.flops or 0
    shares = [flops / ms / 1e9 / rate for ms, rate in zip(milliseconds, rates, strict=True)] if rates else []
    return {
        "unit": "ms",
        "samples": [round(ms, 4) for ms in milliseconds],
        **_rounded(figures),
        "items_per_s": round(case.rows * calls_per_s, 3) if opened.steady else None,
        "tokens_per_s": round(opened.tokens * calls_per_s, 2) if opened.steady and opened.tokens else None,
        "tflops": round(flops / figures["p50"] / 1e9, 3) if flops else None,
        "matmul_share": _spread(shares) if flops else None,
        "repeats": len(milliseconds),
    }


def _sample_fields(samples: Sequence[Sample]) -> dict[str, Any]:
    """Fields from what the samples have besides the durations."""
    device_s = _known(sample.device_s for sample in samples)
    return {
        "peak_rss_mib": _median(_known(sample.peak_rss_mib for sample in samples)),
        "pss_mib": _median(_known(sample.pss_mib for sample in samples)),
        "above_load_mib": _spread(_known(sample.above_load_mib for sample in samples)),
        "device_ms": _spread([seconds * 1e3 for seconds in device_s]),
        "stages_ms": _stages(_known(sample.stages for sample in samples)),
        "served": _served(_known(sample.requests for sample in samples)),
    }


def upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record of an older version to this version. Other values are returned unchanged."""
    schema = record.get("schema")
    if not isinstance(schema, int) or not OLDEST <= schema < SCHEMA:
        return dict(record)
    missing = [name for since, names in SINCE.items() if since > schema for name in names]
    return dict.fromkeys(missing) | dict(record) | {"schema": SCHEMA}


def to_line(record: Mapping[str, Any]) -> str:
    """The record as a line of a .jsonl file, without the newline."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _known(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(figure, 4) for name, figure in figures.items()}


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 1) if values else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p10 and p90; None without values."""
    return _rounded(spread(values)) if values else None


def _stages(samples: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    """Median milliseconds by stage; None for a stage that no sample has."""
    if not samples:
        return None
    times = {stage: _known(sample[stage] for sample in samples) for stage in samples[0]}
    return {stage: round(statistics.median(found) * 1e3, 4) if found else None for stage, found in times.items()}


def _served(samples: Sequence[Requests]) -> dict[str, Any] | None:
    if not samples:
        return None
    request_ms = [seconds * 1e3 for sample in samples for seconds in sample.seconds]
    server_cpu_s = _known(sample.server_cpu_s for sample in samples)
    batches = sum((Counter(sample.batches) for sample in samples), Counter[int]())
    per_request = 1e3 / len(request_ms)
    return {
        "request_ms": {name: round(summary(request_ms)[name], 4) for name in ("p50", "p99")},
        "server_cpu_ms": round(sum(server_cpu_s) * per_request, 4) if len(server_cpu_s) == len(samples) else None,
        "clients_cpu_ms": round(sum(sample.clients_cpu_s for sample in samples) * per_request, 4),
        "batches": {str(size): batches[size] for size in sorted(batches)},
    }


def _now(precision: str) -> str:
    return datetime.now(UTC).isoformat(timespec=precision).replace("+00:00", "Z")
