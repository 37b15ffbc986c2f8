"""Check a compiled graph against the requirements, using the compiler's list of layers and the plan.

TensorRT may run a graph in other ways than intended without a warning: attention as products over a matrix of all
scores, products with float32 weights of twice the size, or sums in float16. Its verbose log and its inspector list
every kernel with the ONNX nodes it computes. TensorRT-RTX's plan also records how each product is summed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinaclip_engines.passes.tensorrt import Expected

SIZE_MARGIN = 0.05  # a plan may exceed the size of its weights by this share, plus FIXED_BYTES per profile
FIXED_BYTES = 16 << 20  # code and tables of one profile, independent of the size of the weights
HALF_SUMS = "_f16f16_f16f16_f16_"  # in the name of a TensorRT kernel: operands, result and sums are float16
SUMMED_IN_FLOAT32 = 2  # `accumulation_type` of a plan; with 0 the kernel chooses


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes; a dynamic size is -1."""

    shape: tuple[int, ...]
    dtype: str  # the compiler's name of the type: Half, Float, Int32, …


@dataclass(frozen=True)
class Kernel:
    """One entry of the compiler's list of layers.

    Attributes:
        name, kind, tactic: the compiler's own names: "_gemm_mha_v2_myl0_13", "kgen", …
        nodes: ONNX nodes that the kernel computes, in part or completely.
        reads: inputs and constants of the kernel.
    """

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    reads: tuple[Operand, ...]

    @property
    def is_attention(self) -> bool:
        """Whether the kernel is a fused attention, by its name: "_gemm_mha_v2…", "…fmha…"."""
        return re.search(r"mha|flash_?attention", f"{self.name} {self.tactic}", re.IGNORECASE) is not None

    @property
    def profile(self) -> int:
        """Index of the optimisation profile that the kernel belongs to: "…_myl1_26" belongs to the second."""
        found = re.search(r"_myl(\d+)_\d+$", self.name)
        return int(found[1]) if found else 0

    def weight(self) -> Operand | None:
        """The weight matrix of a product: an operand of fixed shape with at least two sizes above 1."""
        for operand in reversed(self.reads):
            if sum(size > 1 for size in operand.shape) >= 2 and -1 not in operand.shape:
                return operand
        return None


@dataclass(frozen=True)
class Report:
    """Report on the compiled plan of one tower.

    Attributes:
        profiles: number of optimisation profiles, each with its own kernels.
        kernels: number of kernels in all profiles.
        attention: number of fused attention kernels in all profiles.
        attention_expected: number of blocks that must have fused attention.
        products: number of products found with float16 weights, out of `products_expected`.
        products_expected: number of products that must have float16 weights.
        summed_in_float32: number of those products that the plan records as summed in float32; None without records.
        attention_sums: types that fused attention sums in, if the plan records them: "FP32".
        plan_bytes, weight_bytes: sizes of the plan and the weights, in bytes.
        problems: requirements that are not met, each with the name of the layer. An engine with a problem is not
            written.
    """

    profiles: int
    kernels: int
    attention: int
    attention_expected: int
    products: int
    products_expected: int
    summed_in_float32: int | None
    attention_sums: tuple[str, ...]
    plan_bytes: int
    weight_bytes: int
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as lines of text."""
        sums = "not reported by this compiler" if self.summed_in_float32 is None else f"{self.summed_in_float32}"
        return [
            f"attention: {self.attention} fused kernels, {self.attention_expected} blocks × {self.profiles} profiles"
            + (f", summed in {', '.join(self.attention_sums)}" if self.attention_sums else ""),
            f"products: {self.products} of {self.products_expected} with float16 weights; summed in float32: {sums}",
            f"plan: {self.plan_bytes / 1e6:,.1f} MB for {self.weight_bytes / 1e6:,.1f} MB of weights, "
            f"{self.kernels} kernels",
        ]


def read_kernels(text: str) -> list[Kernel]:
    """Parse the list of layers in the format of the verbose build log and of the inspector's one-line output."""
    return [_kernel(entry) for entry in re.split(r"(?:^|\n)Name: ", text)[1:] if "LayerType:" in entry]


