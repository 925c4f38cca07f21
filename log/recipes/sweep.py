"""Runs the recipes of a list with several seeds, two at a time with a core each, and prints a table.

    python -m log.recipes.sweep --text openstax.jsonl.gz novels.jsonl.gz       # once: makes data/recipes
    python -m log.recipes.sweep log/recipes/techniques.txt --seeds 1 2 3       # goes on where it was stopped
    python -m log.recipes.sweep log/recipes/techniques.txt --only-table

A list has a recipe a line, as `name: flags of recipe.py`. Its first recipe is the one that the others are
compared with. A line `all: flags` holds for all. Names such as muon@0.3 and muon@0.5 are one recipe with
several budgets. For such a recipe, lines below the table give the tokens it needs, as a fraction of those
of each recipe with one budget. On disk: runs/<list>/<name>_<seed>.json beside this script.
"""

import concurrent.futures
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import tyro

from lib.files import ROOT
from log.recipes.recipe import Recipe

HERE = Path(__file__).resolve().parent
Results = dict[str, dict[str, dict[str, Any]]]  # what recipe.py wrote, by recipe and seed


@dataclass(frozen=True)
class Config:
    list: Annotated[Path | None, tyro.conf.Positional] = None
    seeds: tuple[str, ...] = ("1",)
    jobs: int = 2  # runs at a time, a core each
    text: tuple[Path, ...] = ()  # make the data of these .jsonl.gz files
    only_table: bool = False
    plot: Path | None = None  # draw the curves to this file


def make_data(texts: tuple[Path, ...]):
    """Tokenizes JSON lines, their documents in one random order, to data/recipes."""
    lines = [line for path in texts for line in gzip.decompress(path.read_bytes()).splitlines()]
    random.Random(0).shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        mixed = Path(folder) / "recipes.jsonl"
        mixed.write_bytes(b"\n".join(lines))
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


def run_all(recipes: dict[str, list[str]], folder: Path, cfg: Config):
    with concurrent.futures.ThreadPoolExecutor(cfg.jobs) as pool:
        waiting = []
        for seed, (name, flags) in itertools.product(cfg.seeds, recipes.items()):
            out = folder / f"{name}_{seed}.json"
            if not out.exists():
                waiting.append(pool.submit(run, [*flags, "--seed", seed], out))
        try:
            for job in waiting:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def load_results(recipes: dict[str, list[str]], folder: Path) -> Results:
    """The results that are there. Raises ValueError if one is of other flags than the list's, or if products
    were of several precisions."""
    results: Results = {name: {} for name in recipes}
    for name, flags in recipes.items():
        for path in sorted(folder.glob(f"{name}_*.json")):
            base, _, seed = path.stem.rpartition("_")
            if base == name:
                result = json.loads(path.read_text(encoding="utf-8"))
                asked = tyro.cli(Recipe, args=[*flags, "--seed", seed], config=(tyro.conf.OmitArgPrefixes,))
                if Recipe(**result["recipe"]) != asked:
                    raise ValueError(f"{path} is of other flags than {' '.join(flags)}: remove it")
                results[name][seed] = result
    precisions = {result["dtype"] for runs in results.values() for result in runs.values()}
    if len(precisions) > 1:
        raise ValueError(f"{folder} has runs in {' and '.join(sorted(precisions))}, which do not compare")
    return results


def format_mean(values: list[float], is_error: bool = False) -> str:
    """Mean and standard deviation, or standard error."""
    if len(values) < 2:
        return f"{fmean(values):7.4f}" if values else ""
    spread = stdev(values) / (len(values) ** 0.5 if is_error else 1)
    return f"{fmean(values):7.4f} ± {spread:.4f}"


def print_table(results: Results):
    """Final validation losses, and each recipe's gain over the first one with the same seeds."""
    first = next(iter(results.values()))
    print(f"{'recipe':28} seeds {'loss ± deviation':18} gain ± standard error")
    for name, runs in results.items():
        losses = [run["val"] for run in runs.values()]
        gains = [first[seed]["val"] - run["val"] for seed, run in runs.items() if seed in first]
        if losses:
            print(f"{name:28} {len(losses):5} {format_mean(losses):18} {format_mean(gains, is_error=True)}")


def find_tokens(runs: list[dict[str, Any]], loss: float) -> float | None:
    """The tokens with which a recipe ends at the loss, by a line in their logarithm between the two budgets
    around it. None if the loss lies outside of all."""
    points = sorted((run["recipe"]["tokens"], run["val"]) for run in runs)
    for (fewer, high), (more, low) in itertools.pairwise(points):
        if low <= loss <= high and low < high:
            return fewer * (more / fewer) ** ((high - loss) / (high - low))
    return None


def print_ratios(results: Results):
    """For each recipe with several budgets: the tokens it needs, as a fraction of each of those with one."""
    budgets: dict[str, list[dict[str, dict]]] = {}
    for name, runs in results.items():
        if "@" in name:
            budgets.setdefault(name.partition("@")[0], []).append(runs)
    for recipe, sets in budgets.items():
        for other, runs in results.items():
            if "@" in other or not runs:
                continue
            found = {
                seed: find_tokens([one[seed] for one in sets if seed in one], run["val"])
                for seed, run in runs.items()
            }
            ratios = [tokens / runs[seed]["recipe"]["tokens"] for seed, tokens in found.items() if tokens]
            if len(ratios) == len(runs):
                print(f"{recipe} needs {format_mean(ratios)} of the tokens of {other} (± standard deviation)")
            else:
                print(f"{recipe}: {len(runs) - len(ratios)} losses of {other} are outside of its budgets'")


def draw(results: Results, path: Path):
    """The training losses by tokens, as means over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in results.items():
        if curves := [run["train"] for run in runs.values()]:
            tokens = [point[0] for point in curves[0]]
            losses = [fmean(loss for _, loss in points) for points in zip(*curves)]
            axes.plot(tokens, losses, label=f"{name}, {fmean(run['val'] for run in runs.values()):.3f}")
    axes.set(xscale="log", xlabel="tokens", ylabel="training loss, nats per token")
    axes.legend(title="recipe, final validation loss")
    figure.savefig(path, dpi=120)


def main(cfg: Config):
    if cfg.text:
        make_data(cfg.text)
    if not cfg.list:
        return
    recipes, folder = read_list(cfg.list), HERE / "runs" / cfg.list.stem
    if not cfg.only_table:
        run_all(recipes, folder, cfg)
    results = load_results(recipes, folder)
    print_table(results)
    print_ratios(results)
    if cfg.plot:
        draw(results, cfg.plot)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
