"""The private parts of torch that the library uses, and what to do when torch drops one of them.

They are found in the source, so that none can be used without a line here.
"""

import ast
import collections
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]

TREES = "optree has functions of the same names, which tree.py can import instead"
FOREACH = "call the method of the same name for each tensor of the lists; this is slower only"

# Names of modules, or attributes of what stands before the dot.
PRIVATE = {
    "torch._C._autograd._get_sequence_nr": (
        "find another order of the nodes of a graph; without one, autodiff/hidden_uses.py must "
        "treat every parameter as one with a hidden use, which takes the exact route"
    ),
    "grad_fn._sequence_nr": "see torch._C._autograd._get_sequence_nr",
    "torch._C._functorch.peek_interpreter_stack": (
        "find another test of whether code runs under a torch.func transform: whether "
        "torch.func.debug_unwrap(x) is not x for a tensor x of the transform"
    ),
    "torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter": (
        "count the levels of nested transforms by torch.func.debug_unwrap"
    ),
    "torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters": (
        "treat every transform as one that differentiates, in tracing.is_differentiated"
    ),
    "torch._C._functorch.TransformType.Vmap": (
        "treat every transform as one that differentiates, in tracing.is_differentiated"
    ),
    "torch.autograd.forward_ad._current_level": (
        "count the levels with a wrapper of torch.autograd.forward_ad.dual_level, or take "
        "forward_ad.unpack_dual(x).tangent is not None of the arguments"
    ),
    "torch._C.DisableTorchFunction": (
        "let the modes of optim/watch.py and optim/closure.py take a flag that switches them off"
    ),
    "torch._C._is_any_autocast_enabled": (
        "any(torch.is_autocast_enabled(kind) for kind in ('cpu', 'cuda', ...))"
    ),
    "torch._C._will_engine_execute_node": (
        "return True in autodiff/rules/backward.py: all gradients are then computed, which is "
        "right and slower"
    ),
    "torch._C._nn": (
        "leave it out of the places that are searched for functions that draw; those in "
        "torch.nn.functional call it, and need other interception then"
    ),
    "torch._weight_norm": (
        "drop its line in autodiff/rules/table.py: the parametrization then consists of operations "
        "whose derivatives are right"
    ),
    "torch.nn.modules.batchnorm._BatchNorm": (
        "list nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d and nn.SyncBatchNorm in problems.py"
    ),
    "torch.nn.modules.loss._Loss": (
        "test in losses/__init__.py whether the class is in torch.nn.modules.loss"
    ),
    "torch.ops.aten._unsafe_view": "take output.clone() in autodiff/rules/affine.py: a copy",
    "torch.utils._python_dispatch.TorchDispatchMode": (
        "import it from where torch documents it then (its guide to extending torch)"
    ),
    **{
        f"torch.utils._pytree.{name}": TREES
        for name in (
            "GetAttrKey", "MappingKey", "_broadcast_to_and_flatten", "register_pytree_node",
            "tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_map",
            "tree_map_with_path", "tree_unflatten",
        )
    },
    **{
        f"torch._foreach_{name}": FOREACH
        for name in ("add_", "addcmul_", "lerp", "mul", "mul_", "reciprocal_", "sqrt", "sub_")
    },
    "tensor._version": (
        "compare the values with a copy in autodiff/graph_check.py, at the cost of the copy"
    ),
    "function_node._forward_cls": (
        "read the function's class from the name of its node, in autodiff/graph_check.py"
    ),
    "function_node._input_metadata": (
        "leave out the check of custom functions in autodiff/graph_check.py; a backward that is "
        "a constant then gives wrong products"
    ),
    "tensor._base": (
        "a view's storage is larger than the view, or its untyped_storage().data_ptr() is another "
        "tensor's"
    ),
    "module._parameters": "collect module.named_parameters(recurse=False) in functional_module.py",
    "module._buffers": "collect module.named_buffers(recurse=False) in functional_module.py",
    "module._modules": "collect module.named_children() in functional_module.py",
    "operator._schema": (
        "the name of an operator that writes into an argument ends in _, or its overload in out"
    ),
    "torch.ops.aten._softmax_backward_data": "the line in symbolic_zeros.py can be dropped",
    "torch.ops.aten._adaptive_avg_pool2d_backward": "the line in symbolic_zeros.py can be dropped",
}  # fmt: skip


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


