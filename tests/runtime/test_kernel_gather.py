"""The quantised embedding look-up: reference against naive bits, Triton against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from ctconvert.runtime.kernels.gather import triton
from ctconvert.runtime.kernels.gather.kernel import embedding_gather
from ctconvert.runtime.kernels.gather.reference import embedding_gather_reference
from ctconvert.transforms.packed import row_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 7


def pack_row(codes: list[int], bits: int, packing: str) -> list[int]:
    """Signed words of one row, straight from the definition of the packing."""
    if packing == "dense":
        string = sum(code << (bits * k) for k, code in enumerate(codes))
        count = -(-len(codes) * bits // 32)
        words = [(string >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
    else:
        per = 32 // bits
        words = [
            sum(code << (bits * i) for i, code in enumerate(codes[start : start + per]))
            for start in range(0, len(codes), per)
        ]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def make_table(
    bits: int, hidden: int, groups: int, packing: str, dtype: torch.dtype, zero_point: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(codes, packed, scale, zero point, the dequantised table as compressed-tensors has it)."""
    codes = torch.randint(0, 2**bits, (ROWS, hidden))
    packed = torch.tensor(
        [pack_row(row, bits, packing) for row in codes.tolist()], dtype=torch.int32
    )
    scale = (torch.randn(ROWS, groups) * 0.1).to(dtype)
    zero = torch.randint(0, 2**bits, (ROWS, groups), dtype=torch.uint8) if zero_point else None
    signed = codes - 2 ** (bits - 1)
    shift = torch.zeros(ROWS, groups) if zero is None else zero.float() - 2 ** (bits - 1)
    # compressed_tensors.quantization.lifecycle.forward_helpers._dequantize, in the scale's dtype.
    size = hidden // groups
    value = signed.to(dtype) - shift.to(dtype).repeat_interleave(size, dim=1)
    return codes, packed, scale, zero, value * scale.repeat_interleave(size, dim=1)


@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("zero_point", [False, True])
def test_reference_equals_the_naive_table(
    bits: int, packing: str, groups: int, zero_point: bool
) -> None:
    torch.manual_seed(bits)
    hidden = 69  # ragged in every packing
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        _, packed, scale, zero, table = make_table(bits, hidden, groups, packing, dtype, zero_point)
        assert packed.shape[1] == row_words(hidden, bits, packing)
        ids = torch.tensor([[6, 0, 3], [3, 3, 5]])
        out = embedding_gather(ids, packed, scale, zero, bits=bits, hidden=hidden, packing=packing)
        assert out.dtype == dtype
        assert torch.equal(out, table[ids])


def test_reference_reads_what_compressed_tensors_packs() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    torch.manual_seed(0)
    signed = torch.randint(-16, 16, (ROWS, 96), dtype=torch.int8)
    scale = (torch.rand(ROWS, 3) + 0.1).bfloat16()
    zero = torch.randint(-16, 16, (ROWS, 3), dtype=torch.int8)
    args = QuantizationArgs(num_bits=5, strategy="group", group_size=32, symmetric=False)
    expected = dequantize(signed, scale, zero, args)
    out = embedding_gather(
        torch.arange(ROWS),
        pack_to_int32(signed, 5),
        scale,
        (zero.int() + 16).to(torch.uint8),
        bits=5,
        hidden=96,
    )
    assert torch.equal(out, expected)


