"""Train a hybrid network on a long tail: python train.py --dataset cifar100 --imb 100 --method dscl"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

try:
    import torch
    import torchvision

    import ltcl
except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises either
    print(f"error: torch, torchvision or numpy does not import ({str(error).splitlines()[0]}): "
          "install a set that fits, pip install --upgrade torch torchvision numpy", file=sys.stderr)
    sys.exit(2)


# --- settings: a field is a flag ---------------------------------------------------------------

def setting(default, help, choices=None, low=None, high=None):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


TINY = 1e-9  # "above zero", as a bound


@dataclass
class Config:
    """[H]'s CIFAR settings are the defaults; PRESETS holds what other data sets change."""
    dataset: str = setting("shapes", "shapes, cifar10, cifar100, folder, imagenet_lt, inat18 or the path of an .npz file")
    imb: float = setting(100.0, "images of the largest class over those of the smallest; 1: all, as it is", low=1)
    method: str = setting("dscl", "contrastive loss; ce: cross-entropy alone", ["ce", "sc", "psc", "dscl"])
    data: str = setting("data", "folder of the downloaded data sets, or of the image files")
    train_list: str = setting("", "folder: a file with lines 'path label', the paths below --data; empty: class folders")
    test_list: str = setting("", "folder: the same of the test images")
    workers: int = setting(min(4, os.cpu_count() or 1), "processes that read image files", low=0)
    out: str = setting("", "folder of the run; empty: a new one under runs/")
    net: str = setting("resnet32", "backbone", ltcl.NETS)
    epochs: int = setting(200, "passes over the training set", low=1)
    batch_size: int = setting(512, "images a step, in each branch", low=1)
    lr: float = setting(0.5, "peak learning rate of SGD", low=TINY)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = setting(1e-4, "L2 penalty", low=0)
    warmup: float = setting(5.0, "epochs of linear warm-up, at most a fifth of all", low=0)
    schedule: str = setting("step", "learning rate: x0.1 after 60 %% and 80 %%, or a cosine", ["step", "cosine"])
    tau: float = setting(0.1, "temperature of the contrastive loss", low=TINY)
    alpha: float = setting(0.1, "DSCL's weight of the augmentation", low=0, high=1)
    pbsd: float = setting(1.5, "weight of patch-based self-distillation beside the contrastive loss; 0: none", low=0)
    patches: int = setting(5, "patches an image", low=1)
    patch_size: int = setting(0, "side of the resized patches in pixels; 0: half a crop, 2/7 of a resized view", low=0)
    box_scale: str = setting("area", "a patch is 0.05-0.6 of the view's area [D, code] or side [D, supplement]",
                             ["area", "side"])
    ema: float = setting(0.0, "decay of the momentum encoder that makes DSCL's keys; 0: none", low=0, high=1)
    queue: int = setting(0, "keys in DSCL's memory; 0: the batch is the memory", low=0)
    experts: int = setting(1, "copies of the last stage and the heads, logits averaged", low=1, high=100)
    classifier: str = setting("auto", "its batches: instance-balanced; class-balanced [H]; logit-adjusted: instance-balanced, the log "
                              "of the class sizes added to the logits (Menon et al. 2021); auto: class-balanced, but for ce",
                              ["auto", "instance-balanced", "class-balanced", "logit-adjusted"])
    curriculum: str = setting("parabolic", "contrast weight over the epochs", list(ltcl.CURRICULA))
    stage2_epochs: int = setting(40, "two-stage: epochs of the classifier", low=1)
    stage2_batch: int = setting(128, "two-stage: its batch", low=1)
    stage2_lr: float = setting(0.1, "two-stage: its learning rate, x0.1 after a half and three quarters", low=TINY)
    aug: str = setting("auto", "crop: padded crop, flip, grayscale [H]; resized: resized crop, colours, blur [D]; "
                       "auto: resized for image files", ["auto", "crop", "resized"])
    size: int = setting(224, "side of the views of image files in pixels", low=8)
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch always has one", low=1)
    seed: int = setting(0, "seed of weights, batches and views; the long tail's own split is fixed", low=0, high=2 ** 63 - 1)
    device: str = setting("auto", "cuda, mps or cpu; auto: the first there is")
    compile: str = setting("off", "torch.compile the backbone", ["off", "on"])
    amp: str = setting("auto", "mixed precision; auto: on CUDA alone", ["auto", "off", "bf16", "fp16"])

    def __post_init__(self):
        for f in fields(self):
            value, m = getattr(self, f.name), f.metadata
            name = "--" + f.name.replace("_", "-")
            if f.type is float and type(value) is int:
                setattr(self, f.name, value := float(value))
            ltcl.require(type(value) is f.type, f"{name} is {value!r}: it takes a {f.type.__name__}")
            ltcl.require(m["choices"] is None or value in m["choices"],
                         f"{name} {value!r} is unknown: choose {', '.join(m['choices'] or [])}")
            ltcl.require(f.type is not float or math.isfinite(value), f"{name} is {value}: give a finite number")
            ltcl.require(m["low"] is None or value >= m["low"], f"{name} is {value}: it must be "
                         + ("above 0" if m["low"] == TINY else f"{m['low']} or more"))
            ltcl.require(m["high"] is None or value <= m["high"], f"{name} is {value}: it must be {m['high']} or less")
        ltcl.require(self.method == "dscl" or not (self.ema or self.queue), f"--ema and --queue are DSCL's: "
                     f"leave them out for --method {self.method}")

    @classmethod
    def of(cls, **given):
        """The presets of data set and method, overridden by what is given."""
        dataset, method = given.get("dataset", cls.dataset), given.get("method", cls.method)
        presets = PRESETS.get(method, {}), PRESETS.get(dataset, PRESETS[".npz"]), PRESETS.get((dataset, method), {})
        return cls(**presets[0] | presets[1] | presets[2] | given)


