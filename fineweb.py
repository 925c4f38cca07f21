"""Stage 1: writes text from any source as GPT-2 token shards.

    python fineweb.py                              # FineWeb-Edu, the 10-billion-token sample
    python fineweb.py --source pydocs              # prose of the installed Python packages; no network
    python fineweb.py --source book.txt            # your file; also a folder or a glob
    python fineweb.py --source hf:org/name --text-field text
    python fineweb.py --source fineweb-edu-10B-gpt2 --max-shards 10     # ready-made shards: downloaded
    torchrun --nnodes 16 --nproc-per-node 1 ... fineweb.py --source fineweb-edu      # one share per machine
    python fineweb.py --source pydocs --verify     # compares every byte; --inspect prints contents

Sources:
    fineweb-edu-10BT, -100BT, -350BT, fineweb-edu (all, or one dump: --config CC-MAIN-2024-10)
    fineweb-10BT, -100BT, -350BT, fineweb         huggingface.co/datasets/HuggingFaceFW
    wikitext-103 (one document per article; has validation and test), tinystories (has validation),
    openwebtext, tiny-shakespeare, pydocs
    fineweb-edu-10B-gpt2, fineweb-10B-gpt2, fineweb-100B-gpt2     huggingface.co/kjj0, llm.c's .bin shards
    hf://datasets/org/name                        shards from --push-to, or others' .bin shards
    hf:org/name[@revision]                        any data set with a text column
    files, folders, globs                         .txt .md .raw .tokens .jsonl .parquet, each also .gz or .zst

On disk: data/<name>/<name>_{val,train}_000000.npy and manifest.json (format: lib/shards.py).
The source is divided into parts of whole files, about 1 GB each. An interrupted run resumes after its part's
last complete shard. Several machines share the parts. The shards' bytes are the same in every case. The
FineWeb-Edu sample makes 10 billion tokens, 20 GB.
"""

import lib.startup  # noqa: F401

import contextlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import cli, documents, files, hub, hub_shards, shard_writer, shards, sources, tokenizer
from lib.documents import Batch, Unit
from lib.environment import read_share
from lib.sources import Input

PART_BYTES = 2**30  # of input files per part


@dataclass(frozen=True)
class Config:
    # text
    source: cli.PathName = cli.knob("fineweb-edu-10BT", "what to tokenize: a name from the list, or files")
    documents: Unit = cli.knob(
        "auto", "a document in a text file: the file (auto), a line, a block between blank lines, an article"
    )
    text_field: str = cli.knob("text", "column (parquet, hf:) or key (jsonl) that holds the text")
    config: str = cli.knob("", "hf:, fineweb, fineweb-edu: the data set's configuration")
    split: str = cli.knob("train", "hf: the split to read")
    # shards
    name: str = cli.knob("", "name of the data set; by default the source's")
    out_dir: cli.PathName = cli.knob("", "folder of the shards; by default data/<name> beside this script")
    shard_tokens: int = cli.knob(100_000_000, "tokens per shard", at_least=1)
    val_tokens: int | None = cli.knob(
        None, "validation tokens, from the start; by default 10,485,760, or a tenth if smaller", at_least=0
    )
    max_shards: int = cli.knob(0, "sources of shards: most training shards to fetch; 0 for all", at_least=0)
    # work
    workers: int = cli.knob(0, "tokenizing threads; 0 for all cores; shards do not depend on it", at_least=0)
    clear_cache: cli.Switch = cli.knob(False, "delete a download once its shards are read back")
    push_to: str = cli.knob("", "then upload the shards to this data-set repository of the Hub (org/name)")
    merge: cli.Switch = cli.knob(
        False, "only join the parts that several machines made, once they are copied into one folder"
    )
    verify: cli.Switch = cli.knob(False, "write nothing: compare every byte with the manifest")
    inspect: cli.Switch = cli.knob(False, "write nothing: print what is in the shards")

    @property
    def dataset_name(self) -> str:
        stem = self.source.removeprefix(hub.HUB_PREFIX).removeprefix("hf:").partition("@")[0]
        if self.source.startswith("hf:"):
            stem = stem.strip("/")
        else:
            stem = Path(self.source).name.split(".")[0]
        name = self.name or re.sub(r"[^A-Za-z0-9.-]+", "-", stem).strip("-.") or "text"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"--name is {name!r}; use letters, digits, '.', '_' and '-', beginning with a letter"
            )
        return name

    @property
    def folder(self) -> Path:
        return Path(self.out_dir) if self.out_dir else files.DATA / self.dataset_name

    @property
    def downloads(self) -> Path:
        return self.folder / "downloads"

    @property
    def tokenized(self) -> str:
        """The location of the shards if the source consists of shards, else ""."""
        location = sources.TOKENIZED_SOURCES.get(self.source, self.source)
        return location if location.startswith(hub.HUB_PREFIX) else ""

    @property
    def request(self) -> dict:
        """The settings that determine the shards."""
        fields = ("source", "config", "split", "text_field", "documents", "shard_tokens", "val_tokens")
        return {name: getattr(self, name) for name in fields}

    def find_inputs(self, begun: dict | None = None) -> tuple[list[Input], dict]:
        facts = (self.config, self.split, self.text_field, self.documents)
        return sources.find_inputs(sources.Source(self.source, self.downloads, *facts), begun)