#: bits, packing, hidden, groups. Words of whole codes, by the scales they meet: one for the row,
#: for a word, for a code; then codes that are fetched one by one.
TABLES = (
    *itertools.product((2, 4, 8), ("dense",), *(((96, 1), (96, 3), (100, 5), (69, 3)),)),
    *itertools.product((7,), ("padded",), *(((96, 1), (100, 5)),)),
    *itertools.product((3, 5, 6), ("dense", "padded"), *(((100, 5), (69, 3)),)),
    *itertools.product((7,), ("dense",), *(((96, 1), (69, 3)),)),
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bits", "packing", "shape"), TABLES)
@pytest.mark.parametrize("zero_point", [False, True])
def test_triton_equals_the_reference(
    bits: int, packing: str, shape: tuple[int, int], zero_point: bool
) -> None:
    hidden, groups = shape
    torch.manual_seed(hidden + groups)
    _, packed, scale, zero, table = make_table(
        bits, hidden, groups, packing, torch.float16, zero_point
    )
    ids = torch.tensor([[6, 0], [3, 3]], dtype=torch.int32)
    out = triton.gather(
        ids.to(DEVICE),
        packed.to(DEVICE),
        scale.to(DEVICE),
        None if zero is None else zero.to(DEVICE),
        bits=bits,
        hidden=hidden,
        packing=packing,
        block=16 if zero_point == (hidden == 69) else None,  # several programs a row, or one
    )
    assert torch.equal(out.cpu(), table[ids.long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_in_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    _, packed, scale, _, table = make_table(4, 64, 2, "dense", dtype, False)
    ids = torch.arange(ROWS)
    out = triton.gather(
        ids.to(DEVICE), packed.to(DEVICE), scale.to(DEVICE), bits=4, hidden=64
    ).cpu()
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates to bf16
        assert torch.allclose(out, table, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, table)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [4, 5])
def test_ids_outside_the_table(bits: int) -> None:
    torch.manual_seed(2)
    _, packed, scale, _, table = make_table(bits, 64, 2, "dense", torch.float16, False)
    ids = torch.tensor([1, ROWS, 2, -1, 2**40])
    arguments = {"bits": bits, "hidden": 64}
    with pytest.raises(IndexError, match=r"from -1 to 1099511627776.*rows 0 to 6"):
        embedding_gather(ids.to(DEVICE), packed.to(DEVICE), scale.to(DEVICE), **arguments)
    unchecked = embedding_gather(ids, packed, scale, **arguments, check=False)
    kernel = triton.gather(
        ids.to(DEVICE), packed.to(DEVICE), scale.to(DEVICE), **arguments, check=False
    )
    for out in (unchecked, kernel.cpu()):
        assert torch.equal(out[[0, 2]], table[[1, 2]])
        assert out[[1, 3, 4]].isnan().all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_shapes_of_ids(shape: tuple[int, ...]) -> None:
    _, packed, scale, _, table = make_table(4, 64, 1, "dense", torch.float16, False)
    ids = torch.full(shape, 4)
    out = embedding_gather(ids.to(DEVICE), packed.to(DEVICE), scale.to(DEVICE), bits=4, hidden=64)
    assert out.shape == (*shape, 64)
    assert torch.equal(out.cpu(), table[ids])


def test_an_empty_table_has_no_ids() -> None:
    packed, scale = torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 1)
    with pytest.raises(IndexError):
        embedding_gather(torch.tensor([0]), packed, scale, bits=4, hidden=64)
    out = triton.gather(
        torch.tensor([0], device=DEVICE),
        packed.to(DEVICE),
        scale.to(DEVICE),
        bits=4,
        hidden=64,
        check=False,
    )
    assert out.isnan().all()


def test_bad_arguments_are_named() -> None:
    _, packed, scale, zero, _ = make_table(4, 64, 2, "dense", torch.float16, True)
    ids = torch.arange(4)
    good = {
        "ids": ids,
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_zero_point": zero,
        "bits": 4,
        "hidden": 64,
    }
    embedding_gather(**good)
    for change, error, message in (
        ({"ids": ids.float()}, TypeError, "ids must be int64 or int32"),
        ({"ids": torch.arange(8)[::2]}, ValueError, "ids must be contiguous"),
        ({"weight_packed": packed.long()}, TypeError, "weight_packed must be int32"),
        ({"weight_packed": packed[:, :7]}, ValueError, r"weight_packed must have shape \[any, 8\]"),
        ({"hidden": 72}, ValueError, r"weight_packed must have shape \[any, 9\]"),
        ({"weight_scale": scale.double()}, TypeError, "weight_scale must be"),
        ({"weight_scale": scale[:3]}, ValueError, "weight_scale must have shape"),
        ({"weight_scale": scale.new_ones(ROWS, 3)}, ValueError, "do not divide hidden"),
        ({"weight_zero_point": zero.to(torch.int8)}, TypeError, "weight_zero_point must be uint8"),
        ({"weight_zero_point": zero[:, :1]}, ValueError, "weight_zero_point must have shape"),
        ({"bits": 9}, ValueError, "bits must be in 2..8"),
        ({"packing": "loose"}, ValueError, "packing must be"),
        ({"hidden": 0}, ValueError, "hidden must be positive"),
        ({"weight_scale": scale.to("meta")}, ValueError, "weight_scale is on meta"),
    ):
        with pytest.raises(error, match=message):
            embedding_gather(**{**good, **change})


def test_the_custom_op_is_sound() -> None:
    _, packed, scale, zero, table = make_table(3, 64, 2, "dense", torch.float16, True)
    op = torch.ops.ctconvert.embedding_gather.default
    arguments, options = (torch.arange(4), packed, scale, zero), {"bits": 3, "hidden": 64}
    torch.library.opcheck(op, arguments, options)
    fake = op(*(a.to("meta") for a in arguments), **options)
    assert (fake.shape, fake.dtype) == ((4, 64), torch.float16)
    compiled = torch.compile(embedding_gather, backend="aot_eager", fullgraph=True)
    out = compiled(torch.arange(4), packed, scale, zero, bits=3, hidden=64)
    assert torch.equal(out, table[:4])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4])
