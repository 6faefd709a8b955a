"""What chips can do at most, as their makers say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: of it.
        fp32: FLOP per second of matrix products whose inputs are fp32, without TF32.
        half: FLOP per second of those in fp16 or bf16 that add up in fp32, dense.
        bandwidth: bytes per second between the chip and its memory.
        source: the page or paper of the maker with these figures.
    """

    name: str
    fp32: float
    half: float
    bandwidth: float
    source: str

    def bound(self, flops: float, traffic: float, half: bool) -> float:
        """Return the seconds that it takes at least, by arithmetic and by memory (the roofline model).

        Method: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009.

        Example:
            >>> Chip("toy", fp32=1e12, half=4e12, bandwidth=1e11, source="").bound(2e12, 1e9, half=False)
            2.0
        """
        return max(flops / (self.half if half else self.fp32), traffic / self.bandwidth)


# On a TPU, products of fp32 pass through the units for bf16: by default once, so that both figures are the same.
CHIPS = (
    Chip("T4", 8.1e12, 65e12, 320e9, "NVIDIA T4 datasheet, 2019"),
    Chip("V100 SXM", 15.7e12, 125e12, 900e9, "NVIDIA V100 datasheet, 2020"),
    Chip("A100 SXM 80GB", 19.5e12, 312e12, 2039e9, "NVIDIA A100 datasheet, 2022"),
    Chip("L4", 30.3e12, 121e12, 300e9, "NVIDIA L4 datasheet, 2023, without sparsity"),
    Chip("RTX 4090", 82.6e12, 165.2e12, 1008e9, "NVIDIA Ada GPU architecture, version 2.02, 2023, fp32 accumulate"),
    Chip("H100 SXM", 67e12, 989e12, 3350e9, "NVIDIA H100 datasheet, 2023, without sparsity"),
    Chip("H200 SXM", 67e12, 989e12, 4800e9, "NVIDIA H200 datasheet, 2024, without sparsity"),
    Chip("TPU v4", 275e12, 275e12, 1228e9, "Google Cloud documentation, TPU v4"),
    Chip("TPU v5e", 197e12, 197e12, 819e9, "Google Cloud documentation, TPU v5e"),
    Chip("TPU v5p", 459e12, 459e12, 2765e9, "Google Cloud documentation, TPU v5p"),
    Chip("TPU v6e", 918e12, 918e12, 1640e9, "Google Cloud documentation, TPU v6e"),
)
