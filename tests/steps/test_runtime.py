"""Native runtimes are proven by calls in children: what dies is found and passed over; steps that die say of what."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from steps.frame.launch import Launcher, _told
from steps.frame.scale import environment
from steps.runtime import verdicts
from steps.runtime.death import fatal_library, how_it_ended, last_words
from steps.runtime.proof import all_proofs, prove
from steps.runtime.verdicts import last_verdict, prove_and_keep
from tests.broken import ABORT, ILLEGAL, LLAMA_CPP, compiled, llama_cpp_with
from tests.conftest import Bench

QEMU = shutil.which("qemu-x86_64")
BUILT_IN_VARIANTS = any(LLAMA_CPP.glob("libggml-cpu-*.so"))


def loaded_variant(folder: Path) -> str:
    """The processor backend that a plain import of llama_cpp takes from a folder."""
    code = "from llama_cpp import _backends; print(_backends.loaded)"
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.recipes
@pytest.mark.parametrize("runtime", all_proofs())
def test_every_runtime_works_here_or_the_machine_lacks_what_it_is_for(runtime: str) -> None:
    verdict = prove(all_proofs()[runtime])
    if verdict.status == "absent":
        assert verdict.optional
        assert verdict.reason
        return
    assert verdict.status == "works", verdict.reason
    assert verdict.version
    assert verdict.identity == all_proofs()[runtime].identity()


@pytest.mark.parametrize(("death", "name", "at_once"), [(ABORT, "SIGABRT", False), (ILLEGAL, "SIGILL", True)])
def test_a_variant_that_dies_is_passed_over_by_all_who_load_llama_cpp_afterwards(
    death: str, name: str, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama_cpp_with(death, tmp_path / "lib", others=True, at_once=at_once)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    verdict = prove(all_proofs()["llama.cpp"])
    assert verdict.status == "works", verdict.reason
    assert verdict.facts["variant"] != "newest"
    assert name in verdict.reason or platform.machine() != "x86_64"
    for _ in range(2):
        assert [path.read_text() for path in folder.glob("avoid-*.txt")] == ["newest\n"]
        assert loaded_variant(folder) == verdict.facts["variant"]
        assert prove(all_proofs()["llama.cpp"]).status == "works", "it dies again, and is noted again"
    (folder / "libggml-cpu-newest.so").unlink()
    assert prove(all_proofs()["llama.cpp"]).reason == ""
    assert not list(folder.glob("avoid-*.txt"))


def test_a_proof_that_is_ended_from_outside_is_not_kept(
    own_verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    death = "kill(getpid(), 9);"
    folder = llama_cpp_with(death, tmp_path / "lib", others=False)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    (verdict,) = prove_and_keep(["llama.cpp"])
    assert verdict.status == "broken" and verdict.reason.startswith("it died of SIGKILL")
    assert last_verdict("llama.cpp") == verdict, "this run must not go on with it"
    assert not list(own_verdicts.rglob("llama_cpp-*.json")), "the next proves it anew"
    code = "from steps.runtime.verdicts import hide_broken; hide_broken(); import llama_cpp"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert "ModuleNotFoundError: import of llama_cpp halted" in ended.stderr, "its steps know what the run found"


def test_what_cannot_be_written_is_known_to_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    monkeypatch.setattr(verdicts, "folder", lambda: nowhere / "doctor")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(llama_cpp_with(ABORT, tmp_path / "lib", others=False)))
    (verdict,) = prove_and_keep(["llama.cpp"])
    assert last_verdict("llama.cpp") == verdict
    assert "llama.cpp" in environment()[verdicts.BROKEN].split(",")
    monkeypatch.setattr(verdicts, "_of_this_process", {})
    assert last_verdict("llama.cpp") is None


def test_a_full_disk_is_no_fault_of_a_runtime(
    own_verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may hold half a kilobyte, no more."""
    full = tmp_path / "python"
    full.write_text(f'#!/bin/sh\nulimit -f 1\nexec {sys.executable} "$@"\n')
    full.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(full))
        (verdict,) = prove_and_keep(["llama.cpp"])
    assert verdict.status == "broken"
    assert "ended with code 75" in verdict.reason, "the one for what may pass"
    assert not list(own_verdicts.rglob("llama_cpp-*.json"))
    assert prove_and_keep(["llama.cpp"])[0].status == "works"


