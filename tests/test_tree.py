import pickle

import pytest
import torch
from hypothesis import given
from torch import Tensor

import funcprecond as fp
from funcprecond import tree
from funcprecond.checkpoint import from_dict, to_dict
from funcprecond.linalg import treemath
from funcprecond.tracing import multi_tensor
from tests import strategies
from tests.equality import assert_close, assert_same


@tree.state
class Pair:
    first: Tensor
    second: dict
    label: str = tree.static(default="x")


def pair(label="x"):
    return Pair(torch.ones(2), {"a": torch.zeros(3), "b": (torch.ones(1), torch.zeros(()))}, label)


# ----------------------------------------------------------------------------------------- states
def test_a_state_is_immutable():
    with pytest.raises(AttributeError):
        pair().first = torch.zeros(2)


def test_a_state_is_a_tree_of_its_fields_without_the_static_ones():
    assert len(tree.leaves(pair())) == 4
    doubled = tree.map(lambda x: 2 * x, pair("label"))
    assert doubled.first.tolist() == [2, 2]
    assert doubled.label == "label"


def test_a_static_field_is_part_of_the_structure():
    with pytest.raises(ValueError, match="(?i)mismatch"):
        tree.map(lambda x, y: x + y, pair("one"), pair("two"))


def test_a_state_goes_through_vmap_and_grad():
    batched = tree.map(lambda x: torch.stack([x, 2 * x]), pair())
    mapped = torch.vmap(lambda s: Pair(s.first.sum(), s.second, s.label))(batched)
    assert mapped.first.tolist() == [2, 4]
    slope = torch.func.grad(lambda s: (s.first**3).sum())(Pair(torch.ones(2), {}))
    assert slope.first.tolist() == [3, 3]


def test_a_state_may_hold_anything_while_a_transform_rebuilds_it():
    assert tree.map(lambda x: None, pair()).first is None


# ---------------------------------------------------------------------------------------- vectors
@given(strategies.vectors(), strategies.seeds)
def test_vector_operations_agree_with_the_flat_vector(x, seed):
    y = {k: torch.cos(v + seed) for k, v in x.items()}
    a, b = treemath.ravel(x), treemath.ravel(y)
    assert_close(treemath.ravel(treemath.add(x, y)), a + b, rtol=1e-14)
    assert_close(treemath.ravel(treemath.add(x, y, -0.5)), a - 0.5 * b, rtol=1e-14)
    assert_close(treemath.ravel(treemath.add(x, y, torch.tensor(2.0))), a + 2 * b, rtol=1e-14)
    assert_close(treemath.ravel(treemath.sub(x, y)), a - b, rtol=1e-14)
    assert_close(treemath.ravel(treemath.mul(x, 3.0)), 3 * a, rtol=1e-14)
    assert_close(treemath.dot(x, y), a @ b, atol=1e-12)
    assert_close(treemath.norm(x), a.norm(), rtol=1e-12)
    assert_same(treemath.unravel(a, x), x)


def test_operations_follow_the_keys_and_not_their_order(randn):
    x = {"a": randn(2), "b": randn(3)}
    y = dict(reversed({"a": randn(2), "b": randn(3)}.items()))
    assert_same(treemath.sub(x, y), {"a": x["a"] - y["a"], "b": x["b"] - y["b"]})
    assert_same(treemath.add(x, y), {"a": x["a"] + y["a"], "b": x["b"] + y["b"]})
    assert_close(treemath.dot(x, y), x["a"] @ y["a"] + x["b"] @ y["b"])


def test_inner_products_of_half_precision_are_taken_in_float32():
    x = {"w": torch.full((4096,), 0.1, dtype=torch.bfloat16)}
    assert treemath.dot(x, x).dtype == torch.float32
    assert treemath.dot(x, x).item() == pytest.approx(4096 * x["w"][0].item() ** 2, rel=1e-4)


def test_empty_vectors_are_vectors():
    assert treemath.sub({}, {}) == {}
    assert treemath.dot({}, {}) == 0
    assert treemath.ravel({}).shape == (0,)


def test_operations_have_batching_rules(randn):
    x, y = {"a": randn(3, 2)}, {"a": randn(3, 2)}
    for op in (treemath.add, treemath.sub, lambda x, y: treemath.mul(x, 2.0), treemath.dot):
        assert_close(
            torch.vmap(op)(x, y),
            torch.utils._pytree.tree_map(
                lambda *rows: torch.stack(rows),
                *[op({"a": x["a"][i]}, {"a": y["a"][i]}) for i in range(3)],
            ),
        )


# -------------------------------------------------------------------------------------- flat format
def test_paths_are_readable_and_dotted():
    assert list(to_dict({"s": pair(), "t": (torch.ones(1),)})) == [
        "s.first",
        "s.second.a",
        "s.second.b.0",
        "s.second.b.1",
        "t.0",
    ]


