"""Set-up: which variants of llama.cpp are built for which processor, whose wheel is taken, what a user is shown."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from infra.setup import __main__ as set_up
from infra.setup.llama_cpp import Builder, chosen_variants, keep_variants, listed_variants
from infra.setup.packages import installed_files, locked, own_conflicts, write_lock
from infra.setup.stages import StageFailed, Stages
from steps.runtime.processor import Processor
from tests.flows.command import ROOT

# As ggml 0.25 lists them in `ggml/src/CMakeLists.txt`, Android's and Apple's shortened.
LISTED = """
function(ggml_add_cpu_backend_variant tag_name)
        ggml_add_cpu_backend_variant(x64)
        ggml_add_cpu_backend_variant(sse42              SSE42)
        ggml_add_cpu_backend_variant(sandybridge        SSE42 AVX)
            ggml_add_cpu_backend_variant(ivybridge      SSE42 AVX F16C)
            ggml_add_cpu_backend_variant(piledriver     SSE42 AVX F16C FMA)
        ggml_add_cpu_backend_variant(haswell            SSE42 AVX F16C FMA AVX2 BMI2)
        ggml_add_cpu_backend_variant(skylakex           SSE42 AVX F16C FMA AVX2 BMI2 AVX512)
        ggml_add_cpu_backend_variant(cannonlake         SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI)
        ggml_add_cpu_backend_variant(cascadelake        SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VNNI)
        ggml_add_cpu_backend_variant(icelake            SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI)
            ggml_add_cpu_backend_variant(cooperlake     SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VNNI AVX512_BF16)
            ggml_add_cpu_backend_variant(zen4           SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16)
        ggml_add_cpu_backend_variant(alderlake          SSE42 AVX F16C FMA AVX2 BMI2 AVX_VNNI)
            ggml_add_cpu_backend_variant(sapphirerapids SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 AMX_TILE AMX_INT8)
            ggml_add_cpu_backend_variant(armv8.0_1)
            ggml_add_cpu_backend_variant(armv8.2_1    DOTPROD)
            ggml_add_cpu_backend_variant(armv8.2_2    DOTPROD FP16_VECTOR_ARITHMETIC)
            ggml_add_cpu_backend_variant(armv8.2_3    DOTPROD FP16_VECTOR_ARITHMETIC SVE)
            ggml_add_cpu_backend_variant(armv8.6_1    DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8)
            ggml_add_cpu_backend_variant(armv8.6_2    DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8 SVE2)
            ggml_add_cpu_backend_variant(armv9.2_1    DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8 SME)
            ggml_add_cpu_backend_variant(android_armv8.0_1)
            ggml_add_cpu_backend_variant(android_armv8.2_1    DOTPROD)
            ggml_add_cpu_backend_variant(apple_m1             DOTPROD)
        ggml_add_cpu_backend_variant(power0)
            ggml_add_cpu_backend_variant(power8_2       POWER8  VSX)