# -----------------------------------------------------------------------------
# from documents to shards


def group_into_parts(inputs: list[Input]) -> list[list[Input]]:
    """Groups consecutive files of one split into parts of about PART_BYTES, the same in every process."""
    parts: list[list[Input]] = []
    for file in inputs:
        last = parts[-1] if parts else []
        if last and last[0].split == file.split and sum(f.size for f in last) < PART_BYTES:
            last.append(file)
        else:
            parts.append([file])
    return parts


class Progress:
    """A bar over the bytes of the input files, with documents, tokens and MB of text per second. In a log it
    prints one line per minute."""

    def __init__(self, total_bytes: int):
        wait = 0 if sys.stderr.isatty() else 60
        self.bar = tqdm(
            total=total_bytes or None, desc="tokenizing", unit="B", unit_scale=True,
            mininterval=wait or 0.1, delay=wait,
        )  # fmt: skip
        self.begin = time.perf_counter()
        self.documents = self.tokens = self.text_bytes = self.finished = 0

    def update(self, batch: Batch, tokens: int):
        self.documents += len(batch.texts) - batch.continues
        self.tokens += tokens
        in_python = isinstance(batch.texts, list)
        self.text_bytes += sum(map(len, batch.texts)) if in_python else batch.texts.nbytes
        rate = self.text_bytes / 1e6 / (time.perf_counter() - self.begin)
        self.bar.set_postfix_str(
            f"{self.documents:,} documents, {self.tokens:,} tokens, {rate:.0f} MB of text/s", refresh=False
        )
        self.bar.update(self.finished + batch.position - self.bar.n)

    def finish_file(self, size: int):
        self.finished += size
        self.bar.update(self.finished - self.bar.n)


def write_part(located: Iterable[tuple[Input, Path]], writer: shard_writer.PartWriter, progress: Progress):
    """Tokenizes a part's files. Resumes where an interrupted run stopped."""
    document, skip = 0, writer.tokens_done  # number of the next document; tokens on disk

    def batches() -> Iterator[tuple[Batch, Input | None]]:
        for file, path in located:
            for batch in file.read(path):
                yield batch, None
            yield Batch([]), file

    for batch, finished in files.prefetch(batches(), depth=2):
        if finished:
            progress.finish_file(finished.size)
            continue
        continues = batch.continues and document > 0
        first = document - continues  # of this batch; it may have begun in the previous one
        document = first + len(batch.texts)
        done = min(max(0, writer.documents_done - first), len(batch.texts))
        batch = batch._replace(texts=batch.texts[done:], continues=continues and not done)
        ids = tokenizer.encode_corpus(batch.texts, batch.continues)
        writer.write(ids[skip:])
        progress.update(batch, len(ids))
        skip -= min(skip, len(ids))


def check(cfg: Config):
    """Raises ValueError for invalid values and for flags that do not apply to the source."""
    cli.check_bounds(cfg)
    from_hub = cfg.source.startswith("hf:") and not cfg.tokenized
    applies = {
        "config": from_hub or cfg.source in ("fineweb", "fineweb-edu"),
        "split": from_hub,
        "max_shards": bool(cfg.tokenized),
        **dict.fromkeys(("shard_tokens", "val_tokens", "documents", "merge"), not cfg.tokenized),
    }
    for name, does in applies.items():
        if not does and getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"{cli.flag(name)} does not apply to --source {cfg.source}; leave it out")
    if cfg.verify + cfg.inspect + cfg.merge > 1:
        raise ValueError("--verify, --inspect and --merge are different jobs; give only one of them")