def test_a_package_of_our_name_in_the_working_directory_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    monkeypatch.chdir(tmp_path)
    assert prove(all_proofs()["llama.cpp"]).status == "works"


def test_an_interruption_ends_the_proofs_that_run(tmp_path: Path) -> None:
    """A library that never comes back from being loaded, and Ctrl-C."""
    folder = llama_cpp_with("sleep(600);", tmp_path / "lib", others=False)
    surroundings = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
    code = "from steps.runtime.verdicts import prove_and_keep; print(1, flush=True); prove_and_keep(['llama.cpp'])"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Where the tests themselves run in the background, it is ignored, and so it would be by the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout and child.stdout.readline() == "1\n"
    own = psutil.Process(child.pid)
    deadline = time.monotonic() + 60
    # The proof itself, not the one that asks for the variants.
    while not any("steps.runtime" in each.cmdline() for each in own.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = own.children(recursive=True)
    child.send_signal(signal.SIGINT)
    child.wait(30)
    psutil.wait_procs(started, timeout=10)
    assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_a_runtime_without_a_variant_that_lives_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(llama_cpp_with(ABORT, tmp_path / "lib", others=False)))
    verdict = prove(all_proofs()["llama.cpp"])
    assert verdict.status == "broken"
    assert verdict.reason == "it died of SIGABRT in llama_cpp"
    assert verdict.advice


def test_a_runtime_that_computes_wrongly_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second library answers for torch's: a product that is off by a tenth."""
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import sys\n"
        "class Spoil:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'steps.runtime.torch_checks':\n"
        "            import torch\n"
        "            right = torch.nn.functional.linear\n"
        "            torch.nn.functional.linear = lambda *args: right(*args) * 1.1\n"
        "sys.meta_path.insert(0, Spoil())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdict = prove(all_proofs()["torch"])
    assert verdict.status == "broken"
    assert "AssertionError: a product in torch.float32 is off by" in verdict.reason


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="needs qemu-user, which imitates other processors")
@pytest.mark.skipif(platform.machine() != "x86_64" or not BUILT_IN_VARIANTS, reason="needs set-up's llama.cpp on x86")
@pytest.mark.parametrize(("processor", "variant"), [("Haswell", "haswell"), ("Nehalem", "x64"), ("qemu64", "x64")])
def test_llama_cpp_runs_on_an_older_processor(processor: str, variant: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [str(QEMU), "-cpu", processor, sys.executable, "-m", "steps.runtime", "llama_cpp", str(answer)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(answer.read_text()) == {"variant": variant}


@pytest.mark.recipes
@pytest.mark.skipif(QEMU is None, reason="needs qemu-user, which imitates other processors")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="imitates an x86 processor")
def test_an_instruction_that_an_older_processor_lacks_is_found_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' library for processors takes AVX2 for granted."""
    older = tmp_path / "python"
    older.write_text(f'#!/bin/sh\nexec {QEMU} -cpu Nehalem {sys.executable} "$@"\n')
    older.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(older))
    verdict = prove(all_proofs()["bitsandbytes"])
    assert verdict.reason == "it died of SIGILL in bitsandbytes"


@pytest.mark.skipif(not BUILT_IN_VARIANTS, reason="needs set-up's llama.cpp")
def test_a_variant_for_another_processor_is_refused_in_a_sentence(tmp_path: Path) -> None:
    shutil.copytree(LLAMA_CPP, tmp_path / "lib")
    source = "int ggml_backend_score(void) { return 0; }\nvoid *ggml_backend_init(void) { abort(); return 0; }"
    compiled(source, tmp_path / "lib" / "libggml-cpu-future.so")
    environment = {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": str(tmp_path / "lib"),
        "POSTTRAIN_LLAMA_CPP_VARIANT": "future",
    }
    ended = subprocess.run([sys.executable, "-c", "import llama_cpp"], env=environment, capture_output=True, text=True)
    assert "its variant `future` does not run on this processor" in ended.stderr.splitlines()[-1]