OWNERS = {
    "tensor": torch.ones(1),
    "module": nn.Linear(1, 1),
    "grad_fn": (torch.ones(1, requires_grad=True) * 1).grad_fn,
    "operator": torch.ops.aten.add.Tensor,
    "function_node": _Function.apply(torch.ones(1, requires_grad=True)).grad_fn,
}
# What is used in more than one file, and should have one home; a tensor's version has none.
SEVERAL = {"torch._C._is_any_autocast_enabled", "?._version"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def uses() -> dict[str, set[str]]:
    """The files in which each private name of torch occurs."""
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / "funcprecond").rglob("*.py")
    }
    own = {"_replace"}  # of named tuples
    modules = {"_parameters", "_buffers", "_modules"}  # which the library has names for, too
    for nodes in map(ast.walk, trees.values()):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    found = collections.defaultdict(set)
    for path, source in trees.items():
        for name in names_of(source, own - modules):
            found[name].add(path)
    return found


def names_of(source: ast.Module, own: set[str]) -> set[str]:
    """The private names of torch in one file; ``own`` are the names that the library defines."""
    imported: dict[str, str] = {}
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    imported[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    # A name for a part of torch, such as `_aten = torch.ops.aten`.
    for node in ast.walk(source):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            root, chain = chain_of(node.value)
            if chain and root in imported:
                imported[node.targets[0].id] = ".".join([imported[root], *chain])
    found = {name for name in imported.values() if any(map(is_private, name.split(".")))}
    for node in ast.walk(source):
        root, chain = chain_of(node)
        if not chain:
            continue
        if root in imported:
            name = ".".join([imported[root], *chain])
            if any(map(is_private, name.split("."))):
                found.add(name)
        elif is_private(chain[-1]) and chain[-1] not in own and (root, len(chain)) != ("self", 1):
            found.add(f"?.{chain[-1]}")
    # Overloads of an operator are not names of their own, nor are the parts of a longer name.
    found = {name.removesuffix(".default") for name in found}
    return {a for a in found if not any(b.startswith(f"{a}.") for b in found)}


def chain_of(node: ast.AST) -> tuple[str | None, list[str]]:
    """The name and the attributes of ``name.attribute.attribute``."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else None), chain


def listed(name: str) -> str | None:
    """The line of the table for a name that was found."""
    if not name.startswith("?."):
        return name if name in PRIVATE else None
    return next((x for x in PRIVATE if x.split(".")[0] in OWNERS and x.endswith(name[1:])), None)


def attribute(name: str) -> Any:
    """What a line of the table stands for."""
    first, *rest = name.split(".")
    found = OWNERS.get(first) if first in OWNERS else importlib.import_module(first)
    for number, part in enumerate(rest):
        if not hasattr(found, part) and first not in OWNERS:
            importlib.import_module(".".join([first, *rest[: number + 1]]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", PRIVATE)
def test_torch_still_has_it(name):
    try:
        attribute(name)
    except (AttributeError, ImportError):
        pytest.fail(f"torch {torch.__version__} has no {name} any more. {PRIVATE[name]}.")


def test_every_private_name_in_the_source_has_a_line_and_every_line_a_use():
    found = {name: listed(name) for name in uses()}
    unlisted = {name: sorted(uses()[name]) for name, line in found.items() if line is None}
    assert not unlisted, "add a line to PRIVATE that says what to do when torch drops it"
    assert not PRIVATE.keys() - set(found.values()), "these lines have no use any more"


def test_each_stands_in_one_file():
    functions = {name: sorted(files) for name, files in uses().items() if name[0] != "?"}
    several = {name: files for name, files in functions.items() if len(files) > 1}
    assert several.keys() <= SEVERAL, several


def test_a_use_is_found_however_it_is_written():
    source = """
import torch
import torch.nn.functional as F
from torch._dynamo import config
from torch.autograd import forward_ad as dual
aten = torch.ops.aten
a = torch._C._one + F._two + dual._three + aten._four.default + x.y._five + self._six
"""
    assert names_of(ast.parse(source), {"_seven"}) == {
        "torch._C._one",
        "torch.nn.functional._two",
        "torch._dynamo.config",
        "torch.autograd.forward_ad._three",
        "torch.ops.aten._four",
        "?._five",
    }
