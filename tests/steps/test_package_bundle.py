"""A bundle verifies with sha256sum, says what it holds, and what its card tells to run does run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from calibration_rows import publish_conversations
from variants import scale_noise, variant

from steps.artifacts import Dataset, Manifest, Model, Package, Quantized, Report


@pytest.fixture(scope="module")
def data(bench: Any) -> Dataset:
    return publish_conversations(bench.store)


@pytest.fixture(scope="module")
def gguf(bench: Any, pico: Model) -> Quantized:
    return bench.run("quantize.gguf", {"model": pico}, scheme="Q8_0")[""]


@pytest.fixture(scope="module")
def report(bench: Any, pico: Model, gguf: Quantized, data: Dataset) -> Report:
    inputs = {"reference": pico, "candidates": [gguf], "data": data}
    small = {"rows": 2, "max_tokens": 96, "generate_rows": 1, "new_tokens": 4}
    return bench.run("evaluate.compare", inputs, reference_name="merged", names=("q8",), **small)[""]


@pytest.fixture(scope="module")
def inputs(pico: Model, gguf: Quantized, report: Report, data: Dataset) -> dict[str, Any]:
    return {"members": [pico, gguf], "report": report, "data": data}


@pytest.fixture(scope="module")
def package(bench: Any, inputs: dict[str, Any]) -> Package:
    return bench.run("package.bundle", inputs, names=("merged", "gguf[Q8_0]"), title="Pico, tuned")[""]


def test_members_lie_in_their_folders_unchanged(package: Package, pico: Model, gguf: Quantized) -> None:
    assert package.facts.members == ("merged", "gguf-Q8_0")
    for folder, member in zip(package.facts.members, (pico, gguf), strict=True):
        assert Manifest.read(package.path / folder).digest == member.digest
        for name in member.manifest.files:
            assert (package.path / folder / name).samefile(member.path / name)
    assert (package.path / "tokenizers" / "gguf-Q8_0" / "chat_template.jinja").exists()


def test_sha256sum_accepts_all_files_and_notices_a_changed_one(package: Package, tmp_path: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=package.path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    listed = {line.split("  ", 1)[1] for line in (package.path / "SHA256SUMS").read_text().splitlines()}
    assert listed | {"SHA256SUMS"} == set(package.manifest.files)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", package.path, copy], check=True)
    (copy / "README.md").chmod(0o644)
    (copy / "README.md").write_text("other")
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=copy, capture_output=True).returncode == 1


def test_card_has_front_matter_table_and_lineage(
    package: Package, pico: Model, gguf: Quantized, report: Report
) -> None:
    text = (package.path / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "psf-2.0"
    assert front["base_model"] == [pico.facts.origin]
    assert front["tags"] == ["gguf", "posttrain"]
    assert "# Pico, tuned" in text
    assert (report.path / "table.md").read_text() in text
    assert pico.digest in text and gguf.digest in text
    assert "Licence." not in text


def test_what_the_card_tells_to_run_runs(package: Package) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (package.path / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        ran = subprocess.run([sys.executable, "-c", snippet], cwd=package.path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


def test_same_digest_twice_and_members_untouched(
    bench: Any, inputs: dict[str, Any], package: Package, pico: Model, gguf: Quantized
) -> None:
    again = bench.run("package.bundle", inputs, names=("merged", "gguf[Q8_0]"), title="Pico, tuned")[""]
    assert again.digest == package.digest
    assert all(bench.store.fault(each.digest) is None for each in (pico, gguf, package))


def test_licences_that_disagree_are_told(bench: Any, pico: Model) -> None:
    other = variant(bench.store, pico, scale_noise(0.1), licence="apache-2.0")
    package = bench.run("package.bundle", {"members": [pico, other]}, names=("a", "b"), title="Two")[""]
    text = (package.path / "README.md").read_text()
    assert "`a` is PSF-2.0, `b` is apache-2.0" in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"


@pytest.mark.parametrize("names", [("a[x]", "a-x"), ("..", "b"), ("README.md", "b"), ("only",)])
def test_names_that_make_no_folder_are_refused(bench: Any, pico: Model, gguf: Quantized, names: Any) -> None:
    result = bench.attempt("package.bundle", {"members": [pico, gguf]}, names=names, title="X")
    assert result.status == "refused"
    assert "package.bundle" in result.message
