"""The public names: nothing else leaks, and ``help`` of each is complete."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import types

import pytest

import funcprecond as fp

PACKAGES = (
    "curvature",
    "estimators",
    "linalg",
    "losses",
    "operators",
    "optim",
    "representation",
    "solver",
)


def public():
    """Every public object that is not a package, by the shortest name that a user writes."""
    found = {f"fp.{name}": getattr(fp, name) for name in fp.__all__}
    for package in (*PACKAGES, "tree", "plots"):
        module = getattr(fp, package)
        found |= {f"fp.{package}.{name}": getattr(module, name) for name in module.__all__}
    seen, kept = set(), {}
    for name, value in found.items():
        # `fp.tree` hands on torch's own functions for trees, with torch's docstrings.
        if isinstance(value, types.ModuleType) or str(value.__module__).startswith("torch"):
            continue
        if id(value) not in seen:
            seen.add(id(value))
            kept[name] = value
    return kept


PUBLIC = public()
FUNCTIONS = [n for n, x in PUBLIC.items() if inspect.isfunction(x)]
CLASSES = [n for n, x in PUBLIC.items() if inspect.isclass(x)]


def documented(text: str, section: str) -> set[str]:
    """The names that a section of a docstring explains; several may share an explanation."""
    lines = text.partition(f"\n{section}:\n")[2].split("\n")
    names = set()
    for line in lines:
        if line and not line.startswith(" "):
            break
        if entry := re.match(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*):(?: |$)", line):
            names |= {name.strip(" *") for name in entry[1].split(",")}
    return names


def test_dir_shows_the_public_names_and_nothing_else():
    assert dir(fp) == sorted(fp.__all__)
    assert len(set(fp.__all__)) == len(fp.__all__)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_of_a_package_is_there(name):
    package = getattr(fp, name)
    assert sorted(package.__all__) == sorted(set(package.__all__))
    assert all(hasattr(package, x) for x in package.__all__)


def test_no_function_hides_a_module_of_its_name():
    packages = ["funcprecond", *(f"funcprecond.{x}" for x in PACKAGES)]
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            value = getattr(package, name)
            if not isinstance(value, types.ModuleType):
                spec = importlib.util.find_spec(f"{package.__name__}.{name}")
                assert spec is None, f"{package.__name__}.{name} is a function and a module"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_of_a_function_is_complete(name):
    function = PUBLIC[name]
    text = inspect.getdoc(function)
    parameters = [p for p in inspect.signature(function).parameters if not p.startswith("_")]
    missing = set(parameters) - documented(text, "Args")
    assert not missing, f"{name} does not explain {sorted(missing)}"
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert "\nReturns:\n" in text, f"{name} does not say what it returns"
    assert ">>> " in text, f"{name} has no example"


@pytest.mark.parametrize("name", CLASSES)
def test_the_docstring_of_a_class_is_complete(name):
    cls = PUBLIC[name]
    text = inspect.getdoc(cls)
    assert text, f"{name} has no docstring"
    if dataclasses.is_dataclass(cls):
        fields = {f.name for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}
        missing = fields - documented(text, "Attributes") - documented(text, "Args")
        assert not missing, f"{name} does not explain {sorted(missing)}"


def test_importing_brings_in_none_of_the_optional_packages():
    code = (
        "import sys, funcprecond; "
        "print([m for m in ('sklearn', 'matplotlib', 'rich', 'torch._dynamo', 'torchvision') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