def prepare(cfg: Config) -> Path:
    """Writes the missing parts of the data set that cfg describes. Returns its folder."""
    check(cfg)
    manifest = find_manifest(cfg)
    if manifest and is_whole(cfg, manifest):
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        print(f"{cfg.folder} is already complete ({tokens:,} tokens)")
    elif cfg.tokenized:
        summarize(pull(cfg, manifest), cfg.folder)
    else:
        tokenize(cfg, manifest)
    return cfg.folder


def begin(cfg: Config, plan: dict, may_clear: bool) -> dict:
    """The manifest of a data set that begins, or goes on, with this plan. Raises ValueError if shards there
    were made with another plan."""
    manifest = shard_writer.begin(cfg.folder, plan)
    # A later version's manifest may have facts that change the tokens.
    facts = {key: manifest[key] for key in manifest.keys() - {"format", "complete", "shards"}}
    changed = [key for key in {**plan, **facts} if facts.get(key) != plan.get(key)]
    if not changed:
        return manifest
    if not may_clear or has_shards(cfg.folder):
        raise ValueError(
            f"{cfg.folder} was begun with another {', '.join(changed)}: {cfg.source} has changed, or "
            "another process has other flags, or another version of this project began it. Remove the "
            "folder to start again"
        )
    shard_writer.clear(cfg.folder)
    return shard_writer.begin(cfg.folder, plan)


def tokenize(cfg: Config, manifest: dict | None):
    """Writes this process's share of the parts. Joins all parts once they are complete."""
    if cfg.workers:
        os.environ["RAYON_NUM_THREADS"] = str(cfg.workers)  # read once, when gigatoken starts its threads
    rank, world_size = read_share()
    inputs, about = cfg.find_inputs(manifest)
    if any(file.split == "val" for file in inputs) and cfg.val_tokens is not None:
        raise ValueError(f"--val-tokens is {cfg.val_tokens}; {cfg.source} has its own validation split")
    parts = group_into_parts(inputs)
    plan = {
        "name": cfg.dataset_name,
        **about,
        "request": cfg.request,
        "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256},
        "inputs": sources.describe_inputs(inputs),
        "parts": len(parts),
    }
    manifest = begin(cfg, plan, may_clear=world_size == 1)
    mine = [n for n in shard_writer.find_missing_parts(cfg.folder, manifest) if n % world_size == rank]
    check_disk(cfg, [parts[n] for n in mine])
    is_random = cfg.source == "pydocs" or "order" in about
    if rank == 0 and not is_random and not inputs[0].split and cfg.val_tokens != 0:
        print("note: validation gets the first documents; its loss differs if they are unlike the rest")
    progress = Progress(sum(file.size for n in mine for file in parts[n]))
    # A thread downloads the next file while this one is read.
    located = files.prefetch(((file, file.locate()) for n in mine for file in parts[n]), depth=1)
    for n in mine:
        split = parts[n][0].split
        val_tokens = cfg.val_tokens if n == 0 and not split else 0
        facts = (cfg.shard_tokens, val_tokens, split or "train", shard_writer.hash_plan(manifest))
        with shard_writer.PartWriter(cfg.folder, n, *facts) as writer:
            if writer.shards:
                print(f"part {n}: resuming after {len(writer.shards)} complete shards", flush=True)
            write_part(islice(located, len(parts[n])), writer, progress)
            writer.close(read_back=cfg.clear_cache)
        for file in parts[n]:
            if cfg.clear_cache and file.download:
                file.download.unlink(missing_ok=True)
    progress.bar.close()
    missing = shard_writer.find_missing_parts(cfg.folder, manifest)
    if missing and not shards.is_complete(cfg.folder):
        return print(
            f"process {rank} of {world_size} is done; {len(missing)} of {len(parts)} parts are still missing "
            f"in {cfg.folder}. The last process to finish joins them. Without a shared disk, copy all parts/ "
            "into one folder and run --merge"
        )
    summarize(shard_writer.merge(cfg.folder), cfg.folder)
    if cfg.clear_cache:
        shutil.rmtree(cfg.downloads, ignore_errors=True)
    elif cfg.downloads.exists():
        size = sum(path.stat().st_size for path in cfg.downloads.rglob("*") if path.is_file())
        print(f"{size / 1e9:.1f} GB of downloads are in {cfg.downloads}; --clear-cache removes them")