def test_to_dict_and_back_is_the_identity():
    original = {"s": pair(), "list": [torch.arange(3)], "empty": ()}
    assert_same(from_dict(original, to_dict(original)), original)


def test_a_leaf_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"'a.b' is a float; only tensors"):
        to_dict({"a": {"b": 1.0}})


def test_two_leaves_of_one_path_are_an_error():
    with pytest.raises(ValueError, match=r"path 'a.b'"):
        to_dict({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


def test_missing_and_unknown_names_are_listed():
    with pytest.raises(KeyError, match=r"missing \['b'\], unknown \['c'\]"):
        from_dict(
            {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "c": torch.ones(1)}
        )


@pytest.mark.parametrize("saved", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_another_shape_or_dtype_is_an_error_that_names_both(saved):
    with pytest.raises(
        ValueError, match=r"'a' was saved with .* but shape \(2,\) and dtype torch.float32"
    ):
        from_dict({"a": torch.ones(2)}, {"a": saved})


def test_an_empty_dict_in_like_takes_whatever_lies_under_its_path():
    like = {"state": {"left": {}, "weight": torch.zeros(())}}
    flat = {"state.left.fc.weight": torch.ones(2), "state.weight": torch.ones(())}
    loaded = from_dict(like, flat)
    assert_same(loaded, {"state": {"left": {"fc.weight": torch.ones(2)}, "weight": torch.ones(())}})


def test_save_and_load_are_exact_for_every_dtype(tmp_path, randn):
    original = {
        str(dtype): randn(2, 3, dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    } | {"count": torch.tensor(7), "flag": torch.tensor(True), "nan": torch.tensor(float("nan"))}
    fp.save(tmp_path / "x", original)
    assert_same(fp.load(tmp_path / "x", original), original)


def test_a_generator_is_saved_and_goes_on(tmp_path, generator):
    fp.save(tmp_path / "x", {"generator": generator.get_state()})
    expected = torch.rand(3, generator=generator)
    other = torch.Generator()
    other.set_state(fp.load(tmp_path / "x", {"generator": other.get_state()})["generator"])
    assert torch.equal(torch.rand(3, generator=other), expected)


def test_a_view_is_saved_without_the_storage_it_looks_into(tmp_path):
    fp.save(tmp_path / "x", {"view": torch.zeros(1_000_000)[:2]})
    assert (tmp_path / "x").stat().st_size < 10_000


def test_a_failed_save_leaves_the_old_file(tmp_path):
    fp.save(tmp_path / "x", {"a": torch.ones(1)})
    with pytest.raises(TypeError):
        fp.save(tmp_path / "x", {"a": torch.ones(1), "b": "text"})
    assert fp.load(tmp_path / "x", {"a": torch.zeros(1)})["a"] == 1


def test_a_file_is_plain_tensors_that_torch_loads_with_weights_only(tmp_path):
    fp.save(tmp_path / "x", pair())
    assert set(torch.load(tmp_path / "x", weights_only=True)) == set(to_dict(pair()))


def test_states_are_pickled_by_name():
    assert_same(pickle.loads(pickle.dumps(pair())), pair())


# --------------------------------------------------------------------------- many tensors at once
def test_many_at_once_is_not_for_transforms_nor_where_autograd_records():
    x = torch.ones(2)
    assert multi_tensor([x], [])
    assert not multi_tensor([], [])
    leaf = x.clone().requires_grad_()
    assert not multi_tensor([x], [leaf])
    with torch.no_grad():
        assert multi_tensor([x], [leaf])
    seen = []
    torch.vmap(lambda y: seen.append(multi_tensor([y])) or y)(x)
    torch.func.grad(lambda y: seen.append(multi_tensor([x])) or y.sum())(x)
    assert seen == [False, False]


def test_writing_over_keeps_the_tensors_and_takes_the_values():
    old, new = pair(), tree.map(lambda x: x + 1, pair())
    expected = tree.map(torch.clone, new)
    result = tree.write_over(old, new)
    assert_same((result, new), (expected, expected))
    # All but the 0-d one, which the compiler would lose.
    kept = [a is b for a, b in zip(tree.leaves(result), tree.leaves(old), strict=True)]
    assert kept == [True, True, True, False]


def test_writing_over_may_permute():
    a, b = torch.arange(3.0), torch.ones(3)
    tree.write_over((a, b), (b, a.flip(0)))
    assert (a.tolist(), b.tolist()) == ([1, 1, 1], [2, 1, 0])


@pytest.mark.parametrize(
    "new", [{"a": torch.ones(1)}, {"a": torch.ones(2).double()}, {"b": torch.ones(2)}]
)
def test_nothing_is_written_over_what_is_not_alike(new):
    old = {"a": torch.zeros(2)}
    assert tree.write_over(old, new) is new
    assert old["a"].tolist() == [0, 0]
