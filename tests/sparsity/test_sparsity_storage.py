"""Properties of CSR, bitmap and 2:4: nothing is lost, nothing made dense, every byte counted."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from autograder.strategies import arrange
from fewer.sparsity import (
    break_even_sparsity,
    csr_rows,
    decode_2_4,
    decode_bitmap,
    decode_csr,
    encode_2_4,
    encode_bitmap,
    encode_csr,
    matvec_2_4,
    matvec_bitmap,
    matvec_csr,
    n_m_mask,
    pack_bits,
    storage_bits,
    stored_bytes,
    unpack_bits,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int16, torch.uint8)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def sparse_matrices(draw, columns=st.integers(0, 21), dtypes=DTYPES):
    """Of every sparsity, with whole rows empty or full, negative zeros, in any layout."""
    shape = (draw(st.integers(0, 6)), draw(columns))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    w = torch.randint(1, 9, shape, generator=generator) * (
        torch.randint(0, 2, shape, generator=generator) * 2 - 1
    )
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    w = w.to(draw(st.sampled_from(dtypes)))
    w[torch.rand(shape, generator=generator) >= density] = 0.0
    w[torch.rand(shape[0], generator=generator) < 0.2] = 0.0
    w[(w == 0) & (torch.rand(shape, generator=generator) < 0.3)] = -0.0
    return arrange(w, draw(st.sampled_from(["contiguous", "transposed", "strided"])))


@st.composite
def matrices_2_4(draw):
    w = draw(sparse_matrices(st.integers(0, 6).map(lambda groups: 4 * groups)))
    return w * n_m_mask(w.abs(), 2, 4)


def whole_x(w, dtype=torch.float32):
    """Whole numbers, so that sums are exact in every order."""
    return (torch.arange(w.shape[1]) % 7 - 3).to(dtype)


FORMATS = {
    "csr": (encode_csr, lambda parts, n: decode_csr(*parts, n), matvec_csr),
    "bitmap": (encode_bitmap, lambda parts, n: decode_bitmap(*parts, n), matvec_bitmap),
    "2:4": (encode_2_4, lambda parts, n: decode_2_4(*parts), matvec_2_4),
}
ANY_FORMAT = st.sampled_from(["csr", "bitmap"]).flatmap(
    lambda name: st.tuples(st.just(name), sparse_matrices())
) | st.tuples(st.just("2:4"), matrices_2_4())


# --- what holds for all three


@given(ANY_FORMAT)
def test_decoding_gives_the_matrix_back(drawn):
    name, w = drawn
    encode, decode, _ = FORMATS[name]
    before = w.clone()
    decoded = decode(encode(w), w.shape[1])
    assert decoded.dtype == w.dtype
    assert torch.equal(decoded, w)
    assert torch.equal(w, before)


@given(ANY_FORMAT)
def test_matvec_equals_the_dense_product(drawn):
    name, w = drawn
    encode, _, matvec = FORMATS[name]
    y = matvec(*encode(w), whole_x(w))
    assert y.shape == (w.shape[0],)
    assert y.dtype == (torch.float64 if w.dtype == torch.float64 else torch.float32)
    assert torch.equal(y.double(), w.double() @ whole_x(w, torch.float64))


@given(ANY_FORMAT, st.sampled_from(DTYPES))
def test_matvec_computes_in_the_wider_of_float32_and_the_two_types(drawn, dtype):
    name, w = drawn
    encode, _, matvec = FORMATS[name]
    y = matvec(*encode(w), whole_x(w, dtype))
    assert y.dtype == (torch.float64 if torch.float64 in (w.dtype, dtype) else torch.float32)


@given(ANY_FORMAT)
def test_storage_bits_count_what_is_stored(drawn):
    name, w = drawn
    assume(w.numel())
    value_bits = 8 * w.element_size()
    nonzeros = int(w.count_nonzero())
    parts = FORMATS[name][0](w)
    assert storage_bits(name, tuple(w.shape), nonzeros, value_bits) == 8 * stored_bytes(*parts)
    assert storage_bits("dense", tuple(w.shape), nonzeros, value_bits) == 8 * stored_bytes(w)


class LargestFloating(TorchDispatchMode):
    """Watches every operator: the elements of the largest floating tensor that one returned."""

    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        returned = operator(*args, **(kwargs or {}))
        for x in returned if isinstance(returned, tuple | list) else [returned]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.numel())
        return returned


@pytest.mark.parametrize("name", FORMATS)
def test_matvec_makes_no_dense_matrix(name):
    encode, decode, matvec = FORMATS[name]
    w = torch.ones(32, 64) * n_m_mask(torch.ones(32, 64), 1, 4)
    parts, x = encode(w), torch.ones(64)
    with LargestFloating() as watched:
        matvec(*parts, x)
    assert watched.elements <= w.numel() // 2
    with LargestFloating() as watched:
        decode(parts, 64)
    assert watched.elements == w.numel()


@pytest.mark.parametrize("name", FORMATS)
def test_float16_is_not_summed_in_float16(name):
    encode, _, matvec = FORMATS[name]
    w = torch.tensor([[1.0, 1.0, 0.0, 0.0] * 2048]).half()
    assert matvec(*encode(w), torch.ones(8192).half()).item() == 4096
    tenth = torch.full((1, 4), 0.1).half() * n_m_mask(torch.ones(1, 4), 2, 4)
    y = matvec(*encode(tenth), torch.full((4,), 0.1).half())
    assert y.item() == pytest.approx(2 * 0.0999755859375**2, rel=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_with_a_gradient_is_stored_without(name):
    encode, decode, _ = FORMATS[name]
    w = torch.tensor([[0.0, 2.0, 0.0, 0.0]], requires_grad=True)
    parts = encode(w)
    assert not any(part.requires_grad for part in parts)
    assert torch.equal(decode(parts, 4), w)


@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_is_stored_and_not_hidden(name):
    encode, decode, _ = FORMATS[name]
    w = torch.tensor([[0.0, math.nan, math.inf, 0.0]])
    assert torch.equal(decode(encode(w), 4), w) is False
    assert torch.allclose(decode(encode(w), 4), w, equal_nan=True)


# --- bits in bytes


@given(st.sampled_from([1, 2, 4, 8]), st.data())
def test_a_packed_row_is_one_little_endian_number(bits, data):
    lead, n = data.draw(st.lists(st.integers(1, 3), max_size=2)), data.draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    codes = torch.randint(0, 2**bits, (*lead, n), generator=generator)
    packed = pack_bits(codes.bool() if bits == 1 else codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, -(-n * bits // 8))
    octet_rows = packed.reshape(-1, packed.shape[-1]).tolist()
    for row, octets in zip(codes.reshape(-1, n).tolist(), octet_rows, strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert bytes(octets) == number.to_bytes(len(octets), "little")
    assert torch.equal(unpack_bits(packed, bits, n).long(), codes)


# --- CSR


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@given(sparse_matrices(dtypes=(torch.float32, torch.float64)), st.sampled_from(INDEX_DTYPES))
def test_csr_is_that_of_torch_sparse(w, index_dtype):
    values, columns, row_pointers = encode_csr(w, torch.iinfo(index_dtype).bits)
    peer = w.contiguous().to_sparse_csr()
    assert torch.equal(values, peer.values())
    assert torch.equal(columns.long(), peer.col_indices())
    assert torch.equal(row_pointers.long(), peer.crow_indices())
    assert columns.dtype == index_dtype
    assert row_pointers.dtype == torch.int32
    if w.numel():
        y = matvec_csr(values, columns, row_pointers, whole_x(w, w.dtype))
        assert torch.equal(y, peer @ whole_x(w, w.dtype))


@given(st.lists(st.integers(0, 4), max_size=6))
def test_every_row_is_named_as_often_as_it_has_values(counts):
    pointers = torch.tensor([0, *counts]).cumsum(0)
    expected = [row for row, count in enumerate(counts) for _ in range(count)]
    assert csr_rows(pointers, sum(counts)).tolist() == expected


def test_a_column_beyond_the_index_type_is_refused_and_the_last_one_is_not():
    w = torch.zeros(1, 257)
    w[0, 255] = 3
    assert torch.equal(decode_csr(*encode_csr(w[:, :256], index_bits=8), 256), w[:, :256])
    with pytest.raises(ValueError, match="index_bits must number 257 columns"):
        encode_csr(w, index_bits=8)


# --- bitmap


@given(sparse_matrices())
def test_bit_c_of_a_row_says_whether_weight_c_is_there(w):
    values, bitmap = encode_bitmap(w)
    assert bitmap.shape == (w.shape[0], -(-w.shape[1] // 8))
    for row, octets in zip(w.tolist(), bitmap.tolist(), strict=True):
        number = int.from_bytes(bytes(octets), "little")
        assert [number >> c & 1 for c in range(8 * len(octets))] == [
            int(c < len(row) and row[c] != 0) for c in range(8 * len(octets))
        ]
    assert values.tolist() == [v for row in w.tolist() for v in row if v]


# --- 2:4


@given(matrices_2_4())
def test_half_of_the_values_are_stored_in_rising_places(w):
    values, indices = encode_2_4(w)
    rows, columns = w.shape
    assert values.shape == (rows, columns // 2)
    assert indices.shape == (rows, -(-columns // 8))
    places = unpack_bits(indices, 2, columns // 2).unflatten(-1, (columns // 4, 2)).long()
    assert (places[..., 0] < places[..., 1]).all()
    groups = w.unflatten(-1, (columns // 4, 4))
    assert torch.equal(groups.gather(-1, places).flatten(-2), values)


@given(matrices_2_4())
def test_2_4_with_two_kept_of_four_is_as_large_as_a_bitmap(w):
    assume(w.numel())
    w = torch.ones_like(w) * n_m_mask(w.abs(), 2, 4)
    assert stored_bytes(*encode_2_4(w)) == stored_bytes(*encode_bitmap(w))


def test_three_of_four_are_refused_with_their_place():
    w = torch.zeros(3, 12)
    w[1, 4:7] = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"got \[1.0, 2.0, 3.0, 0.0\] in row 1 from column 4"):
        encode_2_4(w)
    w[1, 5] = -0.0
    assert torch.equal(decode_2_4(*encode_2_4(w)), w)


# --- what pays


@given(
    st.sampled_from(["csr", "bitmap"]),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([(torch.float16, 16), (torch.float32, 32)]),
    st.sampled_from([32, 16, 8]),
)
def test_a_format_is_smaller_than_dense_exactly_above_its_break_even(
    name, rows, columns, values, index_bits
):
    dtype, value_bits = values
    even = break_even_sparsity(name, (rows, columns), value_bits, index_bits)
    for nonzeros in {0, 1, rows * columns // 2, rows * columns} | (
        set() if even == math.inf else {round((1 - even) * rows * columns) + d for d in (-1, 0, 1)}
    ):
        if 0 <= nonzeros <= rows * columns:
            w = torch.zeros(rows * columns, dtype=dtype)
            w[:nonzeros] = 1
            w = w.reshape(rows, columns)
            parts = encode_csr(w, index_bits) if name == "csr" else encode_bitmap(w)
            sparsity = 1 - nonzeros / w.numel()
            if abs(sparsity - even) > 1e-9:
                assert (stored_bytes(*parts) < stored_bytes(w)) == (sparsity > even)
            else:
                assert stored_bytes(*parts) == stored_bytes(w)


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([(torch.float16, 16), (torch.float32, 32)]),
)
def test_2_4_pays_from_one_half(rows, groups, values):
    dtype, value_bits = values
    w = torch.ones(rows, 4 * groups, dtype=dtype) * n_m_mask(torch.ones(rows, 4 * groups), 2, 4)
    assert stored_bytes(*encode_2_4(w)) < stored_bytes(w)
    assert break_even_sparsity("2:4", tuple(w.shape), value_bits) == 0.5


@pytest.mark.parametrize("value_bits", [4, 8, 16, 32])
@pytest.mark.parametrize("index_bits", [16, 32])
def test_large_matrices_break_even_where_the_textbook_says(value_bits, index_bits):
    shape = (2**14, 2**14)
    csr = break_even_sparsity("csr", shape, value_bits, index_bits)
    assert csr == pytest.approx(index_bits / (value_bits + index_bits), abs=1e-3)
    assert break_even_sparsity("bitmap", shape, value_bits) == pytest.approx(1 / value_bits)


def test_what_cannot_pay_says_so():
    assert break_even_sparsity("csr", (100, 1)) == math.inf  # 32 bits of pointers for 16 of weights
    assert break_even_sparsity("bitmap", (64, 64), value_bits=1) == math.inf
    assert break_even_sparsity("2:4", (64, 64), value_bits=2) == math.inf
    assert break_even_sparsity("2:4", (64, 64), value_bits=3) == 0.5


# --- what is refused

CSR = encode_csr(torch.tensor([[0.0, 5.0, 6.0], [7.0, 0.0, 0.0]]))
BITMAP = encode_bitmap(torch.tensor([[0.0, 5.0, 6.0], [7.0, 0.0, 0.0]]))
HALF = encode_2_4(torch.tensor([[0.0, 5.0, 6.0, 0.0], [7.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_csr(torch.ones(2, 2), 4), "index_bits must be 8, 16 or 32, got 4"),
        (lambda: encode_csr(torch.ones(3)), r"w must have two dimensions, got shape \(3,\)"),
        (lambda: encode_bitmap(torch.ones(3)), "w must have two dimensions"),
        (lambda: encode_2_4(torch.ones(3)), "w must have two dimensions"),
        (lambda: encode_2_4(torch.zeros(2, 6)), "columns of w must be a multiple of 4, got 6"),
        (lambda: decode_csr(*CSR, 2), "columns must lie between 0 and 1, got 0 to 2"),
        (lambda: decode_csr(CSR[0], CSR[1] - 1, CSR[2], 3), "between 0 and 2, got -1 to 1"),
        (lambda: decode_csr(CSR[0], CSR[1][:2], CSR[2], 3), r"columns must have shape \(3,\)"),
        (
            lambda: csr_rows(torch.tensor([0, 2, 1, 3]), 3),
            "row_pointers must rise from 0 .* 3, got",
        ),
        (lambda: csr_rows(torch.tensor([1, 3]), 3), "row_pointers must rise from 0"),
        (lambda: csr_rows(torch.tensor([0, 2]), 3), "row_pointers must rise from 0"),
        (lambda: csr_rows(torch.tensor([]), 0), "row_pointers must rise from 0"),
        (lambda: matvec_csr(*CSR, torch.ones(2)), "columns must lie between 0 and 1"),
        (lambda: matvec_csr(*CSR, torch.ones(3, 1)), "x must have one dimension"),
        (lambda: decode_bitmap(*BITMAP, 9), "packed must have 2 bytes a row for 9 codes of 1 bits"),
        (
            lambda: matvec_bitmap(BITMAP[0][:2], BITMAP[1], torch.ones(3)),
            r"values must have shape \(3,\)",
        ),
        (lambda: decode_2_4(HALF[0][:1], HALF[1]), "values must have 2 rows"),
        (lambda: decode_2_4(HALF[0][:, :1], HALF[1]), "an even number of columns"),
        (lambda: matvec_2_4(*HALF, torch.ones(5)), r"x must have shape \(4,\), got \(5,\)"),
        (lambda: pack_bits(torch.tensor([4]), 2), "codes must lie between 0 and 3, got 4 to 4"),
        (lambda: pack_bits(torch.tensor([-1]), 2), "codes must lie between 0 and 3, got -1"),
        (lambda: pack_bits(torch.tensor([1]), 3), "bits must be 1, 2, 4 or 8, got 3"),
        (lambda: unpack_bits(BITMAP[1], 3, 2), "bits must be 1, 2, 4 or 8, got 3"),
        (lambda: storage_bits("coo", (2, 2), 0), "storage must be 'dense', 'csr', .*, got 'coo'"),
        (lambda: storage_bits("csr", (2, 2), 5), "nonzeros must be between 0 and 4, got 5"),
        (lambda: storage_bits("csr", (2, 300), 5, 16, 8), "index_bits must be at least 9, got 8"),
        (lambda: break_even_sparsity("2:4", (4, 6)), "multiple of 4 in its columns for 2:4, got 6"),
        (lambda: break_even_sparsity("csr", (0, 6)), "shape must be at least 1, got 0"),
        (lambda: break_even_sparsity("csr", (4, 6), 0), "value_bits must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_csr(torch.ones(2, 4).int()), "w must be a floating-point tensor, got"),
        (lambda: encode_bitmap([[1.0]]), "w must be a torch.Tensor, got list"),
        (lambda: encode_2_4(torch.ones(2, 4).int()), "w must be a floating-point tensor"),
        (lambda: matvec_csr(*CSR, torch.ones(3).long()), "x must be a floating-point tensor"),
        (
            lambda: matvec_bitmap(BITMAP[0], BITMAP[1].long(), torch.ones(3)),
            "packed must be a uint8",
        ),
        (lambda: pack_bits(torch.ones(2), 1), "codes must be a bool or integer tensor, got"),
        (lambda: pack_bits([1, 0], 1), "codes must be a torch.Tensor, got list"),
        (lambda: unpack_bits([1, 0], 1, 16), "packed must be a uint8 tensor, got list"),
        (lambda: decode_csr(CSR[0], [1, 2, 0], CSR[2], 3), "columns must be a torch.Tensor"),
        (lambda: csr_rows([0, 1], 1), "row_pointers must be a torch.Tensor, got list"),
        (lambda: storage_bits("csr", 4, 0), "shape must be a pair .rows, columns., got 4"),
    ],
)
def test_wrong_types_are_refused_by_name(call, message):
    with pytest.raises(TypeError, match=message):
        call()
