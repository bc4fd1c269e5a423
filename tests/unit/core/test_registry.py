"""Classes found by standing in a folder."""

import sys

import pytest

from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target


def test_what_is_found():
    assert list(discover(Scheme)) == [
        "fp8_block", "fp8_dynamic", "fp8_static", "fp8_tensor", "mxfp4", "mxfp4_flatquant", "mxfp4_fp8",
        "mxfp4a16", "mxfp8", "nvfp4", "nvfp4a16", "w4a16", "w4a4_dynamic", "w4a4_flatquant",
        "w4a4_hadamard", "w4a8", "w8a16", "w8a8_dynamic", "w8a8_mix", "w8a8_static",
    ]  # fmt: skip
    assert list(discover(Target)) == ["ascend", "compressed-tensors", "fp8", "gptq", "modelopt"]
    assert all(cls.name == name for base in (Scheme, Target) for name, cls in discover(base).items())
    assert discover(Scheme) is discover(Scheme)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `rooms` with a base class; returns a function that puts another module in it."""
    name = f"rooms_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "base.py").write_text("class Base:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(module, text):
        (folder / f"{module}.py").write_text(f"from {name}.base import Base\n{text}")

    yield name, add
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def found(name):
    base = __import__(f"{name}.base", fromlist=["Base"]).Base
    return discover(base)


def test_a_file_is_enough(package):
    name, add = package
    add("b", "class B(Base):\n    name = 'second'\n")
    add("a", "class Abstract(Base):\n    pass\nclass A(Abstract):\n    name = 'first'\n")
    classes = found(name)
    assert list(classes) == ["first", "second"]
    assert classes["first"].__name__ == "A"  # grandchildren count, what has no name does not


def test_inherited_names_do_not_count(package):
    name, add = package
    add("a", "class A(Base):\n    name = 'first'\nclass Helper(A):\n    pass\n")
    assert [cls.__name__ for cls in found(name).values()] == ["A"]


def test_two_of_one_name_are_a_bug(package):
    name, add = package
    add("a", "class A(Base):\n    name = 'same'\n")
    add("b", "class B(Base):\n    name = 'same'\n")
    with pytest.raises(AssertionError, match="two classes are named `same`"):
        found(name)