IMAGENET = dict(imb=1.0, net="resnet50", batch_size=256, lr=0.1, weight_decay=5e-4, warmup=10.0, schedule="cosine",
                tau=0.07, curriculum="two-stage", stage2_batch=2048, stage2_lr=10.0)    # [D, settings]
MEMORY = dict(ema=0.999, queue=65536)

PRESETS = {
    "shapes": dict(net="resnet8", epochs=18, batch_size=32, lr=0.2, warmup=2.0, patches=2),
    "cifar10": {},
    "cifar100": {},
    ("cifar10", "psc"): dict(tau=1.0),  # [H, settings]
    ".npz": dict(imb=1.0),              # your own images are taken as they are
    "folder": dict(imb=1.0, net="resnet18", batch_size=256, lr=0.1, weight_decay=5e-4, schedule="cosine"),
    "imagenet_lt": IMAGENET | dict(train_list="ImageNet_LT_train.txt", test_list="ImageNet_LT_test.txt"),
    ("imagenet_lt", "dscl"): MEMORY,
    "inat18": IMAGENET | dict(train_list="iNaturalist18_train.txt", test_list="iNaturalist18_val.txt"),
    ("inat18", "dscl"): MEMORY,
    "ce": dict(pbsd=0.0), "sc": dict(pbsd=0.0), "psc": dict(pbsd=0.0),
}


# --- the command line --------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the whole usage as well
        raise ltcl.InputError(f"{message}; python train.py --help lists the flags")


def read_config(argv):
    """The command line as a Config: a field is a flag; what isn't given is the data set's preset."""
    parser = Parser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        presets = [f"{name}: {preset[f.name]}" for name, preset in PRESETS.items()
                   if f.name in preset and isinstance(name, str)]
        choices = ", ".join(f.metadata["choices"] or [])
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['help']}{choices and f' ({choices})'} "
                                 f"[{'; '.join([str(f.default) or 'empty', *presets])}]")
    return Config.of(**vars(parser.parse_args(argv)))


# --- a run and its files -----------------------------------------------------------------------

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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ltcl.InputError(f"--out {out} cannot be made ({error.strerror}): name another folder") from None
    ltcl.write_whole(out / "config.json", lambda p: p.write_text(json.dumps(asdict(config) | dict(out=str(out)), indent=1)))
    ltcl.write_whole(out / "views.png", lambda p: save_views(trainer, p))
    print(f"{len(trainer.y)} training images in {len(trainer.counts)} classes of {trainer.counts.max()} to "
          f"{trainer.counts.min()}, {len(trainer.y_test)} test images; on {trainer.device}; into {out}", flush=True)
    start = time.time()

    def left(done):                                     # epochs done, fractions counted
        return f"{(time.time() - start) / max(done, 1e-3) * (trainer.epochs - done) / 60:.1f} min left"

    while trainer.epoch < trainer.epochs:
        began, epoch = time.time(), trainer.epoch
        head = f"epoch {epoch + 1:3}/{trainer.epochs}"
        record = EPOCH | trainer.train_epoch(lambda i, n: live(f"{head}  step {i + 1}/{n}  {left(epoch + i / n)}"))
        due = trainer.epoch % config.eval_every == 0 or trainer.epoch == trainer.epochs
        record |= trainer.evaluate() if due and record["loss_ce"] is not None else {}
        record |= dict(epoch=trainer.epoch, seconds=round(time.time() - began, 3))
        ltcl.write_whole(out / "last.pt", lambda p: torch.save(trainer.state_dict(), p))
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
        top1 = ("no classifier yet" if record["loss_ce"] is None else "not evaluated" if record["top1"] is None
                else f"top-1 {record['top1']:5.2f} %")
        live("")
        print(f"{head}  loss {record['loss']:6.3f}  contrast weight {record['contrast_weight']:.2f}  "
              f"lr {record['lr']:.4f}  {top1}  {record['seconds']:5.1f} s  {left(trainer.epoch)}", flush=True)
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
    if config.dataset == "shapes":
        again = "--method ce" if config.method != "ce" else "--dataset cifar100 --imb 100 --method dscl"
    else:
        again = f"--dataset {config.dataset} --data {config.data} --imb {config.imb:g} --net {config.net} --method "
        again += "ce" if config.method != "ce" else "dscl"
    print(f"\nSaved in {out}. To try next: python train.py {again}")


def main(argv=None):
    try:
        config = read_config(argv)
        print(" ".join(f"{name}={value}" for name, value in asdict(config).items()))
        train(config)
    except (ltcl.InputError, OSError) as error:
        live("")
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "allocate" not in str(error):                # torch's words for too little memory, on every device
            raise
        live("")
        print(f"error: too little memory (--device {config.device}): take a smaller --batch-size or --queue", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        live("")
        print("stopped: last.pt keeps the last whole epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
