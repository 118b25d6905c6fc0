"""The project as a whole: what imports what, what is declared, what is committed."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What each package may import of ours (docs/architecture.md).
MAY_IMPORT = {
    "pallas_kernels": set(),
    "flux_jax": {"pallas_kernels"},
    "convert": {"flux_jax", "pallas_kernels"},
    "ternary": {"convert", "flux_jax", "pallas_kernels"},
}
# The seams against the direction, late: what lies on the disk is read through convert, and what of
# that is packed, through ternary.
SEAMS = {("flux_jax/checkpoint.py", "convert"), ("convert/quantized.py", "ternary")}

PACKAGES = [name for name in MAY_IMPORT if (ROOT / name / "__init__.py").exists()]
SOURCES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
# Imported late, where they are installed: no dependency of ours.
OPTIONAL = {"diffusers", "torch", "jax_triton", "tokamax", "triton"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST) -> set[str]:
    """First parts of the modules imported anywhere under `node`."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            found.add(child.module.partition(".")[0])
    return found


def top_level_imports(path: Path) -> set[str]:
    """As `imports`, leaving out what functions and `if TYPE_CHECKING` import."""
    found = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imports(node)
    return found


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is committed is unknown")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT).parts[0]
    others = imports(tree(path)) & MAY_IMPORT.keys() - {name} - MAY_IMPORT[name]
    relative = path.relative_to(ROOT).as_posix()
    forbidden = {other for other in others if (relative, other) not in SEAMS}
    assert not forbidden, f"{relative} must not import {sorted(forbidden)}"
    early = others & top_level_imports(path)
    assert not early, f"{relative} must import {sorted(early)} inside a function"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# Triton's compiler wants its names when a kernel is defined: these modules are for where it is.
OF_TRITON = sorted((ROOT / "pallas_kernels").glob("triton_*kernel*.py"))


def test_optional_packages_are_imported_late():
    early = {path: top_level_imports(path) & OPTIONAL for path in SOURCES}
    assert {path: names for path, names in early.items() if names} == {
        path: {"triton"} for path in OF_TRITON
    }


@pytest.mark.parametrize(
    "absent", [(), ("triton", "jax_triton")], ids=["as_installed", "without_triton"]
)
def test_imports_are_light(absent):
    """Importing every module loads no PyTorch, and starts no JAX backend.

    Without Triton all can be imported but the kernels written in it, and they say what is missing.
    """
    modules = [module_name(path) for path in SOURCES if path.name != "__main__.py"]
    program = f"""
import importlib, json, sys
for name in {absent!r}:
    sys.modules[name] = None
refused = {{}}
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        refused[name] = error.name.partition(".")[0]
from jax._src import xla_bridge
heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
backend = xla_bridge.backends_are_initialized()
print(json.dumps({{"refused": refused, "heavy": heavy, "backend": backend}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    has_triton = not absent and importlib.util.find_spec("triton") is not None
    refused = {} if has_triton else {module_name(path): "triton" for path in OF_TRITON}
    assert json.loads(done.stdout) == {"refused": refused, "heavy": [], "backend": False}


def test_import_is_quick():
    """Ours adds little to JAX and flax; processor time, which a busy machine does not stretch."""
    program = """
import time, jax, jax.numpy, flax.nnx
start = time.process_time()
import flux_jax
print(time.process_time() - start)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert float(done.stdout) < 3.0


def test_dependencies_are_declared():
    """Every package that ours import is a dependency in pyproject.toml."""

    def normal(name: str) -> str:
        return re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-")

    declared = {normal(line) for line in PYPROJECT["project"]["dependencies"]}
    used = set().union(*(imports(tree(path)) for path in SOURCES))
    used -= set(sys.stdlib_module_names) | MAY_IMPORT.keys() | OPTIONAL | {"__future__"}
    providers = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in used
        if not declared & {normal(provider) for provider in providers.get(name, [name])}
    }
    assert not missing, f"imported, but not in pyproject.toml: {sorted(missing)}"