def find_manifest(cfg: Config) -> dict | None:
    """Returns the folder's manifest, complete or not, or None. Raises ValueError if it is from another
    request."""
    path = cfg.folder / shards.MANIFEST
    if not path.is_file():
        return None
    manifest = shards.load_manifest(path)
    # The first version had no `documents`, the second had `max_shards`.
    old, new = {"documents": "auto", **(manifest.get("request") or {})}, cfg.request
    old.pop("max_shards", None)
    if old == new:
        return manifest
    if not manifest["complete"] and not has_shards(cfg.folder):
        shard_writer.clear(cfg.folder)  # an earlier attempt failed before its first shard
        return None
    differ = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    changed = [f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in differ]
    raise ValueError(
        f"{cfg.folder} holds another data set ({', '.join(changed)}); remove it, or give another --name or "
        "--out-dir"
    )


def has_shards(folder: Path) -> bool:
    """Tells whether the folder or its parts hold shards."""
    return any(path.suffix in (".npy", ".bin") for path in folder.rglob("*"))


def is_whole(cfg: Config, manifest: dict) -> bool:
    """Tells whether the data set is complete. Raises ValueError if a shard is damaged or the source has
    changed."""
    if not manifest["complete"]:
        return False
    # A merge that was interrupted at its end leaves the parts' folder.
    shutil.rmtree(cfg.folder / shard_writer.PARTS, ignore_errors=True)
    try:
        for shard in manifest["shards"]:
            shards.open_shard(cfg.folder / shard["file"], shard["tokens"])
    except (ValueError, FileNotFoundError) as error:
        if cfg.tokenized:  # `pull` fetches missing shards again
            return False
        raise ValueError(f"{error} (remove {cfg.folder} first)") from error
    if cfg.tokenized:
        have = sum(shard["split"] == "train" for shard in manifest["shards"])
        return have >= (cfg.max_shards or manifest.get("available", math.inf))
    with contextlib.suppress(FileNotFoundError):  # the text may be gone once it is in shards
        local = sources.is_local(cfg.source)
        begun = manifest.get("inputs")  # the first version wrote none
        if local and begun and sources.describe_inputs(cfg.find_inputs(manifest)[0]) != begun:
            raise ValueError(
                f"{cfg.source} has changed since {cfg.folder} was written; remove {cfg.folder} and repeat "
                "the command, or give another --name or --out-dir"
            )
    return True


def check_disk(cfg: Config, parts: list[list[Input]]):
    """Raises OSError if the disk has no room for the shards and the downloads."""
    # English has 4.4 bytes per token, a shard has 2, and FineWeb-Edu's parquet files have 2.9.
    packed = (".parquet", *documents.COMPRESSED)
    sizes = [
        f.size * (0.7 if Path(f.name).suffix.lower() in packed else 0.45) for part in parts for f in part
    ]
    downloads = [sum(f.size for f in part if f.download and not f.download.exists()) for part in parts]
    kept = sum(sorted(downloads)[-3:] if cfg.clear_cache else downloads)
    advice = ", or use --clear-cache, which keeps few downloads at a time" if kept else ""
    check_room(cfg.folder, sum(sizes) + kept, advice)