def test_offsets_past_32_bits(bits: int) -> None:
    hidden = 8192
    words = row_words(hidden, bits, "dense")
    rows = 2**31 // words + 3
    packed = torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int32, device="cuda")
    scale = torch.rand(rows, 1, device="cuda").half()
    ids = torch.tensor([rows - 1, 0, rows - 2], device="cuda")
    expected = embedding_gather_reference(
        ids.cpu() * 0 + torch.arange(3),
        packed[ids].cpu(),
        scale[ids].cpu(),
        bits=bits,
        hidden=hidden,
    )
    many = ids.repeat(2**31 // hidden // 3 + 2)  # the output passes 2**31 elements as well
    out = embedding_gather(many, packed, scale, bits=bits, hidden=hidden)
    assert torch.equal(out[-3:].cpu(), expected)
    assert torch.equal(out[:3].cpu(), expected)


@pytest.mark.gpu
def test_gpu_graph_and_compile() -> None:
    torch.manual_seed(0)
    table = torch.randint(-(2**31), 2**31, (1000, 128), dtype=torch.int32, device="cuda")
    scale = torch.rand(1000, 8, device="cuda").bfloat16()
    ids = torch.randint(0, 1000, (333,), device="cuda")
    arguments = {"bits": 4, "hidden": 1024}

    def expected(ids: torch.Tensor) -> torch.Tensor:
        out = embedding_gather_reference(
            ids.cpu(), table.cpu(), scale.cpu(), **arguments, check=False
        )
        return out.cuda()

    compiled = torch.compile(embedding_gather, fullgraph=True)
    assert torch.equal(compiled(ids, table, scale, **arguments), expected(ids))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = embedding_gather(ids, table, scale, **arguments)
    ids.copy_(torch.randint(0, 1000, (333,)))
    graph.replay()
    assert torch.equal(out, expected(ids))
    ids[7] = 1000
    graph.replay()
    assert torch.equal(out.isnan().any(dim=1).nonzero().flatten(), torch.tensor([7]).cuda())
    with pytest.raises(IndexError):
        embedding_gather(ids, table, scale, **arguments)
