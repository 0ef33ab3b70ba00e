"""A package's functions may bear the name of the module that they live in, as in optax. Then the
package's attribute is the function, and a module is imported by its dotted path only.
"""

import ast
import importlib
import pathlib
import pkgutil
import types

import pytest

import mdm_jax

ROOT = pathlib.Path(mdm_jax.__file__).parents[1]
PACKAGES = [f"mdm_jax.{found.name}" for found in pkgutil.iter_modules(mdm_jax.__path__)]
PACKAGES = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__path__")]
SUBMODULES = {
    name: {found.name for found in pkgutil.iter_modules(importlib.import_module(name).__path__)}
    for name in PACKAGES
}


def exported(package):
    """Names that ``__init__.py`` gives out as ``x as x``."""
    tree = ast.parse(pathlib.Path(importlib.import_module(package).__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname for node in imports for alias in node.names}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_what_the_package_gives(package):
    """In particular a function is not hidden by the module of its name, in whatever order modules
    are imported."""
    module, names = importlib.import_module(package), exported(package)
    for submodule in SUBMODULES[package]:
        importlib.import_module(f"{package}.{submodule}")
    for name in names & SUBMODULES[package]:
        found = getattr(module, name)
        alone = (
            f"from {package} import {name} as {name}" in pathlib.Path(module.__file__).read_text()
        )
        assert isinstance(found, types.ModuleType) == alone, (package, name)


def test_nobody_takes_a_function_for_its_module():
    """No ``from package import name`` that is then used as a module, where name is a function."""
    shadowed = {
        (package, name)
        for package in PACKAGES
        for name in exported(package) & SUBMODULES[package]
        if not isinstance(getattr(importlib.import_module(package), name), types.ModuleType)
    }
    assert ("mdm_jax.evaluation", "decompose") in shadowed
    wrong = []
    for path in (*ROOT.glob("tests/*.py"), *ROOT.rglob("experiments/**/*.py")):
        tree = ast.parse(path.read_text())
        local = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            value = getattr(node, "value", None)
            if isinstance(node, ast.Attribute) and isinstance(value, ast.Name):
                wrong += [(path.name, value.id)] * (local.get(value.id) in shadowed)
    assert not wrong
