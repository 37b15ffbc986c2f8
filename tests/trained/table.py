"""The page docs/trained.md, from bench/results/trained.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/trained.json"
PAGE = ROOT / "docs/trained.md"
MODELS = {"MiniLM": "", "E5": "", "DINO": ""}


def page(results: Mapping[str, Any]) -> str:
    out = []
    for name, r in results.items():
        out.append(f"{name} ref {r['reference_error']:.1e} {r['precisions']} {sum(r['languages'].values())} {r['languages']}")
        for g in r["graphs"]:
            (e,) = g["towers"].values()
            for d, n in e["dims"].items():
                out.append(f"{g['precision']} {g['prepared']} {d} {n['cosine']['min']:.6f} {n['cosine']['p1']:.6f} {n['cosine']['mean']:.6f} {n['error_ratio']['median']:.4f} {n['top10']['within']:.4f} ± {g['standard_error'][d]:.4f}")
            out.append(f"{e['items']} {e['source']} {e['verdict']} {e['reasons']} {e['batch']}")
    return "\n".join(out)
