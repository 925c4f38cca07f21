"""Draws the README's pictures, in light and dark, from a run of the demo.

    python assets/draw.py log/<run>        # assets/demo.png, assets/demo-dark.png

Above: the losses beside the unigram entropy of the validation split. Below: what the network wrote to the
same prompt before the first step and after the last, with one fixed seed.
"""

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import plot
from lib import checkpoint, cli, files, shards, tokenizer
from model import GPT


def write_sample(model: GPT, prompt: str, seed: int) -> str:
    ids = torch.tensor([tokenizer.encode(prompt)])
    generator = torch.Generator().manual_seed(seed)
    rows = model.eval().generate(ids, 60, temperature=0.8, top_k=50, generator=generator)
    text = tokenizer.decode_until_end(rows[0].tolist())
    text = text.encode("ascii", "replace").decode()  # matplotlib's font lacks some characters of the noise
    return textwrap.shorten(text, 230, placeholder=" ...")


def main(run: Path):
    trained = checkpoint.load(checkpoint.list_steps(run)[-1])
    cfg = trained.state["config"]
    torch.manual_seed(cfg["seed"])
    prompt, step = cfg["sample_prompt"], trained.state["step"]
    samples = {
        "before the first step": write_sample(GPT(trained.model.config), prompt, seed=3),
        f"after {step} steps": write_sample(trained.model, prompt, seed=3),
    }
    validation = shards.ShardReader(
        shards.Folder(files.ROOT / cfg["dataset_path"]), "val", cfg["seq_len"], cfg["seed"]
    )
    entropy = validation.unigram_entropy(cfg["val_tokens"])
    for look, name in ((plot.Config(), "demo.png"), (plot.Config(theme="dark"), "demo-dark.png")):
        figure = plot.draw([plot.Run(run)], look)
        axes, ink = figure.axes[0], plot.THEMES[look.theme][1]
        axes.axhline(entropy, color=plot.GREY, linestyle="--", linewidth=1.2)
        text = f"unigram entropy {entropy:.2f}: each token guessed by its frequency"
        axes.text(
            0.98, entropy, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=ink
        )
        lines = [f"{when}:\n{textwrap.fill(sample, 88)}" for when, sample in samples.items()]
        figure.supxlabel("\n\n".join(lines), x=0.02, ha="left", fontsize=9, color=ink, parse_math=False)
        figure.set_size_inches(6.4, 5)
        figure.savefig(files.ASSETS / name, dpi=150)


if __name__ == "__main__":
    cli.run(lambda: main(Path(*sys.argv[1:])))
