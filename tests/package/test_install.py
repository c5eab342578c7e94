"""The package as others install it: the source archive, the wheel, extras, fresh environments."""

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, sources
from packaging.requirements import Requirement

SITE = sysconfig.get_path("purelib")

CHECK = """
import importlib.util, pathlib, sys, torch, bert_fast, bert_fast.bench
from bert_fast import _C
(kernels,) = importlib.util.find_spec("bert_fast.kernels").submodule_search_locations  # no triton
assert kernels.startswith(sys.argv[1]) and pathlib.Path(kernels, "attention.py").is_file()
assert bert_fast.__file__.startswith(sys.argv[1]), bert_fast.__file__
assert importlib.util.find_spec("kernels") is None
qkv, cu = torch.randn(9, 3, 2, 16), torch.tensor([0, 4, 9]).int()
ours = bert_fast.attention_qkv(qkv, cu, backend="cpu")
torch.testing.assert_close(ours, bert_fast.attention_qkv(qkv, cu, backend="eager"))
print(_C.cpu_isa(), "cuda:", _C.cuda_archs)
"""


def source_archive(copy, out):
    """Builds the source archive from the copy and returns its path."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, out], cwd=copy, stdout=subprocess.DEVNULL, check=True
    )
    (archive,) = out.glob("bert_fast-*.tar.gz")
    return archive


def children_seconds():
    """Processor time: of wall time, what else runs on the machine has a part."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_source_archive_builds_in_isolation_and_installs(tmp_path):
    """The archive holds what git holds and nothing that a build left. A wheel is built from it
    alone, in pip's default isolation, without torch; from clean it takes at most what two cores do
    in 60 s. It is then imported from where pip put it, with only torch from this environment."""
    copy = sources(tmp_path / "copy")
    committed = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    (copy / "bert_fast" / "kernels").symlink_to("../kernels")  # as an editable install leaves it
    for leftover in ("bert_fast/_C.so", "build/ninja/gelu.o", "kernels/__pycache__/gelu.pyc"):
        (copy / leftover).parent.mkdir(parents=True, exist_ok=True)
        (copy / leftover).touch()
    archive = source_archive(copy, tmp_path / "dist")
    with tarfile.open(archive) as opened:
        held = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    written = {"PKG-INFO", "setup.cfg"}  # by setuptools, beside its bert_fast.egg-info
    held = {name for name in held - written if not name.startswith("bert_fast.egg-info/")}
    assert held == committed - {".gitignore", ".ci/run"}
    shutil.rmtree(copy)

    environment = {**os.environ, "BERT_FAST_CUDA": "off"}
    pip = [sys.executable, "-m", "pip", "-q"]
    begin = children_seconds()
    subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", tmp_path, archive], env=environment, check=True
    )
    assert children_seconds() - begin <= 2 * 60
    (wheel,) = tmp_path.glob("bert_fast-*.whl")
    roots = {name.split("/")[0].partition("-")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert roots == {"bert_fast"}  # no csrc, no tests, no kernels beside it
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    assert not (site / "kernels").exists()
    subprocess.run(
        [sys.executable, "-c", CHECK, str(site)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{SITE}"}, check=True,
    )  # fmt: skip


def test_no_extra_moves_torch():
    """An extra that bounded torch, or triton, which a torch for CUDA pins, could replace the user's
    torch. The set-up for development has its versions in constraints.txt instead."""
    tomllib = pytest.importorskip("tomllib", reason="is in Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, lines in project["optional-dependencies"].items():
        for requirement in map(Requirement, lines):
            assert requirement.name not in ("torch", project["name"]), extra
            assert requirement.name != "triton" or not requirement.specifier, extra
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    held = [Requirement(line) for line in lines if not line.startswith("#")]
    torch, *_ = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    (pin,) = next(r for r in held if r.name == "torch").specifier
    assert pin.operator == "=="
    assert pin.version in torch.specifier


@pytest.mark.full
def test_extras_resolve_beside_another_torch(tmp_path):
    """All extras at once, beside a torch that is not the one we develop with: pip keeps it."""
    tomllib = pytest.importorskip("tomllib", reason="is in Python from 3.11 on")
    copy, report = sources(tmp_path / "copy"), tmp_path / "report.json"
    project = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ",".join(project["optional-dependencies"])
    (tmp_path / "theirs.txt").write_text("torch==2.12.0\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "-q", "install", "--dry-run", "--ignore-installed",
         "--report", report, "-c", tmp_path / "theirs.txt", f"{copy}[{extras}]"],
        check=True, env={**os.environ, "BERT_FAST_CUDA": "off"},
    )  # fmt: skip
    chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {metadata["name"].lower(): metadata["version"] for metadata in chosen}
    assert versions["torch"].partition("+")[0] == "2.12.0"
    assert {"transformers", "onnxruntime", "sacrebleu"} <= set(versions)


@pytest.mark.full
def test_fresh_environment(tmp_path):
    """A new venv and nothing but pip install: the README's promise. (For one GPU: what is tested
    with is built for all.)"""
    copy, venv = sources(tmp_path / "copy"), tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "-q", "install"]
    pip += ["-c", copy / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    one = {"BERT_FAST_CUDA_ARCHS": "90a"}
    subprocess.run([*pip, copy], env=os.environ | one, check=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [venv / "bin" / "python", "-c", CHECK, str(venv)], cwd=tmp_path, env=clean, check=True
    )
    subprocess.run([venv / "bin" / "bert-fast", "env"], cwd=tmp_path, env=clean, check=True)


@pytest.mark.full
def test_other_pythons(tmp_path):
    """The wheel builds and its extension imports, without torch, on every other Python here."""
    copy, found = sources(tmp_path / "copy"), []
    ours = "{}.{}".format(*sys.version_info)
    versions = {"3.10", "3.11", "3.12", "3.13", "3.14"} - {ours}
    pyenv = Path.home() / ".pyenv" / "versions"
    for version in versions:
        candidates = sorted(pyenv.glob(f"{version}.*/bin/python")) + [
            Path(p) for p in [shutil.which(f"python{version}")] if p
        ]
        if not candidates:
            continue
        found.append(version)
        out = tmp_path / version
        environment = {**os.environ, "BERT_FAST_CUDA": "off"}
        environment.pop("PYTHONPATH", None)
        pip = [candidates[0], "-m", "pip", "-q"]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", out, copy], env=environment, check=True)
        (wheel,) = out.glob("*.whl")
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, out / "site"], check=True)
        load = (
            "import importlib.util as u, glob; (path,) = glob.glob('bert_fast/_C*.so'); "
            "spec = u.spec_from_file_location('_C', path); m = u.module_from_spec(spec); "
            "spec.loader.exec_module(m); print(m.cpu_isa())"
        )
        subprocess.run([candidates[0], "-c", load], cwd=out / "site", env=environment, check=True)
    assert found, f"none of {versions} is here"