def test_pins_cover_every_dependency():
    """Each constraints file pins what pyproject.toml names, at a version it admits."""
    project = PYPROJECT["project"]
    wanted = list(project["dependencies"])
    for extra in ("test", "parity", "lint", "notebooks", "docs"):
        wanted += project["optional-dependencies"][extra]
    files = sorted((ROOT / "requirements").glob("constraints-*.txt"))
    assert [path.name for path in files] == ["constraints-py311.txt", "constraints-py312.txt"]
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
        for requirement in wanted:
            name, bound = re.match(r"([\w-]+)(?:\[\w+\])?(?:[>=]=([\d.]+))?", requirement).groups()
            pinned = pins.get(name.lower())
            assert pinned, f"{path.name} does not pin {name}"
            numbers = [tuple(map(int, v.split(".")[:3])) for v in (pinned, bound or "0")]
            assert numbers[0] >= numbers[1], f"{path.name}: {name} {pinned} is older than {bound}"


def undefined_names(path: Path) -> set[str]:
    """Global names that a module's code loads, and neither it nor Python defines."""
    codes = [compile(path.read_text(encoding="utf-8"), path, "exec")]
    loaded: set[str] = set()
    defined = {*dir(builtins), "__annotations__", "__file__"}
    for code in codes:
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                loaded.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", "STORE_NAME"):
                defined.add(step.argval)
    return loaded - defined


def test_every_name_is_defined():
    """The linters cannot tell: to them the shapes in annotations are undefined names, too."""
    found = {path: undefined_names(path) for path in tracked_files() if path.suffix == ".py"}
    assert {str(path.relative_to(ROOT)): names for path, names in found.items() if names} == {}


def test_an_undefined_name_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import os\n\n\ndef f(x: 'shape'):\n    return [y + os + z for y in x]\n")
    assert undefined_names(path) == {"z"}


def test_every_package_is_type_checked():
    assert set(PACKAGES) <= set(PYPROJECT["tool"]["pyright"]["include"])


def test_version_is_consistent():
    import flux_jax

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[([\d.]+)\]", changelog, re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+", flux_jax.__version__)
    assert newest, "CHANGELOG.md names no release"
    assert newest[1] == flux_jax.__version__
    assert PYPROJECT["project"]["dynamic"] == ["version"]


def config_classes() -> list[tuple[Path, ast.ClassDef]]:
    return [
        (path, node)
        for path in SOURCES
        for node in tree(path).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]


def attribute_reads(node: ast.AST) -> set[str]:
    return {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load)
    }


@pytest.mark.parametrize(("path", "config"), config_classes(), ids=lambda value: value.name)
def test_config_fields_are_read(path, config):
    """Every field is read, by a property of the class or where the class is used."""
    fields = {
        item.target.id
        for item in config.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    read = set()
    for item in config.body:
        if isinstance(item, ast.FunctionDef) and item.name != "__post_init__":
            read |= attribute_reads(item)
    for source in SOURCES:
        module = tree(source)
        names = {child.id for child in ast.walk(module) if isinstance(child, ast.Name)}
        if config.name in names and source != path:
            read |= attribute_reads(module)
    assert not fields - read, f"{config.name}: nothing reads {sorted(fields - read)}"


def test_frozen_configs():
    for path, config in config_classes():
        decorators = " ".join(ast.unparse(decorator) for decorator in config.decorator_list)
        assert "frozen=True" in decorators, f"{path.name}: {config.name} is not frozen"
        assert "kw_only=True" in decorators, f"{path.name}: {config.name} is not kw_only"


def test_no_large_or_executable_data_is_committed():
    for path in tracked_files():
        assert path.stat().st_size < 16 * 1024 * 1024, f"{path} is larger than 16 MiB"
        assert path.suffix not in {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}, path


def test_no_path_of_a_machine_is_committed():
    """Home folders and the like belong to one machine; so do package indexes."""
    private = re.compile(
        rb"(?<![\w.:/~-])/(?:home|Users|root|work|mnt|opt)/[\w.-]+|--(?:extra-)?index-url"
    )
    binary = {".gz", ".gif", ".jpg", ".npz", ".png", ".safetensors", ".webp"}
    found = []
    for path in tracked_files():
        if path.suffix in binary or path == Path(__file__):
            continue
        for match in private.finditer(path.read_bytes()):
            found.append(f"{path.relative_to(ROOT)}: {match[0].decode()}")
    assert not found, found


def test_shipped_data_is_packaged():
    """Files that lie in a package beside its modules match the package data of pyproject.toml."""
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    for path in tracked_files():
        name = path.relative_to(ROOT).parts[0]
        if name in PACKAGES and path.suffix != ".py":
            inside = path.relative_to(ROOT / name)
            folders = [pattern.removesuffix("/**/*") for pattern in patterns.get(name, [])]
            assert any(inside.is_relative_to(folder) for folder in folders), (
                f"{path} is in no package-data pattern"
            )