"""  # noqa: E501
V2 = "sse4_2"
V3 = f"{V2} avx f16c fma avx2 bmi2"
V4 = f"{V3} avx512f avx512cd avx512vl avx512dq avx512bw"
AMX = "amx_tile amx_int8 amx_bf16"


def processor(flags: str, architecture: str = "x86_64") -> Processor:
    return Processor(architecture, "a processor", frozenset(flags.split()))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["x64", "haswell"]),
        (V2, ["x64", "haswell", "sse42"]),
        (f"{V2} avx", ["x64", "haswell", "sandybridge"]),
        (V3, ["x64", "haswell"]),
        (f"{V3} avx_vnni", ["x64", "haswell", "alderlake"]),
        (V4, ["x64", "haswell", "skylakex"]),
        (f"{V4} avx512_vnni", ["x64", "haswell", "cascadelake"]),
        (f"{V4} avx512_vnni avx512vbmi avx512_bf16", ["x64", "haswell", "zen4"]),
        (f"{V4} avx512_vnni avx512vbmi avx512_bf16 avx_vnni {AMX}", ["x64", "haswell", "zen4"]),
    ],
)
def test_each_processor_gets_the_plain_the_common_and_its_best_variant(flags: str, names: Sequence[str]) -> None:
    assert chosen_variants(listed_variants(LISTED, "x86_64"), processor(flags)) == names


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fp asimd", ["armv8.0_1", "armv8.2_2"]),
        ("fp asimd asimddp asimdhp fphp", ["armv8.0_1", "armv8.2_2"]),
        ("fp asimd asimddp asimdhp fphp sve i8mm sve2 sme", ["armv8.0_1", "armv8.2_2", "armv8.6_2"]),
    ],
)
def test_arm_gets_its_variants(flags: str, names: Sequence[str]) -> None:
    assert chosen_variants(listed_variants(LISTED, "aarch64"), processor(flags, "aarch64")) == names


def test_other_architectures_get_the_build_without_variants() -> None:
    assert listed_variants(LISTED, "riscv64") == []
    assert chosen_variants([], processor("", "riscv64")) == []


def test_no_variant_with_amx_is_ever_built() -> None:
    for architecture in ("x86_64", "aarch64"):
        every = listed_variants(LISTED, architecture)
        assert every
        assert not any("AMX" in feature or feature == "SME" for each in every for feature in each.features)


def test_only_the_chosen_variants_stay_in_ggmls_list() -> None:
    kept = keep_variants(LISTED, ["x64", "zen4"])
    lines = [line.strip() for line in kept.splitlines() if line.strip().startswith("ggml_add")]
    assert [line.split("(")[1].split()[0].rstrip(")") for line in lines] == ["x64", "zen4"]
    assert kept.count("\n") == LISTED.count("\n")


def test_a_wheel_is_taken_only_where_all_that_shapes_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CMAKE_ARGS", "CXX", "CC", "CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    ours = Builder(Path(sys.executable), "0.3.36", processor(V3), tmp_path)
    (tmp_path / ours.key).mkdir()
    wheel = tmp_path / ours.key / "llama_cpp_python.whl"
    with zipfile.ZipFile(wheel, "w") as stream:
        stream.writestr("library", "a" * 1000)
    assert ours.cached()
    assert dataclasses.replace(ours, processor=processor(f"{V3} rdtscp")).cached(), "no variant depends on this flag"
    assert not dataclasses.replace(ours, processor=processor(V4)).cached()
    assert not dataclasses.replace(ours, processor=processor(V2)).cached()
    assert not dataclasses.replace(ours, processor=processor(V3, "aarch64")).cached()
    assert not dataclasses.replace(ours, version="0.3.37").cached()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    assert not ours.cached()
    monkeypatch.delenv("CMAKE_ARGS")
    compiler = tmp_path / "other-compiler"
    compiler.write_text("#!/bin/sh\necho another compiler\n")
    compiler.chmod(0o755)
    for name, value in {"CXX": str(compiler), "CC": str(compiler), "CPATH": "/x", "CUDAARCHS": "90"}.items():
        monkeypatch.setenv(name, value)
        assert not ours.cached()
        monkeypatch.delenv(name)
    compiler.write_text("#!/bin/sh\necho a newer one\n")
    monkeypatch.setenv("PATH", "/nowhere", prepend=os.pathsep)
    assert ours.cached()
    wheel.write_bytes(wheel.read_bytes().replace(b"aaaa", b"aaab", 1))
    assert not ours.cached(), "a spoilt wheel"


def test_a_stage_that_fails_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    with stages.stage("what works") as log:
        log.run(["echo", "unseen"])
    told = "for i in $(seq 40); do echo WARNING: Location $i is ignored; echo line $i; done; exit 3"
    with pytest.raises(StageFailed) as caught, stages.stage("what fails") as log:
        log.run(["sh", "-c", told])
    message = str(caught.value)
    assert message.startswith("what fails: `sh ...` ended with code 3; the end of ")
    assert "  line 40" in message and "  line 26" in message and "line 25" not in message
    assert "WARNING" not in message
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2, "a line a stage"
    assert shown[0].startswith("what works  ") and shown[0].endswith(" s")
    assert shown[1].startswith("what fails  ") and "failed after" in shown[1]
    assert "unseen" in (tmp_path / "what-works.log").read_text()


def test_what_runs_beside_a_failed_stage_is_ended_with_its_children(tmp_path: Path) -> None:
    stages, marker = Stages(tmp_path), tmp_path / "children"
    with ThreadPoolExecutor(1) as pool:
        with stages.stage("long") as log:
            long = pool.submit(log.run, ["sh", "-c", f"sleep 60 & echo $! > {marker}; sleep 60"])
        while not marker.exists() or not marker.read_text().strip():
            time.sleep(0.01)
        began = time.monotonic()
        stages.stop()
        with pytest.raises(StageFailed):
            long.result()
        with pytest.raises(StageFailed, match="stopped"):
            log.run(["true"])
    assert time.monotonic() - began < 10
    assert is_gone(int(marker.read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_ends_set_up_ends_what_it_runs(number: signal.Signals, tmp_path: Path) -> None:
    """A command that runs in the main thread, as a repair does, and a child of its own."""
    marker = tmp_path / "child"
    program = f"""
