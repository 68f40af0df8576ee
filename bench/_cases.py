"""What the loss is measured on: MiniLM v1 and v2 as the papers use them, and their inputs.

B batch, R relation heads, N tokens, d dimension of a relation head (d_T teacher, d_S student). Each side is a view of
(B, N, R·d), as a model's projections give it: re-splitting into relation heads copies nothing there, so the inputs are
split already.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

GPU_LENGTHS = (128, 512, 2048, 8192)
GPU_TOKENS = 16384  # in a batch, whatever its length
TWO_LENGTHS = (512, 2048)  # of a quick run, and of dtypes beside bf16
TWO_CPU_LENGTHS = (128, 512)
# name: {N: B}; small enough for all of it to take less than two minutes on two cores
CPU_SIZES = {"v1-384": {128: 8, 512: 2, 1024: 1}, "v1-384-padded": {512: 2}, "v2-48": {128: 4, 512: 1}}
CPU_TOKENS = 1024  # for lengths of one's own


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of one objective."""

    name: str
    relations: tuple[str, ...]
    batch: int
    heads: int
    n: int
    d_t: int
    d_s: int
    dtype: str = "bf16"
    padded: bool = False  # lengths spread evenly over 1..N
    causal: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not self.padded:
            return [self.n] * self.batch
        return [max(1, round((i + 1) * self.n / self.batch)) for i in range(self.batch)]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Allowed (row, key) pairs of one relation head, over the batch."""
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)

    @property
    def sides(self) -> list[tuple[int, int]]:
        """Of each relation the places of its two sides in (q, k, v)."""
        return [("qkv".index(name[0]), "qkv".index(name[1])) for name in self.relations]

    def __str__(self) -> str:
        sizes = f"B={self.batch} N={self.n} {self.heads} heads, d {self.d_t}/{self.d_s}, {self.dtype}"
        return f"{self.name}  {'+'.join(self.relations)}  {sizes}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """An objective between two models; its cases differ in length."""

    relations: tuple[str, ...]
    heads: int
    width_t: int
    width_s: int
    lengths: tuple[int, ...] = GPU_LENGTHS
    batch: int | None = None  # None: as many sequences as make GPU_TOKENS
    padded: bool = False
    causal: bool = False


V1, V2 = ("qk", "vv"), ("qq", "kk", "vv")
FAMILIES = {
    "v1-384": Family(relations=V1, heads=12, width_t=768, width_s=384),
    "v1-768": Family(relations=V1, heads=12, width_t=768, width_s=768),
    "v2-48": Family(relations=V2, heads=48, width_t=768, width_s=384),
    "v2-64": Family(relations=V2, heads=64, width_t=1024, width_s=384),  # teachers of BERT-large's size
    "v1-384-padded": Family(relations=V1, heads=12, width_t=768, width_s=384, lengths=(512, 2048), padded=True),
    "v1-384-causal": Family(relations=V1, heads=12, width_t=768, width_s=384, lengths=(512, 2048), causal=True),
    # SST-2 sentences: short, so that launches count as much as kernels
    "v1-sst2": Family(relations=V1, heads=12, width_t=768, width_s=768, lengths=(128,), batch=32),
}
OTHER_DTYPES = (("v1-384", "fp16"), ("v1-384", "fp32"))  # that a GPU's full run measures beside bf16


def select_cases(
    cuda: bool,
    names: Sequence[str] = (),
    lengths: Sequence[int] = (),
    batch: int | None = None,
    heads: int | None = None,
    dtype: str | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases to measure: all of the device's, or what was asked for. `heads` splits the same widths otherwise.

    Raises `ValueError` where `heads` does not divide both widths.
    """
    default = "bf16" if cuda else "fp32"
    chosen = [(name, dtype or default, quick) for name in names or _names(cuda, quick)]
    if cuda and not (names or dtype or quick):
        chosen += [(name, other, True) for name, other in OTHER_DTYPES]
    cases = []
    for name, case_dtype, two_lengths in chosen:
        family = FAMILIES[name]
        relation_heads = heads or family.heads
        if family.width_t % relation_heads or family.width_s % relation_heads:
            raise ValueError(
                f"--heads {relation_heads} does not divide the widths {family.width_t} and {family.width_s} of {name}"
            )
        sizes = _sizes(name, cuda, two_lengths)
        tokens = GPU_TOKENS if cuda else CPU_TOKENS
        for n in lengths or sizes:
            cases.append(
                Case(
                    name=name,
                    relations=family.relations,
                    batch=batch or sizes.get(n) or max(1, tokens // n),
                    heads=relation_heads,
                    n=n,
                    d_t=family.width_t // relation_heads,
                    d_s=family.width_s // relation_heads,
                    dtype=case_dtype,
                    padded=family.padded,
                    causal=family.causal,
                )
            )
    return cases


def _names(cuda: bool, quick: bool) -> Sequence[str]:
    if quick:
        return ("v1-384", "v2-48") if cuda else ("v1-384",)
    return list(FAMILIES if cuda else CPU_SIZES)


def _sizes(name: str, cuda: bool, two_lengths: bool) -> dict[int, int]:
    """{N: B} of a family's own sizes."""
    family = FAMILIES[name]
    gpu_sizes = {n: family.batch or GPU_TOKENS // n for n in family.lengths}
    sizes = gpu_sizes if cuda else CPU_SIZES.get(name, {512: 2})
    chosen = TWO_LENGTHS if cuda else TWO_CPU_LENGTHS
    return {n: batch for n, batch in sizes.items() if n in chosen or not two_lengths}


class Inputs(NamedTuple):
    teacher: Triple  # (B, R, N, d_T) each
    student: Triple  # (B, R, N, d_S) each, leaves that require gradients
    mask: Tensor | None  # (B, N) bool where the case is padded


SELF_SCORE = 8.0


def make_inputs(case: Case, device: str) -> Inputs:
    """Random normal q, k, v, the same for the same case.

    Unit variance up to d = 64, less beyond: a token's score with itself is √d times the variance, and where that is far
    above all others the rows of self relations are one-hot, their loss near 0, and no relative error means anything.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(str(case).encode()))

    def triple(dim: int) -> Triple:
        shape = (case.batch, case.n, case.heads, dim)
        size = min(1.0, (SELF_SCORE / dim**0.5) ** 0.5)
        normal = (torch.randn(shape, generator=generator, device=device) * size for _ in "qkv")
        q, k, v = (x.to(DTYPES[case.dtype]).transpose(1, 2) for x in normal)
        return q, k, v

    teacher = triple(case.d_t)
    mask = None
    if case.padded:
        lengths = torch.tensor(case.lengths, device=device)
        mask = torch.arange(case.n, device=device) < lengths.unsqueeze(1)
    return Inputs(teacher, as_leaves(triple(case.d_s)), mask)


def as_leaves(student: Triple, dtype: torch.dtype | None = None) -> Triple:
    """The same values, in `dtype` if given, as leaves that require gradients; strides are kept."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in student)
    return q, k, v
