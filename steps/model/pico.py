"""`model.pico`: a Llama of about a million parameters, made on the spot, for tests and for learning the tool."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from steps.artifacts import Draft, Model
from steps.frame import Job, Resources, Seed, StepConfig, step
from steps.lm.checkpoint import model_facts, save_model
from steps.lm.tasks import THINK_CLOSE, THINK_OPEN
from steps.lm.turn_end import stop_at_turn_end

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_THINKING = (THINK_OPEN, THINK_CLOSE)


class PicoModel(StepConfig):
    """Make a Llama of about a million parameters with a tokenizer of its own, pretrained for a few seconds.

    Like Qwen's base models it is pretrained with `<|endoftext|>` as its end token, while its chat template ends turns
    with `<|im_end|>`.
    """

    hidden: int = Field(default=256, ge=32)
    """Hidden size. A multiple of 256 makes every matrix fit k-quants' blocks."""
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=2, ge=1)
    vocabulary: int = Field(default=1024, ge=300)
    context: int = Field(default=512, ge=64)
    """Longest sequence in tokens."""
    pretrain_steps: int = Field(default=60, ge=0)
    """Optimizer steps on plain text, 16 sequences of 128 tokens each."""
    seed: Seed = 0

    @property
    def gives_tied(self) -> bool:
        """As small Llamas are."""
        return True


@step(
    "model.pico",
    produces=Model,
    reference="https://arxiv.org/abs/2302.13971",
    libraries=("torch", "transformers", "tokenizers"),
    preload=("torch", "transformers.models.llama"),
    resources=Resources(cpus=0),
)
def pico_model(config: PicoModel, job: Job) -> Draft:
    """Train the tokenizer and the model on the text of the running interpreter's standard library."""
    import torch

    torch.manual_seed(config.seed)
    text = list(_corpus())
    tokenizer = train_tokenizer(text, config.vocabulary, config.context)
    model = new_llama(config, tokenizer)
    _pretrain(model, tokenizer, text, config, job)
    out = job.output()
    save_model(model.bfloat16(), tokenizer, out)  # pyright: ignore[reportArgumentType]
    stop_at_turn_end(out)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Model.draft(out, model_facts(out, origin=f"pico://python-{version}", licence="PSF-2.0"))


def train_tokenizer(text: list[str], vocabulary: int, context: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE (GPT-2's pre-tokenizer, every digit a token) with ChatML's tokens and template.

    Single digits are what SmolLM and Qwen have too; without them a small model cannot learn to calculate.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(_THINKING),
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=context,
    )
    # Not special: they are part of the text that a thinking model writes, as in Qwen3.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in _THINKING])
    tokenizer.chat_template = CHATML
    return tokenizer


def new_llama(config: PicoModel, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """Build the model with random weights (tied embeddings, as in small Llamas)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end, start, _ = range(len(_SPECIAL))
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=2 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(llama)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    return model


def _pretrain(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", text: list[str], config: PicoModel, job: Job
) -> None:
    """Next-token training on random windows of the text; literal, small, deterministic for a seed."""
    import torch

    ids = torch.tensor([token for piece in text for token in tokenizer(piece)["input_ids"]])
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    model.train()
    for index in range(config.pretrain_steps):
        starts = torch.randint(0, len(ids) - 129, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 128] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        job.log_metrics({"loss": loss.item()}, step=index)
        job.progress(index + 1, config.pretrain_steps, "steps")
    model.eval()


def _corpus() -> Iterator[str]:
    """Yield the source text of some well-documented modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "collections/__init__", "pathlib", "statistics", "subprocess", "textwrap", "typing"):
        path = library / f"{name}.py"
        if path.exists():
            yield path.read_text(encoding="utf-8")