import sys
from pathlib import Path
import infra.setup.__main__ as set_up
from infra.setup.stages import Stages
set_up.VENV, set_up.ROOT = Path({str(tmp_path)!r}) / ".venv", Path({str(tmp_path)!r})
def endless(stages):
    with stages.stage("endless") as log:
        log.run(["sh", "-c", "sleep 600 & echo $! > {marker}; sleep 600"])
set_up._set_up = endless
sys.exit(set_up.main())
"""
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not marker.exists() or not marker.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err == "stopped; run the same command again to go on\n"
    assert is_gone(int(marker.read_text()))
    assert not (tmp_path / ".venv" / ".ready").exists()


@pytest.mark.parametrize("harm", ["no python", "half a pip", "a file"])
def test_an_environment_that_was_left_half_made_is_made_anew(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(set_up, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(set_up, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "_set_up", lambda _: None)
    if harm == "a file":
        (tmp_path / ".venv").write_text("")
        assert set_up.main() == 1
        assert capsys.readouterr().err.startswith("error: ")
        return
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "left").touch()
    if harm == "no python":
        (tmp_path / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    else:
        (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    assert set_up.main() == 0
    assert not (tmp_path / ".venv" / "left").exists()
    assert (tmp_path / ".venv" / ".ready").exists()


def test_flags_for_this_processor_alone_do_not_reach_the_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O3 -march=native -g")
    monkeypatch.setenv("CXXFLAGS", "-mtune=native")
    found = Builder._with_tools(Path("/scratch"))
    assert found["CFLAGS"].split() == ["-O3", "-g"]
    assert found["CXXFLAGS"] == ""
    assert "CPPFLAGS" not in found


def test_the_lock_names_what_was_installed_from_files_and_keeps_its_comments() -> None:
    listed = "torch==2.13.0+cpu\nllama_cpp_python==0.3.36\npip==26\nposttrain==0.1\nabsl-py==2.5.1\n"
    lines = write_lock(listed).splitlines()
    assert lines[0].startswith("# Every package")
    assert lines[1:] == ["absl-py==2.5.1", "llama_cpp_python==0.3.36", "torch==2.13.0"]


def test_a_package_that_is_not_in_the_lock_is_named_in_a_sentence() -> None:
    assert locked("LLAMA-cpp_python") == locked("llama_cpp_python")
    with pytest.raises(StageFailed, match="has no line `nowhere==VERSION`"):
        locked("nowhere")


def test_only_conflicts_of_our_own_packages_stop_set_up() -> None:
    said = (
        "vllm 0.12.0 has requirement torch==2.9.0, but you have torch 2.13.0.\ntrl 1 requires peft, which is absent.\n"
    )
    assert own_conflicts(said) == ["trl 1 requires peft, which is absent."]
    assert own_conflicts("No broken requirements found.\n") == []


def test_what_pip_installed_is_known_by_its_record(tmp_path: Path) -> None:
    record = tmp_path / "lib" / "python3.11" / "site-packages" / "py_pcre-1.0.dist-info" / "RECORD"
    record.parent.mkdir(parents=True)
    record.write_text("a.so,sha256=1,1\n")
    first = installed_files(tmp_path, "Py.Pcre")
    record.write_text("a.so,sha256=2,1\n")
    assert first and installed_files(tmp_path, "Py.Pcre") not in ("", first)
    record.unlink()
    assert installed_files(tmp_path, "Py.Pcre") == ""


def test_without_a_compiler_set_up_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    environment = {"PATH": str(tmp_path), "PYTHON": sys.executable}
    command = [str(shutil.which("bash")), str(ROOT / "infra" / "setup.sh")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no C++ compiler")
    assert ended.stderr.count("\n") == 1