def test_a_step_that_dies_says_of_what_in_which_library_and_what_to_do(
    bench: Bench, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(llama_cpp_with(ABORT, tmp_path / "lib", others=False)))
    launcher = Launcher([], tmp_path / "forkserver.log")
    alone = Bench(tmp_path / "bench", launcher)
    alone.store = bench.store
    try:
        result = alone.attempt("quantize.gguf", {"model": pico}, scheme="Q8_0")
    finally:
        launcher.close()
    assert result.status == "failed"
    assert "its process died of SIGABRT in llama_cpp" in result.message
    assert "`posttrain doctor llama.cpp` tells whether it works on this machine" in result.message
    assert "it last said: " in result.message
    assert "log.txt" in result.message


def test_a_child_of_a_step_that_dies_is_told_in_the_same_way(
    bench: Bench, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.steps.calibration_rows import publish_conversations

    q8 = bench.run("quantize.gguf", {"model": pico}, scheme="Q8_0")[""]
    rows = publish_conversations(bench.store)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(llama_cpp_with(ILLEGAL, tmp_path / "lib", others=False)))
    launcher = Launcher([], tmp_path / "forkserver.log")
    alone = Bench(tmp_path / "bench", launcher)
    alone.store = bench.store
    inputs = {"reference": pico, "candidates": [q8], "data": rows}
    try:
        result = alone.attempt("evaluate.compare", inputs, rows=2, generate_rows=1, names=("q8",))
    finally:
        launcher.close()
    assert result.status == "failed"
    assert "q8: its process died of SIG" in result.message
    assert "in llama_cpp; `posttrain doctor llama.cpp`" in result.message


def test_a_fork_server_that_dies_of_a_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled("__attribute__((constructor)) static void die(void) { abort(); }", tmp_path / "libdying.so")
    package = tmp_path / "site-packages" / "dying"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"import ctypes\nctypes.CDLL({str(library)!r})\n")
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    launcher = Launcher(["dying"], tmp_path / "forkserver.log")
    try:
        result = Bench(tmp_path / "bench", launcher).attempt("model.pico", pretrain_steps=0)
    finally:
        launcher.close()
    assert result.status == "failed"
    assert "the fork server died of SIGABRT in dying" in result.message


@pytest.mark.parametrize("thread", [False, True])
def test_the_library_is_found_in_what_faulthandler_wrote(tmp_path: Path, thread: bool) -> None:
    """Real deaths: in the thread that called, and in one that the library made, as OpenMP does."""
    body = "static void *die(void *_) { abort(); }\n" + (
        "void call(void) { pthread_t t; pthread_create(&t, 0, die, 0); pthread_join(t, 0); }"
        if thread
        else "void call(void) { die(0); }"
    )
    library = compiled(body, tmp_path / "libcall.so")
    package = tmp_path / "site-packages" / "caller"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"import ctypes\nctypes.CDLL({str(library)!r}).call()\n")
    code = "print('one'); print('two', flush=True); import caller"
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = ended.stdout + ended.stderr
    assert how_it_ended(ended.returncode) == "died of SIGABRT"
    assert fatal_library(log) == "caller"
    assert last_words(log) == ["one", "two"]


@pytest.mark.parametrize("end", ["died of SIGTERM", "died of SIGKILL", "ended with code 1"])
def test_who_was_ended_by_others_died_in_no_library(end: str, tmp_path: Path) -> None:
    """A child that died earlier, and was survived, is still in the log."""
    trace = (
        'Fatal Python error: Aborted\n\nCurrent thread 0x1:\n  File "/x/site-packages/llama_cpp/a.py", line 1 in f\n'
    )
    (tmp_path / "log.txt").write_text(trace)
    assert "llama_cpp" not in _told(f"its process {end}", tmp_path / "log.txt", 0).replace(str(tmp_path), "")
    told = _told("its process died of SIGILL", tmp_path / "log.txt", 0)
    assert "in llama_cpp; `posttrain doctor llama.cpp`" in told


def test_a_log_without_a_death_names_no_library() -> None:
    assert fatal_library('Traceback:\n  File "/x/site-packages/torch/nn.py", line 3 in f\n') == ""
    assert how_it_ended(3) == "ended with code 3"
    assert how_it_ended(-200) == "died of signal 200"
