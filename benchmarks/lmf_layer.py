"""Time and saved memory of the fusion layer against the official formulation and the explicit tensor product.

    python -m benchmarks.lmf_layer

Three ways to compute functions of the same family from the same latents (B, d_m), weights in float32, gradients with
respect to latents and weights:

- ours      LowRankMultimodalFusion
- official  Liu et al. (2018) as published: factors (R, d_m + 1, O); [1; z_m] by concatenation, a broadcast matmul per
            modality, the product over modalities, a weighted sum over ranks
- tensor    Zadeh et al. (2017): the outer product of all [1; z_m], (B, prod_m (d_m + 1)), then one linear map. Left out
            where that product or the map's weight alone would pass 256 MB.

Time is wall-clock of one forward + backward, the median over calls; the sides take turns call by call in one process,
so that whatever else the machine does hits them alike. The ratio is the median over `--repeats` blocks of the ratio of
their medians, with the lowest and highest block as spread. Saved memory counts every distinct storage that autograd
packs for the backward pass (torch.autograd.graph.saved_tensors_hooks), at its full size, without those of the latents
and of the parameters, which are alive anyway. The floor: FLOPs of the M projections, forward and both gradients
(6 B R O sum d_m), in time at the matmul rate measured here, and the bytes of the latents and weights, each once.

On a machine that other processes share, set OMP_WAIT_POLICY=PASSIVE: a thread that spins for a descheduled one turns
microseconds into milliseconds.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmf_module import LowRankMultimodalFusion

BATCH = 128
SHAPES = ((64, 64), (64, 64, 64), (2048, 768))
RANKS = (4, 16)
OUTPUTS = (1, 64)
TENSOR_LIMIT = 256 * 2**20  # bytes


class OfficialFusion(nn.Module):
    """Liu et al.'s formulation, written from the paper: its factor layout, its concatenation, its order of products."""

    def __init__(self, input_dims: Sequence[int], output_dim: int, rank: int) -> None:
        super().__init__()
        self.factors = nn.ParameterList(torch.randn(rank, d + 1, output_dim) / (d + 1) ** 0.5 for d in input_dims)
        self.weights = nn.Parameter(torch.full((1, rank), rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(1, output_dim))

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        product = None
        for z, factor in zip(latents, self.factors, strict=True):
            extended = torch.cat([z.new_ones(len(z), 1), z], dim=1)  # (B, d + 1)
            projected = torch.matmul(extended, factor)  # (R, B, O)
            product = projected if product is None else product * projected
        return torch.matmul(self.weights, product.permute(1, 0, 2)).squeeze(1) + self.bias  # (B, O)


class TensorFusion(nn.Module):
    """Zadeh et al.'s explicit outer product with a full weight tensor."""

    def __init__(self, input_dims: Sequence[int], output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(d + 1 for d in input_dims), output_dim)

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        product = latents[0].new_ones(len(latents[0]), 1)
        for z in latents:
            extended = torch.cat([z.new_ones(len(z), 1), z], dim=1)
            product = (product[:, :, None] * extended[:, None, :]).flatten(1)  # (B, prod (d + 1) so far)
        return self.linear(product)


@dataclass(frozen=True)
class Timing:
    """One shape, rank and output width. Times in microseconds, memory in bytes."""

    times: dict[str, list[float]]
    saved: dict[str, int]
    flops: int
    bytes_touched: int


def forward_backward(layer: nn.Module, latents: Sequence[Tensor]) -> None:
    for tensor in (*latents, *layer.parameters()):
        tensor.grad = None
    output = layer(latents)
    output.backward(torch.ones_like(output))


def saved_bytes(layer: nn.Module, latents: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps, beyond the latents and the parameters themselves."""
    alive = {tensor.untyped_storage().data_ptr() for tensor in (*latents, *layer.parameters(), *layer.buffers())}
    packed = []  # holding the tensors keeps their addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(latents)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    return sum(size for address, size in storages.items() if address not in alive)


def microseconds(call: Callable[[], None]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def measure(input_dims: Sequence[int], output_dim: int, rank: int, repeats: int, seconds: float) -> Timing:
    torch.manual_seed(0)
    latents = [torch.randn(BATCH, d, requires_grad=True) for d in input_dims]
    sides: dict[str, nn.Module] = {
        "ours": LowRankMultimodalFusion(input_dims, output_dim, rank),
        "official": OfficialFusion(input_dims, output_dim, rank),
    }
    entries = math.prod(d + 1 for d in input_dims)
    if 4 * entries * max(BATCH, output_dim) <= TENSOR_LIMIT:
        sides["tensor"] = TensorFusion(input_dims, output_dim)
    # a call of the tensor product may take a second and flushes the caches: it has its own, shorter turns
    turns = [["ours", "official"], *([name] for name in sides if name == "tensor")]

    times: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(repeats + 1):
        for names in turns:
            blocks: dict[str, list[float]] = {name: [] for name in names}
            deadline = time.perf_counter() + seconds / repeats
            while time.perf_counter() < deadline or len(blocks[names[0]]) < 2:
                for name in names:
                    blocks[name].append(microseconds(lambda name=name: forward_backward(sides[name], latents)))
            if block:  # the first one warms up
                for name in names:
                    times[name].append(statistics.median(blocks[name]))
    projections = BATCH * rank * output_dim * sum(input_dims)
    touched = 4 * (BATCH * sum(input_dims) + rank * output_dim * sum(d + 1 for d in input_dims))
    return Timing(times, {name: saved_bytes(layer, latents) for name, layer in sides.items()}, 6 * projections, touched)


def matmul_rate() -> float:
    """FLOP/s of a matmul large enough to be limited by arithmetic."""
    a = torch.randn(1024, 1024)
    fastest = min(microseconds(lambda: torch.mm(a, a)) for _ in range(20))
    return 2 * 1024**3 / (fastest * 1e-6)


HEADER = (
    f"{'':>23} | {'forward + backward, us':^45} | {'saved for backward, kB':^35} | {'floor':^22}\n"
    f"{'dims':>12} {'R':>4} {'O':>4}  | {'ours':>7} {'official':>9} {'ratio':>6} {'spread':>9} {'tensor':>10} "
    f"| {'ours':>8} {'official':>8} {'ratio':>6} {'tensor':>10} | {'MFLOP':>6} {'us':>6} {'kB':>8}"
)


def table_line(
    input_dims: Sequence[int], output_dim: int, rank: int, row: Timing, rate: float
) -> tuple[str, float, float]:
    """The line, the ratio of the times and the ratio of the saved memory."""
    middle = {name: statistics.median(values) for name, values in row.times.items()}
    ratios = [a / b for a, b in zip(row.times["ours"], row.times["official"], strict=True)]
    ratio, memory = statistics.median(ratios), row.saved["ours"] / row.saved["official"]
    line = (
        f"{'x'.join(map(str, input_dims)):>12} {rank:>4} {output_dim:>4}  "
        f"| {middle['ours']:7.0f} {middle['official']:9.0f} {ratio:6.2f} {min(ratios):4.2f}-{max(ratios):4.2f} "
        f"{format(middle['tensor'], '10.0f') if 'tensor' in middle else '-':>10} "
        f"| {row.saved['ours'] / 1024:8.0f} {row.saved['official'] / 1024:8.0f} {memory:6.3f} "
        f"{format(row.saved['tensor'] / 1024, '10.0f') if 'tensor' in middle else '-':>10} "
        f"| {row.flops / 1e6:6.1f} {row.flops / rate * 1e6:6.0f} {row.bytes_touched / 1024:8.0f}"
    )
    return line, ratio, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="blocks of calls; the spread is over them")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each line and turn")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = matmul_rate()

    print(
        f"torch {torch.__version__}, {platform.machine()} CPU, {args.threads} threads, float32, batch {BATCH}, ", end=""
    )
    print(f"medians of {args.repeats} blocks; matmul at {rate / 1e9:.0f} GFLOP/s\n{HEADER}")
    slowest, largest = 0.0, 0.0
    for input_dims in SHAPES:
        for output_dim in OUTPUTS:
            for rank in RANKS:
                row = measure(input_dims, output_dim, rank, args.repeats, args.seconds)
                line, ratio, memory = table_line(input_dims, output_dim, rank, row, rate)
                print(line, flush=True)
                slowest = max(slowest, ratio)
                largest = max(largest, memory) if input_dims == (2048, 768) else largest
    print(
        f"worst ratio of the times {slowest:.2f} (to reach .85), of the memory at 2048x768 {largest:.3f} (to reach .15)"
    )


if __name__ == "__main__":
    main()
