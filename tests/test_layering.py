"""Imports point downwards: a library file needs only the files below it, and no script is imported."""

import ast
import re
import sys

import pytest

from models import ROOT

ROWS = [row.split() for row in (  # a file may import project files of the rows above its own
    "support.files support.command_line support.intervals",
    "unet vae clip_text diffusion perfusion",
    "concept attention_maps support.weight_names support.plots",
    "weights_loader support.clip_image support.pictures diffusers_hook",
    "support.fast_cpu support.study support.accumulation support.training_files tiny.world",
    "support.base_model support.page tiny.make_examples",
    "covariance export tiny.judge")]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
         for folder in ("", "support", "tiny") for path in (ROOT / folder).glob("*.py")}
LEVEL = dict.fromkeys(FILES, len(ROWS)) | {name: level for level, row in enumerate(ROWS) for name in row}
PACKAGES = {  # what these may import besides torch, the standard library and the project
    "": "perfusion attention_maps unet vae diffusion support.command_line support.accumulation",
    "safetensors": "concept support.clip_image support.files",
    "tokenizers": "clip_text", "numpy": "support.fast_cpu"}


def imports(source):
    """Names of all modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


IMPORTS = {name: imports(source) for name, source in FILES.items()}


def violations(imported=IMPORTS):
    """Imports that do not point downwards, or point into tiny/ from outside, as "importing -> imported".

    The files in tiny/ import one another by their bare names.
    """
    found = set()
    for name, modules in imported.items():
        beside = {f"tiny.{module}" for module in modules} if name.startswith("tiny.") else set()
        for other in (modules | beside) & set(FILES) - {name}:
            if LEVEL[other] >= LEVEL[name] or other.startswith("tiny.") > name.startswith("tiny."):
                found.add(f"{name} -> {other}")
    return found


def test_a_file_imports_only_files_below_it_and_scripts_are_never_imported():
    assert set(LEVEL) == set(FILES) and not violations()


@pytest.mark.parametrize("name, line", [
    ("unet", "import perfusion"), ("vae", "def f():\n    import weights_loader as w"),
    ("tiny.world", "from judge import Judge"), ("train", "from tiny import world")])
def test_every_wrong_import_is_found(name, line):
    assert len(violations(IMPORTS | {name: IMPORTS[name] | imports(line)})) == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_the_core_needs_only_torch_and_its_one_declared_package(package):
    for name in PACKAGES[package].split():
        foreign = {module.split(".")[0] for module in IMPORTS[name]} - set(sys.stdlib_module_names)
        assert foreign - set(FILES) <= {"support", "torch", package}, name


def test_the_readme_names_every_file_once_and_links_each_equation_to_its_line():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| group | files |"):readme.index("| apart |")]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(name for name in FILES if "." not in name)
    lines, links = FILES["perfusion"].splitlines(), re.findall(r"\[`(\w+)`\]\(perfusion\.py#L(\d+)\)", readme)
    assert len(links) == 5 and all(lines[int(n) - 1].startswith(f"def {name}(") for name, n in links)
