"""Runs the recipes of a list with several seeds, two at a time with a core each, and prints a table.

    python -m log.recipes.sweep --text openstax.jsonl.gz novels.jsonl.gz       # once: makes data/recipes
    python -m log.recipes.sweep log/recipes/techniques.txt --seeds 1 2 3       # goes on where it was stopped
    python -m log.recipes.sweep log/recipes/techniques.txt --only-table

A list has a recipe a line, as `name: flags of recipe.py`. Its first recipe is the one that the others are
compared with. A line `all: flags` holds for all. Names such as muon@0.3 and muon@0.5 are one recipe with
several budgets. For it the table says which fraction of each other recipe's tokens it needs. On disk:
runs/<list>/<name>_<seed>.json beside this script.
"""

import argparse
import concurrent.futures
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def make_data(texts: list[Path]):
    """Tokenizes JSON lines, their documents in one random order, to data/recipes."""
    lines = [line for path in texts for line in gzip.open(path, "rt", encoding="utf-8")]
    random.Random(0).shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        mixed = Path(folder) / "recipes.jsonl"
        mixed.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "fineweb.py", "--source", str(mixed), "--val-tokens", "524288"]
        subprocess.run([*command, "--out-dir", "data/recipes"], cwd=ROOT, check=True)


def read_list(path: Path) -> dict[str, list[str]]:
    """The flags of each recipe, by name, in the list's order."""
    recipes, common = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, flags = line.partition("#")[0].partition(":")
        if name.strip() == "all":
            common = flags.split()
        elif name.strip():
            recipes[name.strip()] = common + flags.split()
    return recipes


def run(flags: list[str], out: Path):
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "log.recipes.recipe", "--out", str(out), *flags]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = json.loads(out.read_text(encoding="utf-8"))
    print(f"{out.stem:32} {result['val']:.4f} {result['seconds']:6,} s", flush=True)


def format_mean(values: list[float], is_error: bool = False) -> str:
    """Mean and standard deviation, or standard error."""
    if len(values) < 2:
        return f"{fmean(values):7.4f}" if values else ""
    spread = stdev(values) / (len(values) ** 0.5 if is_error else 1)
    return f"{fmean(values):7.4f} ± {spread:.4f}"


def load_results(recipes: Iterable[str], folder: Path) -> dict[str, dict[str, dict]]:
    """The results that are there, by recipe and seed."""
    found: dict[str, dict[str, dict]] = {}
    for name in recipes:
        for path in sorted(folder.glob(f"{name}_*.json")):
            base, _, seed = path.stem.rpartition("_")
            if base == name:
                found.setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


def print_table(results: dict[str, dict[str, dict]]):
    """Final validation losses, and each recipe's gain over the first one with the same seeds."""
    first = next(iter(results.values()), {})
    print(f"{'recipe':28} seeds {'loss ± deviation':18} gain ± standard error")
    for name, runs in results.items():
        losses = [run["val"] for run in runs.values()]
        gains = [first[seed]["val"] - run["val"] for seed, run in runs.items() if seed in first]
        print(f"{name:28} {len(losses):5} {format_mean(losses):18} {format_mean(gains, is_error=True)}")


def find_tokens(runs: list[dict], loss: float) -> float | None:
    """The tokens with which a recipe ends at the loss, by a line in their logarithm between the two budgets
    around it. None if the loss lies outside of all."""
    points = sorted((run["recipe"]["tokens"], run["val"]) for run in runs)
    for (fewer, high), (more, low) in itertools.pairwise(points):
        if low <= loss <= high:
            return fewer * (more / fewer) ** ((high - loss) / (high - low))
    return None


def print_ratios(results: dict[str, dict[str, dict]]):
    """For each recipe with several budgets: the tokens it needs, as a fraction of each other recipe's."""
    budgets: dict[str, list[dict[str, dict]]] = {}
    for name, runs in results.items():
        if "@" in name:
            budgets.setdefault(name.partition("@")[0], []).append(runs)
    for recipe, sets in budgets.items():
        for other, runs in results.items():
            if other.partition("@")[0] == recipe:
                continue
            ratios = []
            for seed, run in runs.items():
                tokens = find_tokens([one[seed] for one in sets if seed in one], run["val"])
                if tokens:
                    ratios.append(tokens / run["recipe"]["tokens"])
            if ratios:
                print(f"{recipe} needs {format_mean(ratios)} of the tokens of {other}")


def draw(results: dict[str, dict[str, dict]], path: Path):
    """The training losses by tokens, as means over the seeds."""
    figure = plt.figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in results.items():
        curves = [run["train"] for run in runs.values()]
        tokens = [point[0] for point in curves[0]]
        losses = [fmean(loss for _, loss in points) for points in zip(*curves)]
        axes.plot(tokens, losses, label=f"{name}, {fmean(run['val'] for run in runs.values()):.3f}")
    axes.set(xscale="log", xlabel="tokens", ylabel="training loss, nats per token")
    axes.legend(title="recipe, final validation loss")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("list", nargs="?", type=Path)
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--text", nargs="+", type=Path, help="make the data of these .jsonl.gz files")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--plot", type=Path, help="draw the curves to this file")
    args = parser.parse_args()
    if args.text:
        make_data(args.text)
    if not args.list:
        return
    recipes, folder = read_list(args.list), HERE / "runs" / args.list.stem
    if not args.only_table:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            waiting = []
            for seed in args.seeds:
                for name, flags in recipes.items():
                    out = folder / f"{name}_{seed}.json"
                    if not out.exists():
                        waiting.append(pool.submit(run, [*flags, "--seed", seed], out))
            for job in waiting:
                job.result()
    results = load_results(recipes, folder)
    print_table(results)
    print_ratios(results)
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
