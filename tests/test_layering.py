"""Imports point downwards: a library file needs only the files below it, and no script is imported."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [row.split() for row in (  # a file may import project files of the rows above its own
    "shell processes",
    "unet vae clip_text diffusion perfusion",
    "weight_formats attention_maps clip_image",
    "weights_loader pictures diffusers_hook",
    "covariance fast_cpu explorer export",
    "tiny.world",
    "tiny.make_examples",
    "tiny.judge")]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}  # all other files are scripts
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
         for folder in (ROOT, ROOT / "tiny") for path in folder.glob("*.py")}
PACKAGES = {  # what a file may import besides torch, the standard library and the project
    "perfusion": {"safetensors"}, "attention_maps": set(), "unet": set(), "vae": set(), "diffusion": set(),
    "clip_text": {"tokenizers"}, "clip_image": {"safetensors"}, "fast_cpu": {"numpy"},
    "shell": {"safetensors"}, "processes": set()}


@functools.cache
def imports(source):
    """Names of all modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            found.add(node.args[0].value)
    return found


def violations():
    """Imports that do not point downwards, or point into tiny/ from outside, as "importing -> imported"."""
    level, found = {name: LEVEL.get(name, len(ROWS)) for name in FILES}, []
    for name in FILES:
        modules = imports(FILES[name])
        if name.startswith("tiny."):        # those in tiny/ import one another by their bare names
            modules = modules | {f"tiny.{module}" for module in modules}
        found += [f"{name} -> {other}" for other in sorted(modules & set(FILES) - {name})
                  if level[other] >= level[name] or other.startswith("tiny.") > name.startswith("tiny.")]
    return found


def test_a_file_imports_only_files_below_it_and_scripts_are_never_imported():
    assert set(LEVEL) <= set(FILES)
    assert violations() == []


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_the_core_needs_only_torch_and_its_one_declared_package(name):
    foreign = {module.split(".")[0] for module in imports(FILES[name])} - set(sys.stdlib_module_names)
    assert foreign - set(FILES) <= {"torch"} | PACKAGES[name]


def test_the_readme_names_every_file_once_and_links_each_equation_to_its_line():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| group | files |"):readme.index("| apart |")]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(name for name in FILES if "." not in name)
    lines, links = FILES["perfusion"].splitlines(), re.findall(r"\[`(\w+)`\]\(perfusion\.py#L(\d+)\)", readme)
    assert len(links) == 5 and all(lines[int(n) - 1].startswith(f"def {name}(") for name, n in links)
