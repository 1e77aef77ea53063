"""`quantize.gptq`: a checkpoint with 4- or 8-bit weights for GPU runtimes, rounded so that real rows change least."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from steps.artifacts import Dataset, Documents, Draft, Model, Quantized, QuantizedFacts
from steps.frame import Input, Job, Resources, StepConfig, UserError, step
from steps.frame.errors import ProofFailed
from steps.lm.checkpoint import (
    chat_template,
    load_model,
    load_tokenizer,
    positions_within,
    safetensors_headers,
    stop_token_ids,
)
from steps.quantize._calibration import calibration_ids, calibration_texts

if TYPE_CHECKING:
    pass

GroupSize = Literal[-1, 16, 32, 64, 128, 256, 512, 1024]

_VERIFIED_ROWS = 4
_LEAST_KAPPA = 0.2
"""Cohen's kappa below which agreement is called slight (Landis and Koch, 1977)."""


class QuantizeGptq(StepConfig):
    """Quantize a model's matrices to 4 or 8 bits by GPTQ, calibrated on the run's own conversations."""

    model: Input[Model]
    calibration: Input[Dataset | Documents]
    bits: Literal[4, 8] = 4
    group_size: GroupSize = 128
    """Input channels that share a scale; -1 gives each output channel one scale. Must divide every matrix's width."""
    desc_act: bool = False
    """Quantize the most active channels first, in whatever order that is: slightly better, slower to run."""
    symmetric: bool = True
    """Without zero points; what most GPU kernels need."""
    calibration_rows: int = Field(default=64, ge=1)
    """Most rows of the calibration data to use, evenly spread over it."""
    calibration_tokens: int = Field(default=512, ge=16)
    """Most tokens of each row."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """GPTQModel quantizes; what it wrote is unpacked and opened without it."""
        return ("GPTQModel",)

    @property
    def scheme_made(self) -> tuple[Literal["gptq"], str]:
        """`Int4-g128`, or `Int4-channel` where every output channel has one scale."""
        return "gptq", f"Int{self.bits}-" + ("channel" if self.group_size == -1 else f"g{self.group_size}")


@step(
    "quantize.gptq",
    produces=Quantized,
    reference="https://arxiv.org/abs/2210.17323",
    libraries=("gptqmodel", "torch", "transformers"),
    preload=("torch", "transformers.models.llama"),
    resources=Resources(cpus=0),
)
def quantize_gptq(config: QuantizeGptq, job: Job) -> Draft:
    """Quantize layer by layer, write the checkpoint, open it anew and prove that it still is the model."""
    from steps.lm.device import granted_device

    model = config.model
    check_group_size(model.path, config.group_size)
    tokenizer = load_tokenizer(model.path)
    texts = calibration_texts(config.calibration, tokenizer, config.calibration_rows)
    rows = calibration_ids(texts, tokenizer, positions_within(model.path, config.calibration_tokens))
    out = job.output()
    began = time.perf_counter()
    _quantize(config, rows, out, job)
    quantized = time.perf_counter()
    _keep_what_is_not_weights(model.path, out)
    kappa, agreement = verify_gptq(out, model, rows[:_VERIFIED_ROWS], granted_device(job.resources))
    headers = [header for _, header in safetensors_headers(out)]
    size = sum(header["data_offsets"][1] - header["data_offsets"][0] for header in headers)
    bits = 8 * size / model.facts.parameters
    job.log_metrics(
        {
            "seconds_quantize": quantized - began,
            "seconds_verify": time.perf_counter() - quantized,
            "size_bytes": sum(path.stat().st_size for path in out.iterdir()),
            "bits_per_weight": bits,
            "verified_top1_agreement": agreement,
            "verified_kappa": kappa,
        }
    )
    form, scheme = config.scheme_made
    facts = QuantizedFacts(
        format=form,
        scheme=scheme,
        bits_per_weight=bits,
        template_sha256=model.facts.template_sha256,
        stop_token_ids=model.facts.stop_token_ids,
        architecture=model.facts.architecture,
        parameters=model.facts.parameters,
    )
    return Quantized.draft(out, facts)


def check_group_size(directory: Path, group_size: int) -> None:
    """Refuse a group size that does not divide the width of every matrix to quantize.

    Such a model would quantize and save, and fail only when it is loaded.

    Raises:
        UserError: naming a matrix and the sizes that would do.
    """
    widths = {name: width for name, width in _widths(directory).items() if group_size > 0 and width % group_size}
    if not widths:
        return
    every = set(_widths(directory).values())
    sizes = [size for size in (16, 32, 64, 128, 256, 512, 1024) if all(width % size == 0 for width in every)]
    name, width = next(iter(sorted(widths.items())))
    raise UserError(
        f"group_size: {group_size} does not divide {width}, the width of {name}; "
        f"{', '.join(map(str, [*reversed(sizes), -1]))} would do"
    )


def _widths(directory: Path) -> dict[str, int]:
    """Return the input channels of every linear layer but the output layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: each.in_features for name, each in modules if isinstance(each, torch.nn.Linear) and each is not head}