def check_room(folder: Path, need: float, advice: str):
    """Raises OSError, which ends with the advice, if the folder's disk has less than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"{folder} needs about {need / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free: "
            f"free some space or give another --out-dir{advice}"
        )


def summarize(manifest: dict, folder: Path):
    """Prints tokens, documents and shards of each split."""
    for split in shards.SPLITS:
        found = [s for s in manifest["shards"] if s["split"] == split]
        tokens, count = sum(s["tokens"] for s in found), sum(s.get("documents", 0) for s in found)
        texts = f"{count:>10,} documents  " if count else ""
        if found:
            print(f"{split:5} {tokens:>14,} tokens  {texts}{len(found)} shards  in {folder}")


# -----------------------------------------------------------------------------
# shards from and to the Hub


def pull(cfg: Config, manifest: dict | None) -> dict:
    """Downloads the missing shards of a repository on the Hub, in our format or llm.c's, and checks each.
    Returns the manifest."""
    location = cfg.tokenized.partition("@")[0] + f"@{manifest['revision']}" if manifest else cfg.tokenized
    source = hub_shards.HubFolder(location, cache_bytes=math.inf)
    train = [entry for entry in source.entries if entry["split"] == "train"]
    wanted = [entry for entry in source.entries if entry["split"] != "train"]
    wanted += train[: cfg.max_shards or None]
    about = {"name": cfg.dataset_name, "source": source.name, "request": cfg.request, "parts": 0}
    about |= {"revision": source.commit, "available": len(train)}
    manifest = shard_writer.begin(cfg.folder, about) | {"complete": True, "shards": []}
    absent = [entry["file"] for entry in wanted if not (cfg.folder / entry["file"]).exists()]
    need = sum(source.files[name].size for name in absent)
    check_room(cfg.folder, need, ", or give a smaller --max-shards")
    for entry in tqdm(wanted, desc="fetching", unit=" shards", disable=None):
        file, path = source.files[entry["file"]], cfg.folder / entry["file"]
        if path.is_file() and not file.is_whole(path):
            path.unlink()
        documents_in_it = shards.count_documents(path, shards.open_shard(hub.fetch(file, cfg.folder)))
        manifest["shards"].append({**entry, "documents": documents_in_it})
    files.write_json(cfg.folder / shards.MANIFEST, manifest)
    shutil.rmtree(cfg.folder / ".incoming", ignore_errors=True)
    return manifest


def push(cfg: Config):
    """Uploads the shards to --push-to after a check of every byte."""
    manifest = shards.verify(cfg.folder)
    files = [shard["file"] for shard in manifest["shards"]]
    hub.push(cfg.push_to, cfg.folder, [*files, shards.MANIFEST])
    print(f"pushed; train from there with --dataset-path {hub.HUB_PREFIX}{cfg.push_to}")


# -----------------------------------------------------------------------------
# inspection


def inspect(folder: Path, most_shards: int = 20):
    """Prints the manifest, tokens and documents per split, document lengths, bytes per token, and a few
    random documents."""
    manifest = shards.read_manifest(folder) or {"shards": shards.list_shards(folder)}
    facts = {key: value for key, value in manifest.items() if key != "shards"}
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    for shard in manifest["shards"]:
        shard.setdefault("tokens", len(shards.open_entry(folder, shard)))
    summarize(manifest, folder)

    draw = random.Random(0)
    entries = draw.sample(manifest["shards"], min(most_shards, len(manifest["shards"])))
    lengths, counts, texts = [], np.zeros(2**16, dtype=np.int64), []
    for shard in tqdm(entries, desc="reading", unit=" shards", disable=None, leave=False):
        ids = shards.open_entry(folder, shard)
        starts = np.flatnonzero(ids == tokenizer.END_OF_TEXT)
        lengths.append(np.diff(starts) - 1)  # of the documents that end in their shard
        counts += np.bincount(ids, minlength=2**16)
        for start in draw.sample(starts.tolist(), min(2, len(starts))):
            document = ids[start + 1 : start + 61].tolist()
            texts.append(f"  {shard['file']} at {start:,}: {tokenizer.decode_until_end(document)!r}")
    if len(whole := np.concatenate(lengths)):
        print_histogram(whole)
    counts[tokenizer.END_OF_TEXT] = 0
    text_bytes = sum(len(token) * int(counts[rank]) for token, rank in tokenizer.load_ranks().items())
    print(f"\n{text_bytes / max(1, counts.sum()):.2f} bytes per token (from {len(entries)} shards)\n")
    print("\n".join(draw.sample(texts, min(6, len(texts)))))


def print_histogram(lengths: np.ndarray):
    """Prints a histogram of tokens per document; each bin is twice as wide as the one before."""
    print(f"\ntokens per document: median {np.median(lengths):,.0f}, longest {lengths.max():,}")
    bins = np.bincount(np.ceil(np.log2(lengths + 1)).astype(int))
    for power in range(np.flatnonzero(bins)[0], len(bins)):
        low, high, bar = 2**power // 2, 2**power - 1, "#" * round(50 * bins[power] / bins.max())
        print(f"  {low:>9,} to {high:>9,}  {bar:50} {bins[power]:,}")


def main(cfg: Config):
    check(cfg)
    if cfg.verify:
        manifest = shards.verify(cfg.folder)
        return print(f"{cfg.folder}: all {len(manifest['shards'])} shards are as written")
    if cfg.inspect:
        return inspect(cfg.folder)
    if cfg.push_to:
        hub.check_push(cfg.push_to)
    if cfg.merge:
        summarize(shard_writer.merge(cfg.folder), cfg.folder)
    else:
        prepare(cfg)
    if cfg.push_to and shards.is_complete(cfg.folder):  # only the process that completes it
        push(cfg)


if __name__ == "__main__":
    again = "interrupted; the same command goes on from here"
    cli.run(lambda: main(cli.parse(Config, __doc__)), interrupted=again, outlives_console=True)