def report_on(
    kernels: Sequence[Kernel],
    plan: memoryview | bytes,
    expected: Expected,
    policy: str,
    *,
    profiles: int = 1,
    records_sums: bool = False,
) -> Report:
    """Check a compiled plan against the requirements.

    Args:
        kernels: kernels from the compiler's list of layers.
        plan: the compiled plan.
        expected: requirements returned by `for_tensorrt`.
        policy: one of jinaclip_engines.passes.tensorrt.POLICIES.
        profiles: number of optimisation profiles of the engine.
        records_sums: whether this compiler's plans record how products are summed. If so, a plan without such records
            has a problem.

    Returns:
        The report. Its `problems` lists the requirements that are not met.
    """
    attention = {name: _attention_problem(name, kernels, expected) for name in expected.attention}
    products = {name: _product_problem(name, kernels) for name in expected.products}
    sums = _sums_of_products(plan)
    summed = _least_summed(sums, kernels, expected, profiles) if sums else None
    attention_sums = _sums_of_attention(plan)
    problems = [problem for problem in (*attention.values(), *products.values()) if problem is not None]
    if policy == "fp16-acc32":
        problems += _sum_problems(sums, kernels, expected, records_sums=records_sums)
        if not problems and summed is not None and summed < len(expected.products):
            problems.append(f"only {summed} of {len(expected.products)} products are reported as summed in float32")
        if set(attention_sums) - {"FP32"}:
            problems.append(f"attention sums in {', '.join(attention_sums)}, expected FP32")
    limit = expected.weight_bytes * (1 + SIZE_MARGIN) + profiles * FIXED_BYTES
    if len(plan) > limit:
        problems.append(
            f"the plan has {len(plan) / 1e6:,.1f} MB for {expected.weight_bytes / 1e6:,.1f} MB of weights, expected at "
            f"most {limit / 1e6:,.1f} MB: weights are stored in float32 or more than once"
        )
    return Report(
        profiles=profiles,
        kernels=len(kernels),
        attention=sum(kernel.is_attention and _computes(kernel, name) for name in attention for kernel in kernels),
        attention_expected=len(expected.attention),
        products=list(products.values()).count(None),
        products_expected=len(expected.products),
        summed_in_float32=summed,
        attention_sums=attention_sums,
        plan_bytes=len(plan),
        weight_bytes=expected.weight_bytes,
        problems=tuple(problems),
    )


def _attention_problem(name: str, kernels: Sequence[Kernel], expected: Expected) -> str | None:
    """Reason why a block's attention is not one kernel with float16 operands and the mask in each profile, or None."""
    owners = [kernel for kernel in kernels if _computes(kernel, name)]
    fused = [kernel for kernel in owners if kernel.is_attention]
    apart = [kernel for kernel in owners if kernel.kind == "gemm" and not kernel.is_attention]
    if not fused or apart:
        what = ", ".join(kernel.name for kernel in (apart or owners)) or "no listed kernel"
        return f"{name}: expected one fused attention kernel, found {what}"
    for kernel in fused:
        if kernel.reads and kernel.reads[0].dtype != "Half":
            return f"{name}: attention reads {kernel.reads[0].dtype}, expected Half"
        if expected.mask is not None and len(kernel.reads) <= 3:  # only queries, keys and values
            return f"{name}: attention does not read the mask, so padding would change the vectors"
    return None


def _product_problem(name: str, kernels: Sequence[Kernel]) -> str | None:
    """Reason why a product does not have float16 weights in each profile, or None."""
    found = [(kernel, kernel.weight()) for kernel in kernels if name in kernel.nodes]
    weights = [(kernel, weight) for kernel, weight in found if weight is not None]
    if not weights:
        return f"{name}: the compiler's list has no kernel with the product's weights"
    for kernel, weight in weights:
        if weight.dtype != "Half":
            return f"{name}: the weights are {weight.dtype} in {kernel.name}, expected Half"
    return None