def _quantize(config: QuantizeGptq, rows: list[list[int]], out: Path, job: Job) -> None:
    """Run GPTQModel from the source checkpoint to a directory of its own making."""
    # Read once, at the import: with a single worker, its default on two cores, loading a model fails.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, job.cpus))
    from gptqmodel import GPTQModel, QuantizeConfig

    scheme = QuantizeConfig(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.symmetric,
        # The other packer is a C++ extension, compiled for half a minute at first use; the result is the same.
        pack_impl="original",
        # The place of an offload would be written into the checkpoint.
        offload_to_disk=False,
    )
    device = "cuda" if job.resources.gpus else "cpu"
    # It writes logs into the working directory.
    with contextlib.chdir(job.scratch):
        quantizer: Any = GPTQModel.load(str(config.model.path), scheme, device=device, trust_remote_code=False)
        layers = quantizer.model.config.get_text_config().num_hidden_layers
        quantizer.layer_callback = lambda layer_idx, **_: job.progress(layer_idx + 1, layers, "layers")
        examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
        quantizer.quantize(examples, batch_size=1, calibration_data_min_length=1)
        quantizer.save(str(out))


def _keep_what_is_not_weights(source: Path, out: Path) -> None:
    """Put the source's tokenizer, template and generation config in place of the library's versions of them.

    The log of losses goes: it holds timings, and its lines are in the step's log.
    """
    (out / "quant_log.csv").unlink(missing_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix not in (".safetensors", ".py") and path.name not in (
            "artifact.json",
            "config.json",
            "model.safetensors.index.json",
        ):
            (out / path.name).unlink(missing_ok=True)
            shutil.copyfile(path, out / path.name)


def verify_gptq(directory: Path, model: Model, rows: list[list[int]], device: str = "cpu") -> tuple[float, float]:
    """Prove what a GPTQ checkpoint must have kept of its source; return kappa and agreement of the likeliest tokens.

    Agreement is the share of positions at which both models find the same token likeliest; kappa is how far that lies
    above what two models would reach that pick the same tokens as often, but at random.

    Raises:
        ProofFailed: template or stop tokens differ, the logits are not finite, or the two models hardly agree.
    """
    import torch

    from steps.lm.gptq import load_gptq

    if chat_template(directory) != chat_template(model.path):
        raise ProofFailed(f"{directory.name}: the chat template is not the checkpoint's")
    if stop_token_ids(directory) != stop_token_ids(model.path):
        raise ProofFailed(f"{directory.name}: the stop tokens are not the checkpoint's")
    theirs = _likeliest(load_gptq(directory), rows, device)
    ours = _likeliest(load_model(model.path, "float32"), rows, device)
    agreement = (ours == theirs).double().mean().item()
    count = int(max(ours.max(), theirs.max())) + 1
    shares = [torch.bincount(tokens, minlength=count).double() / len(tokens) for tokens in (ours, theirs)]
    chance = (shares[0] * shares[1]).sum().item()
    kappa = 1.0 if agreement == 1 else (agreement - chance) / (1 - chance)
    if kappa < _LEAST_KAPPA:
        raise ProofFailed(
            f"the quantized model finds the same token likeliest at {agreement:.0%} of {len(ours)} positions, "
            f"{chance:.0%} would be chance: kappa {kappa:.2f}, at least {_LEAST_KAPPA} is needed; "
            "try more bits or smaller groups"
        )
    return kappa, agreement


def _likeliest(model: Any, rows: list[list[int]], device: str) -> Any:
    """Return the likeliest next token at every position of all rows, an int64 tensor; it is computed on a device.

    Raises:
        ProofFailed: a logit is not finite.
    """
    import torch

    model.to(device)
    found = []
    with torch.inference_mode():
        for ids in rows:
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            if not logits.isfinite().all():
                raise ProofFailed("the quantized model's logits are not finite; try more bits or smaller groups")
            found.append(logits.argmax(-1).cpu())
    return torch.cat(found)
