"""linear on a GPU against float64 products: cuBLAS, the matrix-vector kernel and the tiles."""

import pytest
import torch
from pagoda_kernels.linear.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

VECTORS = (
    Case("vector", 1, 1024, 96),
    Case("vector_bias_odd_rows", 1, 520, 33, bias=True),
    Case("vector_strided_ends", 1, 2056, 7, strided=True),
    Case("vector_one_output", 1, 512, 1),
)
_ROWS = {
    (6144, 4096): (1, 2, 16, 17),
    (4096, 4096): (1, 2, 16, 17, 33, 64, 65, 256),
    (28672, 4096): (1, 16, 32, 64),
    (4096, 14336): (1, 16, 64, 130, 256),
    (128256, 4096): (1, 64, 128),
}
LLAMA = tuple(
    pytest.param(Case(f"llama_{rows}_{outputs}_{inputs}", rows, inputs, outputs), marks=pytest.mark.native)
    for (outputs, inputs), all_rows in _ROWS.items()
    for rows in all_rows
)


# In the interpreter the vectors below are enough: the rest is cuBLAS, or a program for each of many outputs.
SHARED = tuple(pytest.param(case, marks=pytest.mark.native) if case.name == "one_row" else case for case in CASES)


@pytest.mark.parametrize("case", [*SHARED, *VECTORS, *LLAMA], ids=lambda case: case.name)
def test_linear_agrees_with_float64(case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str) -> None:
    from pagoda_kernels.linear import kernel

    inputs = case.make(dtype, device)
    packed = kernel.pack_linear(inputs.weight)
    with PoisonedEmpty():
        actual = kernel.linear(inputs.x, packed, inputs.bias)
    compare(actual, product(inputs.x, inputs.weight, inputs.bias).to(dtype), *bounds)
    assert actual.is_contiguous()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def test_many_rows_are_added_to_a_residual(dtype: torch.dtype, bounds: tuple[float, float], device: str) -> None:
    from pagoda_kernels.linear import kernel

    for rows, adds in ((1, False), (256, False), (257, True)):
        case = Case("rows", rows, 96, 80)
        inputs = case.make(dtype, device)
        residual = torch.randn(rows, 80, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        expected = residual.double() + product(inputs.x, inputs.weight, None) if adds else residual.double()
        assert kernel.linear_onto(inputs.x, kernel.pack_linear(inputs.weight), residual) == adds
        compare(residual, expected.to(dtype), *bounds)


def test_a_vector_of_any_width(device: str) -> None:
    """The kernel itself, for widths that `linear` leaves to cuBLAS."""
    from pagoda_kernels.linear import kernel, vector

    for case in (Case("narrow", 1, 77, 13, bias=True), Case("one_by_one", 1, 1, 1)):
        inputs = case.make(device=device)
        actual = vector.matrix_vector(inputs.x, kernel.pack_linear(inputs.weight), inputs.bias)
        compare(actual, torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias), 1e-5)


TILED = (
    Case("ends_everywhere", 9, 200, 72, bias=True),
    Case("several_row_tiles", 37, 96, 64),
    Case("strided", 16, 256, 136, bias=True, strided=True),
)


@pytest.mark.parametrize("splits", [1, 3], ids=["whole", "split"])
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_tiles_of_any_size(
    case: Case, splits: int, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    """The kernel itself, for matrices that `linear` leaves to cuBLAS, and with splits."""
    from pagoda_kernels.linear.tiles import Tile, can_tile, tiled_product

    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the tensor cores round float32 to 10 bits")
    inputs = case.make(dtype, device)
    assert can_tile(inputs.x)
    tile = Tile(64, 16, 64, stages=3, splits=splits)
    arrivals = torch.zeros(tile.count(case.out_features, case.rows), dtype=torch.int32, device=device)
    for _ in range(2):
        with PoisonedEmpty():
            actual = tiled_product(inputs.x, inputs.weight, inputs.bias, tile, dtype, arrivals=arrivals)
        compare(actual, product(inputs.x, inputs.weight, inputs.bias).to(dtype), *bounds)
        assert not arrivals.any()


def test_splits_need_their_counters(device: str) -> None:
    from pagoda_kernels.linear.tiles import Tile, tiled_product

    x, weight = torch.zeros(4, 64, device=device), torch.zeros(128, 64, device=device)
    with pytest.raises(ValueError, match="hold 2 counters for 2 splits"):
        tiled_product(x, weight, None, Tile(64, 16, 32, stages=2, splits=2), x.dtype)


@pytest.mark.native
@pytest.mark.parametrize("rows", [1, 2, 16, 32, 64])
def test_each_product_waits_for_the_one_before(rows: int) -> None:
    """A chain of products that start early, in a CUDA graph, has the bits of one that is waited for at each link."""
    from pagoda_kernels.linear import kernel

    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(12)]
    packed = [kernel.pack_linear(weight) for weight in weights]
    x = expected = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    for weight in packed:
        expected = kernel.linear(expected, weight)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = x
        for weight in packed:
            actual = kernel.linear(actual, weight)
    for _ in range(20):
        actual.fill_(torch.nan)
        graph.replay()
        assert torch.equal(actual, expected)
