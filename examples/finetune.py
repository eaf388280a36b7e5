"""Fine-tune a mixture-of-experts model with moepatch: from a checkpoint to a checkpoint, on the CPU, in a minute or two.

    python examples/finetune.py [--steps N] [--out DIR]

The lines to copy are those of `main` that are numbered; everything above them is a stand-in for what you have already (a
checkpoint, text, a training loop) or a check. Nothing is downloaded: the checkpoint is a small Qwen3-MoE with random weights,
the text is the licences and the Python sources of the packages installed beside this interpreter.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moepatch

BATCH, LENGTH = 8, 128  # sequences in a step, tokens in a sequence
console = Console(highlight=False)


# -------------------------------------------------------------------------------------------------- a checkpoint and some text


def make_checkpoint(path: Path) -> None:
    """Writes a small Qwen3-MoE with random weights, and a tokenizer whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True, output_router_logits=True,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def read_text(limit: int = 1_500_000) -> str:
    """The licences and the Python sources of the installed packages, in a fixed order; at most `limit` characters."""
    root = Path(sysconfig.get_path("purelib"))
    files = [*sorted(root.glob("*.dist-info/**/LICEN[CS]E*")), *sorted(root.glob("*/*.py"))]
    pieces: dict[str, None] = {}  # a set that keeps its order: the same licence comes with many packages
    for file in filter(Path.is_file, files):
        pieces[file.read_text(errors="replace")] = None
        if sum(map(len, pieces)) > limit:
            break
    return "\n".join(pieces)[:limit]


# --------------------------------------------------------------------------------------------------------- any training loop


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int, lr: float = 3e-3) -> tuple[list[float], float]:
    """An ordinary loop; it knows nothing of moepatch. Returns the losses and the tokens per second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    losses: list[float] = []
    model.train()
    numbers = TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s")
    with Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), numbers, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"), speed=0.0)
        start = time.perf_counter()
        for step in range(1, steps + 1):
            offsets = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
            batch = tokens[offsets + torch.arange(LENGTH)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            speed = step * BATCH * LENGTH / (time.perf_counter() - start)
            progress.update(task, advance=1, loss=losses[-1], speed=speed)
    return losses, speed


def sample(model: torch.nn.Module, tokenizer: Any, prompt: str, length: int = 160) -> str:
    """What the model makes of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=length, do_sample=True, temperature=0.6)
    return tokenizer.decode(output[0], skip_special_tokens=True).rstrip()


# --------------------------------------------------------------------------------------------------------------------- checks


def heading(text: str) -> None:
    """The title of a stage."""
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def check(passed: bool, claim: str) -> None:
    """Prints a claim that was checked; ends the program if it is not true."""
    console.print(f"[green]✓[/] {escape(claim)}" if passed else f"[bold red]✗ {escape(claim)}[/]")
    if not passed:
        sys.exit(f"finetune.py: this did not hold: {claim}")


def sparkline(values: list[float], width: int = 40) -> str:
    """A curve in one line of text; each character is the mean of its share of the values."""
    width = min(width, len(values))
    bins = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(b) / len(b) for b in bins]
    low, span = min(means), max(max(means) - min(means), 1e-9)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def classes(model: torch.nn.Module) -> dict[str, type]:
    """The class of every module, by name."""
    return {name: type(module) for name, module in model.named_modules()}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the first tokens of the text."""
    return model.eval()(tokens[None, :LENGTH]).logits


def checkpoint_layout(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a checkpoint."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}


def check_checkpoint(start: Path, out: Path, model: torch.nn.Module, vanilla: torch.nn.Module) -> None:
    """The checkpoint has the layout of the one that we started from, and holds the weights of the patched model bit by bit."""
    layout = checkpoint_layout(out)
    table = Table("tensor of the first layer", "shape", box=None, header_style="dim", pad_edge=False)
    for key in [k for k in layout if ".layers.0.mlp." in k][:4]:
        table.add_row(key, str(layout[key]))
    console.print(table)
    experts = sum(".experts." in key for key in layout)
    console.print(f"[dim]… {len(layout)} tensors; {experts} are one expert's each, as checkpoints on the hub have them[/]")
    check(layout == checkpoint_layout(start), "the checkpoint has the names and shapes of the one we started from")
    ours, theirs = model.state_dict(), vanilla.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    check(same, f"vanilla transformers loads it: {len(theirs)} tensors, bit-equal to the trained ones")


# ----------------------------------------------------------------------------------------------------------------- the program


def run(start: Path, out: Path, steps: int, max_loss: float) -> None:
    """The stages. What a program of your own needs is numbered."""
    heading("A checkpoint and some text")
    make_checkpoint(start)
    text = read_text()
    console.print(f"A random Qwen3-MoE, and {len(text):,} characters of licences and Python sources.")

    heading("Patch")
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)  # 1. load: nothing special
    original_classes, original_parameters = classes(model), dict(model.named_parameters())
    model = moepatch.optimize(model)  #                    2. the same object, patched
    print(moepatch.report(model))
    patched = sum(cls is not original_classes[name] for name, cls in classes(model).items())
    check(patched > 0, f"{patched} of {len(original_classes)} modules have a patched class: the experts, and the model (it saves safely)")

    heading("Fine-tune")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    losses, speed = train(model, tokens, steps)  #         3. train: any loop, Trainer, TRL
    last = sum(losses[-10:]) / len(losses[-10:])
    console.print(f"loss {losses[0]:.2f} [cyan]{sparkline(losses)}[/] {last:.2f}   [dim]{speed:,.0f} tokens/s[/]")
    check(last < max_loss, f"the loss fell from {losses[0]:.2f} to {last:.2f}, below {max_loss}")
    console.print(Panel(escape(sample(model, tokenizer, "def ")), title="a sample", title_align="left", border_style="dim"))

    heading("Save, and load in vanilla transformers")
    model.save_pretrained(out)  #                          4. save: a standard checkpoint
    tokenizer.save_pretrained(out)
    vanilla = AutoModelForCausalLM.from_pretrained(out)
    check_checkpoint(start, out, model, vanilla)
    expected, ours = logits(vanilla, tokens), logits(model, tokens)
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    check(error < 1e-5, f"the patched model's logits are vanilla's, up to rounding: {error:.0e} of the largest")

    heading("Restore")
    model = moepatch.restore(model)  #                     5. if ever needed: the original classes, the trained weights
    restored = dict(model.named_parameters())
    same = restored.keys() == original_parameters.keys() and all(restored[name] is p for name, p in original_parameters.items())
    check(classes(model) == original_classes, f"all {len(original_classes)} modules have their original classes again")
    check(same, f"all {len(restored)} parameters are the original objects, with the trained weights")
    check(torch.equal(logits(model, tokens), expected), "the restored model's logits are bit-equal to vanilla's")


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Where to save the model; a temporary directory if not given.")] = None,
    max_loss: Annotated[float, typer.Option(help="Fail unless the loss gets below this.")] = 2.6,
) -> None:
    """Fine-tunes a small mixture-of-experts model on the CPU; checks the patch, the checkpoint and the restored model on the way."""
    began = time.perf_counter()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="moepatch-") as scratch:
        run(Path(scratch, "start"), out or Path(scratch, "tuned"), steps, max_loss)
    where = f"The model is in [bold]{escape(str(out))}[/]." if out else "Nothing was left behind; --out DIR keeps the model."
    console.print(f"\n[bold green]All of it held[/], in {time.perf_counter() - began:.0f} s. {where}")


if __name__ == "__main__":
    typer.run(main)
