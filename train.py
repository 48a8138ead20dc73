"""Train a hybrid network on a long tail: python train.py --dataset cifar100 --imb 100 --method dscl"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

try:
    import torch
    import torchvision

    import ltcl
except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises either
    print(f"error: torch, torchvision or numpy does not import ({str(error).splitlines()[0]}): "
          "install a set that fits, pip install --upgrade torch torchvision numpy", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the whole usage as well
        raise ltcl.InputError(f"{message}; python train.py --help lists the flags")


def read_config(argv):
    """The command line as a Config: a field is a flag; what isn't given is the data set's preset."""
    parser = Parser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(ltcl.Config):
        presets = [f"{name}: {preset[f.name]}" for name, preset in ltcl.PRESETS.items()
                   if f.name in preset and isinstance(name, str)]
        choices = ", ".join(f.metadata["choices"] or [])
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['help']}{choices and f' ({choices})'} "
                                 f"[{'; '.join([str(f.default) or 'empty', *presets])}]")
    return ltcl.Config.of(**vars(parser.parse_args(argv)))


def run_folder(config):
    """The folder for a new run. Raises InputError where it holds one already."""
    if config.out:
        out = Path(config.out)
        ltcl.require(not any((out / name).exists() for name in ("config.json", "log.jsonl", "last.pt")),
                     f"--out {out} already holds a run: name another folder")
        ltcl.require(out.is_dir() or not out.exists(), f"--out {out} is a file: name a folder")
        return out
    name = f"{Path(config.dataset).stem}-imb{config.imb:g}-{config.method}-{config.net}-seed{config.seed}"
    return next(out for n in range(1, 10 ** 6) if not (out := Path("runs") / f"{name}-{n}").exists())


def write_whole(path, write):
    """Let write(temporary path) make the file, then rename it: never half a file at path."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def live(text):
    """A line that the next one overwrites; on a terminal alone."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="", flush=True)


def small(x):
    return torch.nn.functional.interpolate(x, (64, 64), mode="area")


def save_views(trainer, path, columns=20, rows=8):
    """A picture of the long tail: the classes from head to tail, each a pile of training images as
    high as the class is large, and below it two views of one image."""
    order = trainer.counts.argsort(descending=True, stable=True)
    order = order[torch.linspace(0, len(order) - 1, min(columns, len(order))).long()].tolist()
    found = [(trainer.y == c).nonzero()[:rows, 0] for c in order]
    pixels, _ = next(trainer.images(trainer.x, [torch.cat(found)]))             # uint8 [n,3,H,W]
    images = pixels.cpu().split([len(f) for f in found])                        # [<=rows,3,H,W] of each class
    height = [math.ceil(rows * trainer.counts[c] / trainer.counts.max()) for c in order]
    first, rng = torch.stack([x[0] for x in images]), torch.Generator().manual_seed(0)
    query, key, _, _ = trainer.augmentation
    views = [small(view(first, rng, trainer.size)) for view in (query, key)]     # [columns,3,64,64] each
    images = [small(x / 255) for x in images]
    white = torch.ones(3, 64, 64)
    pile = [x[h - r] if 0 <= h - r < len(x) else white for r in range(rows, 0, -1) for x, h in zip(images, height)]
    grid = torch.cat([torch.stack(pile + [white] * len(order)), *views])
    torchvision.utils.save_image(grid, path, format="png", nrow=len(order), padding=4, pad_value=1)


EPOCH = dict.fromkeys(("epoch", "loss", "loss_contrast", "loss_pbsd", "loss_ce", "contrast_weight", "lr", "cos_positive",
                       "cos_negative", "spread", "top1", "balanced", "many", "medium", "few", "seconds"))


def train(config):
    """Train one run: config.json, log.jsonl (an object an epoch) and last.pt go to its folder.
    Returns the last epoch's record and the trainer."""
    out = run_folder(config)
    trainer = ltcl.Trainer(config, ltcl.load_dataset(config.dataset, config.data, config.train_list, config.test_list,
                                                      config.size))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", lambda p: p.write_text(json.dumps(asdict(config) | dict(out=str(out)), indent=1)))
    write_whole(out / "views.png", lambda p: save_views(trainer, p))
    print(f"{len(trainer.y)} training images in {len(trainer.counts)} classes of {trainer.counts.max()} to "
          f"{trainer.counts.min()}, {len(trainer.y_test)} test images; on {trainer.device}; into {out}", flush=True)
    start = time.time()
    while trainer.epoch < trainer.epochs:
        began, head = time.time(), f"epoch {trainer.epoch + 1:3}/{trainer.epochs}"
        record = EPOCH | trainer.train_epoch(lambda i, steps: live(f"{head}  step {i + 1}/{steps}"))
        record |= (trainer.evaluate() if record["loss_ce"] is not None else {}) | dict(epoch=trainer.epoch, seconds=round(time.time() - began, 3))
        write_whole(out / "last.pt", lambda p: torch.save(trainer.state_dict(), p))
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
        left = (time.time() - start) / trainer.epoch * (trainer.epochs - trainer.epoch)
        live("")
        print(f"{head}  loss {record['loss']:6.3f}  contrast weight {record['contrast_weight']:.2f}  lr {record['lr']:.4f}"
              f"  {'no classifier yet' if record['top1'] is None else 'top-1 {:5.2f} %'.format(record['top1'])}  {record['seconds']:5.1f} s  {left / 60:5.1f} min left", flush=True)
    print_result(config, record, trainer, out, time.time() - start)
    return record, trainer


def print_result(config, record, trainer, out, seconds):
    C, masks = len(trainer.counts), ltcl.shot_groups(trainer.counts)
    classes = {"top1": C} | {name: int(mask.sum()) for name, mask in masks.items()}
    print(f"\n{config.method} on {config.dataset}, imbalance {config.imb:g}, {config.net}, seed {config.seed}: "
          f"{trainer.epochs} epochs in {seconds:.0f} s on {trainer.device}, last epoch's accuracy\n")
    for title, cells in (("", ["top-1", *masks]), ("classes", classes.values()),
                         ("accuracy %", [f"{record[name]:.2f}" if n else "n/a" for name, n in classes.items()]),
                         ("chance %", [f"{100 / C:.2f}" if n else "n/a" for n in classes.values()])):
        print(f"  {title:12}" + "".join(f"{cell:>9}" for cell in cells))
    next_try = "--method ce" if config.method != "ce" else "--dataset cifar100 --imb 100 --method dscl"
    if config.dataset != "shapes" and config.method != "ce":
        next_try = f"--dataset {config.dataset} --imb {config.imb:g} --method ce"
    print(f"\nSaved in {out}. To try next: python train.py {next_try}")


def main(argv=None):
    try:
        config = read_config(argv)
        print(" ".join(f"{name}={value}" for name, value in asdict(config).items()))
        train(config)
    except (ltcl.InputError, OSError) as error:
        live("")
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
