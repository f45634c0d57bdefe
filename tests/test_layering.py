"""The layering holds: library files can be read alone, and scripts are never imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NETWORKS = {"unet", "clip_text", "vae", "diffusion"}
LIBRARY = {  # file -> the project files that it may know
    "perfusion": set(),
    "convolution": set(),
    "unet": {"convolution"},
    "clip_text": set(),
    "clip_image": set(),
    "vae": {"convolution"},
    "diffusion": set(),
    "files": set(),
    "weight_formats": NETWORKS,
    "weights_loader": NETWORKS | {"weight_formats", "files"},
    "covariance": NETWORKS | {"perfusion", "weights_loader"},
    "attention_maps": NETWORKS | {"perfusion"},
    "image_files": set(),
    "drawing": NETWORKS | {"perfusion"},
}
PACKAGES = {  # file -> what it may import besides torch and the standard library
    "perfusion": {"safetensors"},
    "convolution": {"numpy"},
    "unet": set(),
    "vae": set(),
    "diffusion": set(),
    "clip_text": {"tokenizers"},
}
PROJECT = {path.stem for path in ROOT.glob("*.py")}


def imports(path):
    """Names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("name", sorted(set(LIBRARY) & PROJECT))
def test_a_library_file_knows_no_other_file_than_it_must(name):
    path = ROOT / f"{name}.py"
    assert roots(path) & (PROJECT | {"tiny", "tests"}) <= LIBRARY[name]


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_the_core_needs_only_torch_and_its_one_declared_package(name):
    foreign = roots(ROOT / f"{name}.py") - set(sys.stdlib_module_names) - PROJECT
    assert foreign <= {"torch"} | PACKAGES[name]


def test_scripts_are_never_imported():
    scripts = PROJECT - set(LIBRARY)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tiny/*.py")]:
        assert not roots(path) & scripts, path.name
        assert not imports(path) & {"tiny.pretrain", "tiny.judge"}, path.name
