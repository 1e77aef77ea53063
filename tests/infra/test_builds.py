"""llama.cpp as it is built for other processors, each proven by a real child on an imitated one. At night."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.setup.llama_cpp import Builder
from infra.setup.stages import Stages
from steps.runtime.processor import this_processor
from tests.flows.command import ROOT
from tests.infra.test_setup import V2, V3, V4, processor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of llama-cpp-python, with the tools that build it."""
    version = next(
        line.partition("==")[2]
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line.startswith("llama_cpp_python==")
    )
    scratch = tmp_path_factory.mktemp("source")
    builder = Builder(Path(sys.executable), version, this_processor(), scratch / "wheels")
    with Stages(scratch / "logs").stage("fetch") as log:
        return builder.fetch(scratch, log)


def built(source: Path, names: Sequence[str] | None, flags: str, *, safest: bool = False) -> Path:
    """Build llama.cpp for a processor, or exactly the named variants; return the folder of its libraries."""
    scratch = source.parent
    builder = Builder(Path(sys.executable), "0", processor(flags), scratch / "wheels")
    with Stages(scratch / "logs").stage("build") as log:
        if names is None:
            wheel = builder.build(source, log, safest=safest)
            target = scratch / wheel.parent.name
            shutil.unpack_archive(wheel, target, "zip")
            return target / "llama_cpp" / "lib"
        builder.compile(source, names, log)
        target = scratch / ("-".join(names) or "native")
        shutil.copytree(source / "llama_cpp" / "lib", target)
        return target


def proven(folder: Path, *prefix: str) -> tuple[int, str]:
    """Prove llama.cpp with other libraries in a child; return its exit code and the variant that computed."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    command = [*prefix, sys.executable, "-m", "steps.runtime", "llama_cpp", str(answer)]
    code = subprocess.run(command, env=environment, capture_output=True, cwd=ROOT).returncode
    return code, answer.read_text() if answer.exists() else ""


@pytest.mark.recipes
@pytest.mark.timeout(1200)
@pytest.mark.skipif(this_processor().architecture != "x86_64", reason="imitates x86 processors")
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user, which imitates other processors")
def test_what_is_built_for_other_processors_runs_on_them(source: Path) -> None:
    """Without AVX512, with AVX2 only, and generic, each proven on this processor and on an imitated one."""
    qemu = str(shutil.which("qemu-x86_64"))
    for flags, model, variant in ((V3, "Haswell", "haswell"), (V2, "Nehalem", "sse42"), ("", "qemu64", "x64")):
        folder = built(source, None, flags)
        assert proven(folder)[0] == 0
        assert proven(folder, qemu, "-cpu", model) == (0, f'{{"variant": "{variant}"}}')


@pytest.mark.recipes
@pytest.mark.timeout(1200)
@pytest.mark.skipif(this_processor().architecture != "x86_64", reason="AMX is Intel's")
def test_amx_compiled_in_does_no_harm(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where AMX is, its decode dies and the next variant is taken; where it is not, ggml refuses the variant."""
    from steps.runtime.proof import all_proofs, prove

    folder = built(source, ["x64", "haswell", "sapphirerapids"], V4)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    verdict = prove(all_proofs()["llama.cpp"])
    assert verdict.status == "works", verdict.reason
    if "amx_int8" not in this_processor().features:
        assert verdict.facts["variant"] in ("x64", "haswell")


@pytest.mark.recipes
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user, which imitates other processors")
@pytest.mark.skipif("avx512f" not in this_processor().features, reason="native is no newer than what is imitated")
def test_a_native_build_dies_elsewhere_in_the_child_that_proves_it_and_what_set_up_makes_anew_works(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    haswell = (str(shutil.which("qemu-x86_64")), "-cpu", "Haswell")
    with monkeypatch.context() as patch:
        patch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=ON")
        folder = built(source, [], V4)
    assert proven(folder) == (0, '{"variant": ""}')
    code, _ = proven(folder, *haswell)
    assert code in (-4, 132), "an instruction that is missing there"
    anew = built(source, None, V4, safest=True)
    assert sorted(path.stem for path in anew.glob("libggml-cpu-*.so")) == ["libggml-cpu-haswell", "libggml-cpu-x64"]
    assert proven(anew, *haswell) == (0, '{"variant": "haswell"}')
