"""The results of a pass as text, short enough for the end of a terminal's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MOST = 11000  # characters
_SHOWN = {"versions": ("python", "torch", "onnxruntime-gpu", "onnx-ir", "cores", "shared_memory_gib")}
_HIDDEN = ("part", "name", "towers", "dims", "torch_dims", "file", "providers")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Parts, facts, times and kernels, in this order; cut to MOST characters from the end of the least important."""
    latest = {(line["part"], line["name"]): line for line in results}.values()
    blocks = [_parts(latest), _times(latest), _facts(latest), _kernels(latest)]
    text = "\n\n".join(block for block in blocks if block)
    return text if len(text) <= MOST else text[:MOST] + "\n… (the rest is in results.jsonl)"


def _parts(lines: Iterable[dict[str, Any]]) -> str:
    rows = [
        f"{line['part']:<20} {line['state']:<8} {line['seconds']:6.1f} s  {str(line.get('reason', ''))[:110]}"
        for line in lines
        if line["name"] == "part"
    ]
    return "\n".join(rows)


def _times(lines: Iterable[dict[str, Any]]) -> str:
    rows = [
        "case: side                                                 ms    p10    p90  device  per s     TFLOP/s share"
    ]
    for line in lines:
        if "ms" not in line:
            continue
        units = ("tokens_s", "images_s", "texts_s", "per_s")
        each = next((f"{line[unit]:>9} {unit[:-2]}" for unit in units if unit in line), "")
        rows.append(
            f"{line['name']:<52} {line['ms']:>8} {line['p10']:>7} {line['p90']:>7} {line.get('device_ms', ''):>7} "
            f"{each:<17} {line.get('tflops', ''):>6} {_percent(line.get('share'))}"
        )
    return "\n".join(rows) if len(rows) > 1 else ""


def _facts(lines: Iterable[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if line["name"] == "part" or "ms" in line or "kernels" in line:
            continue
        names = _SHOWN.get(line["name"], tuple(line))
        facts = {name: line[name] for name in names if name in line and name not in _HIDDEN}
        if line["name"].endswith(" ready") and "error" not in line and line["seconds"] < 1 and line["cosine"] > 0.999:
            continue
        rows.append(f"{line['part']}: {line['name']}: " + ", ".join(f"{k} {_short(v)}" for k, v in facts.items())[:230])
    return "\n".join(rows)


def _kernels(lines: Iterable[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if "kernels" not in line:
            continue
        facts = {
            name: line[name] for name in ("wall_ms", "launches", "busy_ms", "gaps_ms", "median_gap_us", "others_ms")
        }
        rows.append(f"{line['part']}: {line['name']}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
        rows += [
            f"  {kernel['ms']:>9} ms {_percent(kernel['share'])} {kernel['calls']:>6} x {kernel['mean_us']:>8} us  "
            f"{kernel['name']}"
            for kernel in line["kernels"]
        ]
    return "\n".join(rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:5.1f} %"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    return str(value)