def _sum_problems(
    sums: Mapping[tuple[str, int], Sequence[int]], kernels: Sequence[Kernel], expected: Expected, *, records_sums: bool
) -> list[str]:
    """Products that are not summed in float32, according to the plan or to kernel names."""
    if records_sums and not sums:
        return ["the plan does not record how products are summed, so float32 sums cannot be verified; use fp16-fast"]
    problems = []
    for name in expected.products:
        kinds = {kind for (of, _), found in sums.items() if of == name for kind in found}
        if other := kinds - {SUMMED_IN_FLOAT32}:
            problems.append(f"{name}: products are not summed in float32 (accumulation_type {min(other)})")
        elif tactic := next((k.tactic for k in kernels if name in k.nodes and HALF_SUMS in k.tactic), None):
            problems.append(f"{name}: products are summed in float16, according to the kernel's name ({tactic})")
    return problems


def _kernel(entry: str) -> Kernel:
    head, _, metadata = entry.partition("Metadata:")
    before, _, after = head.partition("Outputs:")
    return Kernel(
        name=entry.partition(",")[0].strip(),
        kind=_field(head, "LayerType"),
        tactic=_field(after, "TacticName"),
        nodes=tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata)),
        reads=tuple(
            Operand(tuple(int(size) for size in dims.split(",") if size), dtype)
            for dims, dtype in re.findall(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)", before)
        ),
    )


def _field(text: str, name: str) -> str:
    found = re.search(rf"{name}: ([^,\n]*)", text)
    return found[1].strip() if found else ""


def _computes(kernel: Kernel, attention: str) -> bool:
    """Whether a kernel computes an attention node, or a part of an attention that was split into several nodes."""
    return any(node == attention or node.startswith(f"{attention}.") for node in kernel.nodes)


def _sums_of_products(plan: memoryview | bytes) -> dict[tuple[str, int], list[int]]:
    """Accumulation types of products by node and profile. Merged products are recorded under the name of the first.

    A TensorRT-RTX plan contains the compiled graph as text, with a record for each product. Other plans do not.
    """
    found: dict[tuple[str, int], list[int]] = {}
    record = rb'fully_connected=\{ name="([^"]*)"[^\n]*?"__mye\d+([^"]*?)_alpha"[^\n]*?accumulation_type=(\d+)'
    for match in re.finditer(record, plan):
        name, _, profile = match[2].decode().partition(" [profile ")
        key = name, int(profile.rstrip("]") or 0)
        found.setdefault(key, []).extend([int(match[3])] * (match[1].count(b"+") + 1))
    return found


def _least_summed(
    sums: Mapping[tuple[str, int], Sequence[int]], kernels: Sequence[Kernel], expected: Expected, profiles: int
) -> int:
    """Number of products that are summed in float32, in the profile with the fewest.

    A product of a single row has no record, because the compiler generates a kernel that multiplies and adds in the
    graph's types. Such kernels are counted too.
    """
    counts = []
    for profile in range(profiles):
        here = [kinds for (name, of), kinds in sums.items() if of == profile and name in expected.products]
        written = {
            name
            for kernel in kernels
            if kernel.kind == "kgen" and kernel.profile == profile and "MulSum" in kernel.name and kernel.weight()
            for name in kernel.nodes
            if name in expected.products
        }
        counts.append(sum(list(kinds).count(SUMMED_IN_FLOAT32) for kinds in here) + len(written))
    return min(counts)


def _sums_of_attention(plan: memoryview | bytes) -> tuple[str, ...]:
    """Types that fused attention sums in, from the kernel source in a TensorRT-RTX plan."""
    record = rb"\.initialize\(DATA_TYPE_\w+, DATA_TYPE_\w+, DATA_TYPE_(\w+), "
    return tuple(sorted({match[1].decode() for match in re.finditer(record, plan)}))
