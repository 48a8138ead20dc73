"""Train a hybrid network on a long tail: python train.py --dataset cifar100 --imb 100 --method dscl"""

import argparse
import contextlib
import csv
import ctypes
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import traceback
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

try:
    import torch
    import torch.distributed as dist
    import torchvision

    import ltcl
except KeyboardInterrupt:
    sys.exit(130)
except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises either
    print(f"error: torch, torchvision or numpy cannot be imported ({str(error).splitlines()[0]}): "
          "install a set that fits, pip install --upgrade torch torchvision numpy", file=sys.stderr)
    sys.exit(2)


RANK, RANKS = 0, 1                                      # which process this is, and of how many
if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():         # started by torchrun
    RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# --- settings: a field is a flag ---------------------------------------------------------------

def flag(name):
    return "--" + name.replace("_", "-")


def say(text):
    """To the user, once: of several processes the first one does."""
    if RANK == 0:
        print(text, file=sys.stderr)


def refuse(useless, action):
    """Refuse flags, a set of names, that mean nothing beside this action."""
    ltcl.require(not useless, f"{flag(min(useless, default=''))} has no meaning with {action}: leave it out")


def setting(default, help, choices=(), low=None, high=None):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


TINY, BELOW_ONE = math.ulp(0.0), 1 - 1e-9  # "above zero" and "below one", as bounds


@dataclass
class Config:
    """A run's settings. The defaults are [H]'s on CIFAR; Config.of also applies what PRESETS holds for other data sets, methods
    and recipes. A new field is a flag, is saved, and stands in a row of results; see also refuse_idle, USEFUL, NO_MATTER."""
    dataset: str = setting("shapes", "shapes, cifar10, cifar100, folder, imagenet_lt, inat18 or the path of an .npz file")
    imb: float = setting(100.0, "images of the largest class over those of the smallest, to which images are removed; 1: all "
                         "are kept", low=1)
    method: str = setting("dscl", "contrastive loss: supervised, prototypical or decoupled; ce: cross-entropy alone",
                          ["ce", "sc", "psc", "dscl"])
    data: str = setting("data", "folder of the downloaded data sets, or of the image files")
    train_list: str = setting("", "folder: a file with lines 'path label', the paths below --data; empty: class folders")
    test_list: str = setting("", "folder: the same for the test images")
    workers: int = setting(min(4, os.cpu_count() or 1), "processes that read image files", low=0)
    out: str = setting("", "folder of the run; empty: a new one under runs/")
    net: str = setting("resnet32", "backbone", ltcl.NETS)
    hidden: int = setting(512, "width of the projection head's hidden layer", low=1, high=65536)
    dim: int = setting(128, "dimensions of the embeddings", low=2, high=65536)
    epochs: int = setting(200, "passes over the training set", low=1, high=10 ** 6)
    batch_size: int = setting(512, "images per step in each branch (contrast, classifier), of all processes together", low=1)
    lr: float = setting(0.5, "peak learning rate of SGD", low=TINY, high=10 ** 6)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=BELOW_ONE)
    weight_decay: float = setting(1e-4, "L2 penalty, but not in a second stage", low=0, high=10 ** 6)
    warmup: float = setting(5.0, "epochs of linear warm-up, at most a fifth of all", low=0)
    schedule: str = setting("step", "learning rate: x0.1 after 60 %% and 80 %%, or a cosine", ["step", "cosine"])
    tau: float = setting(0.1, "temperature of the contrastive loss", low=TINY)
    alpha: float = setting(0.1, "DSCL's weight of the augmentation", low=0, high=1)
    pbsd: float = setting(1.5, "weight of patch-based self-distillation beside the contrastive loss; 0: none", low=0)
    patches: int = setting(5, "patches per image", low=1, high=1000)
    patch_size: int = setting(0, "side of the resized patches in pixels; 0: half the view's, with --aug resized 2/7", low=0,
                              high=1024)
    box_scale: str = setting("area", "a patch is 0.05-0.6 of the view's area [D, code] or side [D, supplement]",
                             ["area", "side"])
    ema: float = setting(0.0, "decay of the momentum encoder that makes DSCL's keys; 0: none", low=0, high=BELOW_ONE)
    queue: int = setting(0, "keys in DSCL's memory; 0: the batch is the memory", low=0, high=10 ** 15)
    experts: int = setting(1, "copies of the last stage and the heads, logits averaged", low=1, high=100)
    classifier: str = setting("auto", "its batches: instance-balanced; class-balanced [H]; logit-adjusted: instance-balanced, "
                              "the log of the class sizes added to the logits (Menon et al. 2021); auto: class-balanced, "
                              "but for ce instance-balanced until a second stage",
                              ["auto", "instance-balanced", "class-balanced", "logit-adjusted"])
    adjust: float = setting(1.0, "logit-adjusted: factor of the log of the class sizes; above 1 leans to the tail", low=0)
    classifier_views: int = setting(1, "views per step of each of the classifier's images: batch augmentation (Hoffer et al. "
                                    "2020)", low=1, high=100)
    logits: str = setting("linear", "the classifier's: linear, or cosines times 30", ["linear", "cosine"])
    average: float = setting(0.0, "decay of the averaged weights that are evaluated; 0: the last ones", low=0, high=BELOW_ONE)
    holdout: float = setting(0.0, "share of each training class that takes the test set's place: to choose settings by, or "
                             "where there is none", low=0, high=0.9)
    recipe: str = setting("paper", "paper: the paper's settings; record: strong views, logit adjustment and more, after ProCo "
                          "and BCL", ["paper", "record"])
    curriculum: str = setting("parabolic", "contrast weight over the epochs", list(ltcl.CURRICULA))
    stage2_epochs: int = setting(40, "two-stage: epochs of the classifier", low=1, high=10 ** 6)
    stage2_batch: int = setting(128, "two-stage: images per step of the second stage", low=1)
    stage2_lr: float = setting(0.1, "two-stage: learning rate of the second stage, x0.1 after a half and three quarters",
                               low=TINY, high=10 ** 6)
    aug: str = setting("auto", "crop: padded crop, flip, grayscale [H]; resized: resized crop, colours, blur [D]; strong: "
                       "resized crop and colours, for the classifier TrivialAugment and Cutout; auto: resized for image files, "
                       "but small ones of one size, else crop",
                       ["auto", "crop", "resized", "strong"])
    size: int = setting(224, "side of the resized views of image files in pixels; they are read at 8/7 of it, which other "
                        "views keep; small ones of one size keep theirs", low=8, high=8192)
    save_every: int = setting(1, "epochs between two saves of last.pt; long epochs are saved every ten minutes as well", low=1)
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch always has one", low=1)
    seed: int = setting(0, "seed of weights, batches and views; the long tail's own split is fixed", low=0, high=2 ** 63 - 1)
    device: str = setting("auto", "cuda, mps or cpu; auto: the first there is")
    compile: str = setting("off", "torch.compile the backbone", ["off", "on"])
    batchnorm: str = setting("local", "with several GPUs: statistics of each one's images, or of all", ["local", "sync"])
    timeout: float = setting(600.0, "seconds to wait for another process of the same run", low=TINY, high=1e6)
    amp: str = setting("auto", "mixed precision; auto: on CUDA alone", ["auto", "off", "bf16", "fp16"])

    def __post_init__(self):
        for f in fields(self):
            name, value, m = flag(f.name), getattr(self, f.name), f.metadata
            if f.type is float and isinstance(value, int | float) and type(value) is not bool:     # np.float64 is a float, too
                setattr(self, f.name, value := float(value))
            ltcl.require(type(value) is f.type, f"{name} is {value!r}: it must be of type {f.type.__name__}")
            ltcl.require(not m["choices"] or value in m["choices"],
                         f"{name} {value!r} is unknown: choose {', '.join(m['choices'])}")
            ltcl.require(f.type is not float or math.isfinite(value), f"{name} is {value}: give a finite number")
            ltcl.require(m["low"] is None or value >= m["low"], f"{name} is {value}: it must be "
                         + ("above 0" if m["low"] == TINY else f"{m['low']} or more"))
            ltcl.require(m["high"] is None or value <= m["high"], f"{name} is {value}: it must be "
                         + ("below 1" if m["high"] == BELOW_ONE else f"{m['high']} or less"))
        ltcl.require(self.dataset in ltcl.FILE_SETS or not (self.train_list or self.test_list), "--train-list and --test-list "
                     f"are for {', '.join(ltcl.FILE_SETS)}: leave them out, or change --dataset {self.dataset}")
        ltcl.require(bool(self.train_list) == bool(self.test_list) or self.train_list and self.holdout,
                     "--train-list and --test-list go together: give both, or --holdout in place of the second")
        for name in ["data", "train_list", "test_list"] + ["dataset"] * self.dataset.endswith(".npz"):
            if path := getattr(self, name):             # DIR/ is DIR: the same run, and the same row of results
                setattr(self, name, str(Path(path)))

    @classmethod
    def of(cls, **given):
        """The presets of data set, method and recipe, overridden by what is given."""
        dataset, method, recipe = (given.get(name, getattr(cls, name)) for name in ("dataset", "method", "recipe"))
        preset = {}
        for key in (method, Path(str(dataset)).suffix or dataset, f"{dataset} {method}", recipe, f"{dataset} {recipe}"):
            preset |= PRESETS.get(key, {})
        config = cls(**preset | given)
        config.refuse_idle({name for name in given if given[name] != preset.get(name, getattr(cls, name))},
                           "two-stage" in (config.curriculum, preset.get("curriculum")))
        return config

    def refuse_idle(self, changed, two_stage):
        """Refuse changed settings that have no meaning beside the others. two_stage: the curriculum, or the one that it
        replaces, is two-stage."""
        method, patches = f"--method {self.method}", {"patches", "patch_size", "box_scale"}
        without_files = f"--dataset {self.dataset} (for image files take --dataset folder)"
        for idle, names, action in (
                (self.method == "ce", {"tau", "pbsd", "hidden", "dim"} | patches, method),
                (self.method == "ce" and not two_stage, {"curriculum"}, method),
                (self.method != "dscl", {"alpha", "ema", "queue"}, method),
                (not self.pbsd, patches, "--pbsd 0"),
                (self.classifier != "logit-adjusted", {"adjust"}, f"--classifier {self.classifier}"),
                (self.curriculum != "two-stage", {"stage2_epochs", "stage2_batch", "stage2_lr"},
                 f"--curriculum {self.curriculum}"),
                (self.dataset not in ltcl.FILE_SETS, {"size", "workers"}, without_files),
                (self.dataset == "shapes" or self.dataset.endswith(".npz"), {"data"}, without_files),
                (RANKS == 1, {"timeout"}, "one process")):
            if idle:
                refuse(changed & names, action)


IMAGENET = dict(imb=1.0, net="resnet50", batch_size=256, lr=0.1, weight_decay=5e-4, warmup=10.0, schedule="cosine",
                tau=0.07, curriculum="two-stage", stage2_batch=2048, stage2_lr=10.0)    # [D, settings]
MEMORY = dict(ema=0.999, queue=65536)

PRESETS = {
    "shapes": dict(net="resnet8", epochs=18, batch_size=32, lr=0.2, warmup=2.0, patches=2),
    "cifar10 psc": dict(tau=1.0),       # [H, settings]
    ".npz": dict(imb=1.0),              # your own images are taken as they are
    "folder": dict(imb=1.0, net="resnet18", batch_size=256, lr=0.1, weight_decay=5e-4, schedule="cosine"),
    "imagenet_lt": IMAGENET | dict(train_list="ImageNet_LT_train.txt", test_list="ImageNet_LT_test.txt"),
    "imagenet_lt dscl": MEMORY,
    "inat18": IMAGENET | dict(train_list="iNaturalist18_train.txt", test_list="iNaturalist18_val.txt"),
    "inat18 dscl": MEMORY,
    # weight 0.5 halves both losses: the same as lr 0.15 and weight decay 5e-4 on whole ones
    "record": dict(aug="strong", classifier="logit-adjusted", curriculum="constant", batch_size=256, schedule="cosine",
                   lr=0.3, weight_decay=2.5e-4, tau=0.1),
    "cifar10 record": dict(adjust=1.5),     # found on held-out images at imbalance 100
    "ce": dict(pbsd=0.0), "sc": dict(pbsd=0.0), "psc": dict(pbsd=0.0),
}


# --- the command line --------------------------------------------------------------------------

USEFUL = {"eval": {"dataset", "data", "train_list", "test_list", "workers", "device", "amp"}, "predict": {"device"},
          "report": set(), "tables": set()}             # the settings that mean something where nothing is trained


def read_arguments(argv):
    """What is to be done, and the settings that are given on the command line, {field: value}."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, epilog="In [] at the end: the default, then what a "
                                     "data set, method or recipe has in its place; of several the last one counts. 'folder:' "
                                     "and the like: with that choice alone. [H] and [D]: the two papers, see README.md.")
    parser.error = lambda message: ltcl.require(False, f"{message}; python train.py --help lists the flags")
    one_of = parser.add_argument_group("what to do: one of these, or train a new run").add_mutually_exclusive_group()
    one_of.add_argument("--resume", action="store_true",
                        help="go on with the run in --out; if there is none and settings are given, start it")
    one_of.add_argument("--seeds", metavar="S", type=int, nargs="+",
                        help="one run per seed, in OUT-seedS; those that were stopped go on")
    one_of.add_argument("--eval", metavar="RUN", type=Path, help="accuracy of a trained run: its folder or a .pt file")
    one_of.add_argument("--predict", metavar=("RUN", "IMAGE"), nargs="+", help="the likeliest classes of your own pictures")
    one_of.add_argument("--report", metavar="RUN", type=Path, nargs="+",
                        help="draw runs side by side into report.png in the first one's folder (needs matplotlib)")
    one_of.add_argument("--tables", metavar="FILE", type=Path, help="print a file of --results as Markdown tables")
    parser.add_argument("--results", metavar="FILE", type=Path,
                        help="add a row for each run to a .csv file; runs that it has are skipped")
    parser.add_argument("--per-class", action="store_true", help="with --eval: the accuracy of each class")
    parser.add_argument("--quiet", action="store_true", help="print the result alone, and warnings")
    settings = parser.add_argument_group("settings of a run")
    for f in fields(Config):
        presets = [f"{name}: {preset[f.name]}" for name, preset in PRESETS.items() if f.name in preset]
        choices = ", ".join(f.metadata["choices"])
        settings.add_argument(flag(f.name), type=f.type, metavar=f.type.__name__.upper(), default=argparse.SUPPRESS,
                              help=f"{f.metadata['help']}{choices and f' ({choices})'} "
                                   f"[{'; '.join([str(f.default) or 'empty', *presets])}]")
    do = parser.parse_args(argv)
    given = {f.name: getattr(do, f.name) for f in fields(Config) if f.name in do}
    for action, useful in USEFUL.items():
        if getattr(do, action):
            refuse(given.keys() - useful | {name for name in ("results", "quiet") if getattr(do, name)}, f"--{action}")
            ltcl.require(RANKS == 1, f"--{action} takes one process: leave torchrun out")
    if do.seeds:
        refuse({"seed"} & given.keys(), "--seeds")
    ltcl.require(do.eval or not do.per_class, "--per-class goes with --eval RUN")
    return do, given


# --- going on with a run -----------------------------------------------------------------------

NO_MATTER = {"out", "data", "train_list", "test_list", "workers", "save_every", "eval_every", "timeout"}   # to the training
MAY_CHANGE = {"device", "compile", "amp", "batchnorm"}  # when a run goes on: how it computes, so that its numbers differ


def saved(run):
    """The state of a run and its settings. Raises InputError."""
    state = ltcl.read_checkpoint(run)
    try:
        return state, Config(**state["config"])
    except (TypeError, ltcl.InputError) as error:
        raise ltcl.InputError(f"{run}: its settings are not this program's ({error}): use the version that made it") from None


def course(c, epochs):
    """Learning rate and contrast weight over the first epochs, a hundred times in each. c: the settings."""
    return [(ltcl.learning_rate(t / 100, c), c.method != "ce" and ltcl.contrast_weight((t - 1) // 100, c.epochs, c.curriculum))
            for t in range(1, 100 * epochs + 1)]


def epochs_begun(state):
    """The epochs done in both stages, and the one in work."""
    return state["epoch"] + bool(state["history"])


def refuse_another_run(old, new, given, begun):
    """Refuse given settings that would change what the run in --out has trained in the epochs begun."""
    notes = []
    for name in given:
        a, b = getattr(old, name), getattr(new, name)
        moved = name == "dataset" and a.endswith(".npz") and b.endswith(".npz")         # the fingerprint knows the images
        if a == b or name in NO_MATTER or moved:
            continue
        if name in ("epochs", "stage2_epochs"):
            ltcl.require(course(old, begun) == course(new, begun), f"{flag(name)} {b}: the run was begun with {a}, its epochs so "
                         f"far ({begun}) would have had another learning rate or contrast weight: start a new run")
        else:
            ltcl.require(name in MAY_CHANGE, f"{flag(name)} is {b!r}, but the run in {new.out} has {a!r}: take that to go on, "
                         "or start a new run in another folder with --out")
        notes.append(f"note: {flag(name)} goes from {a} to {b}" + (": the numbers may differ" if name in MAY_CHANGE else ""))
    for note in notes:                                  # now that nothing is refused
        say(note)


def opened(given, go_on):
    """The settings of the run to train and its saved state, None to start it. With go_on a run in --out goes on, with what is
    given changed. Raises InputError for a setting that would make it another run."""
    out = given.get("out", "")
    ltcl.require(not os.path.isfile(out), f"--out {out} is a file: name a folder")
    held = next((name for name in ("last.pt", "log.jsonl", "config.json") if out and Path(out, name).exists()), "")
    ltcl.require(held in ("", "last.pt"), f"--out {out} holds {held} of a run without its last.pt: name another folder")
    ltcl.require(go_on or not held, f"--out {out} already holds a run: name another folder, or go on with it: "
                 f"--resume --out {out}")
    if not held:
        ltcl.require(not go_on or out and given.keys() - NO_MATTER - MAY_CHANGE - {"epochs", "stage2_epochs"},
                     f"--resume: --out {out!r} holds no run: name the folder of one, or give a new one's settings, as --dataset")
        return Config.of(**given), None
    state, old = saved(out)
    ltcl.require("log" in state, f"{out} is a run of an older version, without its log: go on with that version")
    new, begun = replace(old, **given), epochs_begun(state)
    if len(given) < len(fields(Config)):                # --seeds gives all: of_each_seed() has refused the idle ones
        new.refuse_idle({name for name in given.keys() - NO_MATTER if given[name] != getattr(old, name)},
                        "two-stage" in (old.curriculum, new.curriculum))
    other_presets = (old.dataset, old.method, old.recipe) != (new.dataset, new.method, new.recipe)
    if not begun and not other_presets:                 # no step is done: it starts again, with other settings
        return new, None
    refuse_another_run(old, new, given, begun)
    if state["ranks"] != RANKS:
        say(f"note: the run had {state['ranks']} processes so far, now {RANKS}: they share batches and BatchNorm's statistics "
            "differently")
    return new, state


STOP = signal.SIGINT, signal.SIGTERM                    # Ctrl-C, and what a job's manager sends


class Stopped(Exception):
    """A signal stopped the run, and all is saved. Its arguments: the signal's number, the run's folder."""


@contextlib.contextmanager
def stop_signals():
    """A list that will hold the signal that asks to stop. In a run of one process a second one ends it at once."""
    met = []

    def ask(number, _):
        met.append(number)
        if not dist.is_initialized():                   # from torchrun it comes twice: passed on, and from the terminal
            for n in STOP:
                signal.signal(n, signal.SIG_DFL)
            with contextlib.suppress(OSError):          # not print(): that may be what was interrupted
                os.write(2, b"\nstopping after this step; once more ends at once, without saving\n")

    before = {n: signal.signal(n, ask) for n in STOP}
    try:
        yield met
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def asked_to_stop(met):
    """The signal that this or any other process of the run has met, or 0: all stop after the same step."""
    number = torch.tensor(met[0] if met else 0)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)      # on CPU tensors: no device waits
    return int(number)


# --- a run and its files -----------------------------------------------------------------------

def data_name(config):
    return Path(config.data).resolve().name if config.dataset == "folder" else Path(config.dataset).stem


def run_name(config):
    return f"{data_name(config)}-imb{config.imb:g}-{config.method}-{config.net}"


def make_folder(config):
    """The folder of the run: --out, or a new one below runs/, which runs started side by side don't share."""
    for n in itertools.count(1):
        out = Path(config.out or f"runs/{run_name(config)}-seed{config.seed}-{n}")
        try:
            out.mkdir(parents=True, exist_ok=bool(config.out))
            return out
        except OSError as error:
            ltcl.require(not config.out and out.exists(), f"--out {out} cannot be made ({error.strerror}): name another folder")


def live(text):
    """A line that the next one overwrites; on a terminal alone."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="", flush=True)


def save_views(trainer, path, columns=20, rows=8):
    """A picture of the long tail: the classes from head to tail, each a pile of training images as
    high as the class is large, and below it the two contrastive views of one image, the first with the boxes of
    its patches, and the classifier's view."""
    c, counts, small = trainer.config, trainer.counts, torch.nn.AdaptiveAvgPool2d(64)
    order = counts.argsort(descending=True, stable=True)
    order = order[torch.linspace(0, len(order) - 1, min(columns, len(order))).long()]
    height = (rows * counts[order] / counts.max()).ceil().int().tolist()
    found = [(trainer.y == i).nonzero()[:h, 0] for i, h in zip(order, height)]
    pixels, _ = next(trainer.images(trainer.x, [torch.cat(found)]))             # uint8 [n,3,H,W]
    piles = pixels.cpu().split([len(f) for f in found])                         # [<=rows,3,H,W] of each class
    grid = torch.ones(rows + 4, len(order), 3, 64, 64)                          # white
    for i, pile in enumerate(piles):
        grid[rows - len(pile):rows, i] = small(pile / 255)
    first, rng = torch.stack([pile[0] for pile in piles]), torch.Generator().manual_seed(0)
    for i, view in enumerate(ltcl.AUGMENTATIONS[trainer.aug][:3]):
        grid[rows + 1 + i] = small(view(first, rng, trainer.size))
    if c.pbsd:
        boxes = ltcl.random_boxes(len(first), c.patches, 64, 64, rng, side_scale=c.box_scale == "side")
        for image, its in zip(grid[rows + 1], boxes):
            image[:] = torchvision.utils.draw_bounding_boxes(image, its, colors="yellow")
    torchvision.utils.save_image(grid.flatten(0, 1), path, nrow=len(order), padding=4, pad_value=1)


# a line of log.jsonl, None where nothing was measured
EPOCH = dict.fromkeys(("epoch", "loss", "loss_contrast", "loss_pbsd", "loss_ce", "contrast_weight", "lr", "cos_positive",
                       "cos_negative", "spread", "top1", "balanced", "many", "medium", "few", "seconds"))
SAVE_SECONDS = 600                                      # an epoch that takes longer is saved on the way


def keep_memory():
    """Large tensors that are freed stay with the process. glibc hands them back to the system, and to get new pages
    for the next ones takes up to a third of the time of a CPU's step at batch 512 (other C libraries: nothing happens)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for parameter, value in ((-1, -1), (-4, 0)):    # M_TRIM_THRESHOLD and M_MMAP_MAX, malloc.h's numbers
            ctypes.CDLL(None).mallopt(parameter, value)


def make_trainer(config, state):
    """The trainer with its data, in this state unless it is None."""
    if ltcl.pick_device(config.device).type == "cpu":
        keep_memory()
    if RANK > 0:                                        # the first process may have to download
        dist.all_reduce(torch.zeros(1))
    data = ltcl.load_dataset(config.dataset, config.data, config.train_list, config.test_list, config.holdout)
    if RANK == 0 and RANKS > 1:
        dist.all_reduce(torch.zeros(1))
    torch.backends.cudnn.benchmark = True               # training batches keep their shape
    trainer = ltcl.Trainer(config, data)
    if state:
        trainer.load_state_dict(state)
    return trainer


class Run:
    """A trainer and its folder: config.json, views.png, log.jsonl (one object per epoch) and last.pt. state: what that holds
    of a run that goes on, None for a new one."""

    def __init__(self, config, state):
        print(textwrap.fill(" ".join(f"{name}={value}" for name, value in asdict(config).items()), 120))
        t = self.trainer = make_trainer(config, state)
        self.log = state["log"] if state else []        # one object per epoch
        self.elapsed = state["elapsed"] if state else 0     # seconds of this epoch before it was stopped
        self.shown = time.time()
        if state and (began_on := state["device"]) != t.device.type:     # auto may find another
            say(f"note: the run was on {began_on} so far: {t.device.type} draws other views, and computes in its own precision")
        if RANK == 0:
            self.out = make_folder(config)
            config.out = str(self.out)
            if not state:
                save_views(t, self.out / "views.png")
        self.save()                                     # also of a new run: whatever happens, it can be resumed
        if RANK == 0:                                   # after last.pt: a folder with it alone would be refused
            ltcl.write_whole(self.out / "config.json", json.dumps(asdict(config), indent=1).encode())
        print(f"{len(t.y)} training images in {len(t.counts)} classes of {t.counts.max()} to {t.counts.min()}, "
              f"{len(t.y_test)} test images; views of {t.size[0]} x {t.size[1]} pixels; on {t.device}; into {config.out}"
              + (f"; {t.epoch} of {t.epochs} epochs are done" if state else ""), flush=True)
        self.warn()

    def warn(self):
        """Of settings that run but seldom do what is wanted."""
        t, config = self.trainer, self.trainer.config
        if config.imb > 1 and (t.counts.diff() > 0).any():
            say("warning: --imb thins the classes from the first, as the head, to the last, but some have too few images for "
                "their place: --imb 1 takes all images as they are")
        if config.net in ltcl.CIFAR_NETS and max(t.size) > 64:
            say(f"warning: --net {config.net} is meant for views of 32 pixels, these have {t.size[0]} x {t.size[1]}: "
                "take --net resnet18, or for image files --size 32")
        if config.queue > len(t.y):
            say(f"warning: --queue {config.queue} is more than the {len(t.y)} training images: it holds some twice")
        if t.net.amp and t.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            say(f"warning: this processor can't compute in {config.amp}, torch imitates it slowly: take --amp off")
        steps = len(t.y) // config.batch_size * config.epochs
        if steps < 100:
            say(f"warning: {steps} steps in all are too few for BatchNorm's statistics: take a smaller --batch-size or "
                "more --epochs")
        steps = max(1, len(t.y) // config.stage2_batch) * config.stage2_epochs
        if config.curriculum == "two-stage" and steps < 100:
            say(f"warning: {steps} steps are few to train a classifier: take a smaller --stage2-batch or more --stage2-epochs")

    def save(self):
        self.saved = time.time()
        if RANK == 0:
            content = io.BytesIO()
            torch.save(self.trainer.state_dict() | dict(log=self.log, elapsed=self.elapsed), content)
            ltcl.write_whole(self.out / "last.pt", content.getbuffer())
            ltcl.write_whole(self.out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.log).encode())

    def left(self, part=0.0, seconds=0.0):              # part: the share done of the epoch in work; seconds: what that took
        recent = [record["seconds"] for record in self.log[-10:]]       # earlier ones may be another machine's
        pace = (sum(recent) + seconds) / (len(recent) + part)
        return f"{pace * (self.trainer.epochs - self.trainer.epoch - part) / 60:.1f} min left"

    def between_steps(self, step, steps):
        t, number = self.trainer, asked_to_stop(self.signals)
        if number or time.time() - self.saved > SAVE_SECONDS:
            t.check()
            self.elapsed = time.time() - self.began
            self.save()
            if number:                                  # before a line is printed: its reader may be gone, as tee at Ctrl-C
                raise Stopped(number, t.config.out)
            live("")
            print(f"epoch {t.epoch + 1:3}/{t.epochs}  step {step}/{steps}  saved", flush=True)    # a sign of life in a job's log
        if time.time() - self.shown > 1:                # to read the loss is to wait for the device: once a second
            self.shown, seconds = time.time(), time.time() - self.began
            speed = step / steps * len(t.y) / seconds
            live(f"epoch {t.epoch + 1:3}/{t.epochs}  step {step}/{steps}  loss {t.history[-1][0].item():6.3f}  "
                 f"{speed:,.0f} images/s  {self.left(step / steps, seconds)}")

    def epoch(self):
        """Train one, evaluate, log, save."""
        t, c = self.trainer, self.trainer.config
        self.began = time.time() - self.elapsed
        record = EPOCH | t.train_epoch(self.between_steps)
        speed = len(t.y) / (time.time() - self.began)
        due = t.epoch % c.eval_every == 0 or t.epoch == t.epochs
        if due and record["loss_ce"] is not None:
            record |= {name: value for name, value in t.evaluate().items() if name in EPOCH}
        record |= dict(epoch=t.epoch, seconds=round(time.time() - self.began, 3))
        self.elapsed = 0
        self.log.append(record)
        number = asked_to_stop(self.signals)
        if number or t.epoch % c.save_every == 0 or t.epoch == t.epochs:
            self.save()
        if number:
            raise Stopped(number, c.out)
        top1 = "not evaluated" if record["top1"] is None else f"top-1 {record['top1']:5.2f} %"
        live("")
        print(f"epoch {t.epoch:3}/{t.epochs}  loss {record['loss']:6.3f}  contrast weight {record['contrast_weight']:.2f}  "
              f"lr {record['lr']:.4f}  {top1}  {speed:,.0f} images/s  {record['seconds']:5.1f} s  "
              f"{self.left()}", flush=True)

    def train(self):
        """To the last epoch. Raises Stopped."""
        with stop_signals() as self.signals:
            if self.trainer.epoch == self.trainer.epochs:       # finished before, perhaps on another test set
                self.trainer.evaluate()
            while self.trainer.epoch < self.trainer.epochs:
                self.epoch()
            if number := asked_to_stop(self.signals):   # met in that evaluation, or in the last save
                raise Stopped(number, self.trainer.config.out)


def print_table(title, accuracy, counts):
    """Accuracy of all classes and of each shot group."""
    C, masks = len(counts), ltcl.shot_groups(counts)
    classes = {"top1": C} | {name: int(mask.sum()) for name, mask in masks.items()}
    print(f"\n{title}\n")
    for head, cells in (("", ["top-1", *masks]), ("classes", classes.values()),
                        ("accuracy %", ["n/a" if accuracy[name] is None else f"{accuracy[name]:.2f}" for name in classes]),
                        ("chance %", [f"{100 / C:.2f}" if n else "n/a" for n in classes.values()])):
        print(f"  {head:12}" + "".join(f"{cell:>9}" for cell in cells))


def run_title(trainer):
    """One line on the run, with the imbalance that its training images have, thinned or not."""
    c, n = trainer.config, trainer.counts
    held_out = f", held-out {c.holdout:g} as test set" if c.holdout else ""
    return f"{c.method} on {data_name(c)}, imbalance {n.max() / n.min():.4g}, {c.net}, seed {c.seed}{held_out}"


def print_result(trainer, seconds):
    print_table(f"{run_title(trainer)}: {trainer.epochs} epochs in {seconds:.0f} s on {trainer.device}, last epoch's accuracy",
                trainer.evaluated, trainer.counts)
    out = trainer.config.out
    print(f"\nSaved in {out}. To try next: python train.py --eval {shlex.quote(out)} --per-class")


# --- using what was trained --------------------------------------------------------------------

def warn_untrained(state):
    c = state["config"]
    if all(c["method"] != "ce" and ltcl.contrast_weight(epoch, c["epochs"], c["curriculum"]) == 1
           for epoch in range(epochs_begun(state))):
        say("warning: no epoch has trained the classifier yet: its weights are random")


def evaluate(run, given, per_class):
    """Print the accuracy of a trained run on its test set."""
    state, config = saved(run)
    if config.holdout:
        refuse({"test_list"} & given.keys(), "--eval of a run with --holdout")
    config = replace(config, batchnorm="local", compile="off", **given)     # those two don't matter here
    config.refuse_idle({"data"} & given.keys(), two_stage=False)
    trainer = make_trainer(config, state)
    accuracy = trainer.evaluate()
    warn_untrained(state)
    print_table(f"{run}: {run_title(trainer)}, after {trainer.epoch} of {trainer.epochs} epochs", accuracy, trainer.counts)
    if per_class:
        print(f"\n  {'training images':>15}  accuracy %  class")
        for i in trainer.counts.argsort(descending=True, stable=True).tolist():
            a = accuracy["by_class"][i]
            print(f"  {trainer.counts[i]:15}  {'n/a' if math.isnan(a) else f'{a:.2f}':>10}  {trainer.class_names[i]}")


@torch.inference_mode()
def predict(run, pictures, given):
    """Print the five likeliest classes of each picture file."""
    net, readable = ltcl.load(run, given.get("device", "auto")), 0
    warn_untrained(ltcl.read_checkpoint(run))
    for path in pictures:
        try:
            x = net.preprocess(path)                    # [3,H,W]
        except Exception:  # whatever PIL raises
            say(f"warning: {ltcl.why_unreadable(path)}: skipped")
            continue
        readable += 1
        likely, classes = net(x[None].to(net.mean.device))[0].softmax(0).topk(min(5, len(net.class_names)))
        print(f"{path}: " + ", ".join(f"{net.class_names[c]} {100 * p:.1f} %" for p, c in zip(likely, classes)))
    ltcl.require(readable, f"none of {len(pictures)} image files is readable: --predict takes a run and image files")


LOSSES = dict(loss="loss", loss_contrast="contrast", loss_pbsd="PBSD", loss_ce="cross-entropy", contrast_weight="contrast weight")
ACCURACIES = dict(top1="all", many="many", medium="medium", few="few")          # what is drawn and its label, in SCORES' order


def report(runs):
    """Draw the runs side by side into report.png in the first one's folder: losses and contrast weight over
    the epochs, and accuracy by class in order of frequency."""
    try:
        from matplotlib import figure as mpl  # no pyplot: no window, nothing to close
    except ImportError:
        raise ltcl.InputError("--report needs matplotlib: pip install matplotlib") from None
    figure = mpl.Figure((2 + 3.2 * len(runs), 8), layout="constrained")
    losses, tops, classes = figure.subplots(3, len(runs), squeeze=False, sharey="row")
    for run, loss, top, by_class in zip(runs, losses, tops, classes):
        ltcl.require(run.is_dir(), f"{run} is not a folder: --report takes the folders of runs")
        state = ltcl.read_checkpoint(run)
        ltcl.require(log := state.get("log"), f"{run} holds no epoch's log: train the run first")
        for axes, curves in ((loss, LOSSES), (top, ACCURACIES)):
            for name, label in curves.items():          # also those without points: a colour means the same in all runs
                rows = [r for r in log if r.get(name) is not None]
                style = dict(color="grey", linestyle="--") if name == "contrast_weight" else {}
                axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], label=label,
                          marker="." if len(rows) == 1 else None, linewidth=2.5 if name in ("loss", "top1") else 1.2, **style)
            axes.set_xlabel("epoch")
        loss.set_title(os.fsencode(run.resolve().name).decode(errors="replace"), parse_math=False)
        top.set_ylim(0, 100)
        counts, accuracy = state["counts"], state["evaluated"].get("by_class", [])
        bars = [a for _, a in sorted(zip(counts, accuracy), key=lambda pair: -pair[0])]
        by_class.bar(range(len(bars)), bars, width=1, alpha=0.6)
        by_class.set(xlabel=f"classes, from {max(counts)} training images to {min(counts)}", ylim=(0, 100))
    for row in (losses, tops):
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for row, label in ((losses, "training loss"), (tops, "test accuracy, %"), (classes, "accuracy of the class, %")):
        row[0].set_ylabel(label)
    figure.savefig(runs[0] / "report.png", dpi=100)
    print(f"drawn in {runs[0] / 'report.png'}")


# --- results: one row per run, and tables of them ----------------------------------------------

KEY, SCORES = ("dataset", "imb", "method", "settings", "seed", "epochs"), ("top-1", "many", "medium", "few")
COLUMNS = (*KEY, *SCORES, "seconds", "hardware", "commit")      # of a row, a list of strings


def settings_text(config):
    """The flags by which a run's settings differ from the presets, as they are typed; --recipe record is one of them."""
    preset = replace(Config.of(dataset=config.dataset, method=config.method, recipe=config.recipe), recipe="paper")
    left_out = {*KEY, "device", "compile", "amp"} | NO_MATTER - {"train_list", "test_list"}   # other files are another data set
    if config.dataset == "folder":                      # and so is another folder
        left_out -= {"data"}
    return " ".join(f"{flag(name)} {shlex.quote(f'{value:.12g}' if isinstance(value, float) else str(value))}"
                    for name, value in asdict(config).items() if name not in left_out and value != getattr(preset, name))


def run_key(config):
    """The columns by which a run's row is found."""
    return config.dataset, f"{config.imb:.12g}", config.method, settings_text(config), str(config.seed), str(config.epochs)


def hardware(trainer):
    """What a run trained on, as a text."""
    threads = torch.get_num_threads()
    text = f"{threads} thread" + ("s" if threads > 1 else "")
    with contextlib.suppress(OSError, StopIteration):   # Linux alone tells the name of its processor
        line = next(line for line in open("/proc/cpuinfo") if "model name" in line)
        text = f"{line.partition(': ')[2].strip()}, {text}"
    if trainer.device.type == "cuda":
        text = torch.cuda.get_device_name(trainer.device)
    if trainer.device.type == "cuda" or trainer.ranks > 1:
        text = f"{trainer.ranks} x {text}"
    text += f", torch {torch.__version__}, {trainer.net.amp or torch.float32}".replace("torch.", "")
    return text + (", compiled" if trainer.config.compile == "on" else "")


def result_row(trainer, seconds):
    """COLUMNS of a run that is done."""
    commit = ""
    with contextlib.suppress(OSError):                  # no git
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    scores = ["" if (a := trainer.evaluated[name]) is None else f"{a:.2f}" for name in ACCURACIES]
    return [*run_key(trainer.config), *scores, f"{seconds:.0f}", hardware(trainer), commit]


def read_results(path):
    """The rows of a results file, none where there is no such file. Raises InputError."""
    if not Path(path).exists():
        ltcl.require(Path(path).absolute().parent.is_dir(), f"--results {path}: there is no such folder: make it, or name "
                     "another file")
        return []
    try:
        # a spreadsheet may have put a mark at its start
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header, *rows = list(filter(None, csv.reader(file))) or [COLUMNS]
            rows = [row for row in rows if row != header]       # two commands that began together may both have written it
    except (OSError, ValueError, csv.Error) as error:
        raise ltcl.InputError(f"{path} cannot be read as a .csv file ({error}): give --results or --tables another") from None
    ltcl.require(tuple(header) == COLUMNS and all(len(row) == len(COLUMNS) for row in rows),
                 f"{path} is no file of results, which has the columns {', '.join(COLUMNS)}")
    for row in rows:                                    # a score may be missing, seconds not
        numbers = [*filter(None, row[len(KEY):-3]), row[-3]]
        ltcl.require(all(number.replace(".", "", 1).isdecimal() for number in numbers),
                     f"{path}: scores or seconds of the row {','.join(row)} are not finite numbers: mend it, or take it out")
    return rows


def add_results(path, rows):
    """Append the rows of runs, below a header if the file is new. Commands side by side may write into one file: each
    begins by adding none, so that the header is there long before the first row."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith("\n"):  # an editor's doing
                file.write("\n")
            csv.writer(file, lineterminator="\n").writerows(rows if content.strip("\ufeff\r\n") else [COLUMNS, *rows])
    except OSError as error:
        with contextlib.suppress(OSError):              # half a row would spoil the file; whole ones are another command's
            os.truncate(path, max(size, path.read_bytes().rfind(b"\n") + 1))
        raise ltcl.InputError(f"{path} could not be written ({error.strerror}): make room or name another file; "
                              "--resume adds the row of a run that is done") from None


def mean_and_deviation(values):
    """Mean ± standard deviation of numbers as text; n/a where there are none."""
    values = [float(v) for v in values if v]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else "n/a"


# the settings are as settings_text() writes them, in the order of Config's fields
GRID = [("ce", ""), ("ce", "--classifier class-balanced"), ("ce", "--classifier logit-adjusted"), ("sc", ""),
        ("sc", "--classifier logit-adjusted"), ("psc", ""), ("dscl", "--pbsd 0"), ("dscl", ""),
        ("dscl", "--classifier logit-adjusted"), ("ce", "--classifier class-balanced --aug strong"), ("sc", "--aug strong"),
        ("ce", "--recipe record"), ("dscl", "--pbsd 0 --recipe record"), ("dscl", "--recipe record"),
        ("dscl", "--classifier-views 2 --recipe record")]


def tables(rows):
    """Markdown: a table for each data set and imbalance, and README's grid if anything of it was run."""
    groups, text = {}, []
    for dataset, imb, method, settings, _, epochs, *scores, _, _, _ in rows:    # without seconds, hardware and commit
        groups.setdefault((dataset, imb), {}).setdefault((method, settings, epochs), []).append(scores)
    for (dataset, imb), runs in groups.items():
        text += [f"**{dataset}, {'all images' if imb == '1' else f'imbalance {imb}'}**", "",
                 "| method | settings | epochs | top-1 | many | medium | few | seeds |", "|---" * 8 + "|"]
        for (method, settings, epochs), same in runs.items():
            means = " | ".join(map(mean_and_deviation, zip(*same)))
            text.append(f"| {method} | {settings and f'`{settings}`'} | {epochs} | {means} | {len(same)} |")
        text.append("")
    columns = [(dataset, imb) for dataset in ("cifar10", "cifar100") for imb in ("100", "50", "10")]
    grid = [[groups.get(column, {}).get((*which, "200")) for column in columns] for which in GRID]
    if any(map(any, grid)):
        heads = " | ".join(f"{dataset}, imb {imb}" for dataset, imb in columns)
        text += ["**ResNet-32, 200 epochs, top-1**", "", f"| method | settings | {heads} |", "|---" * 8 + "|"]
        for (method, settings), found in zip(GRID, grid):
            cells = [mean_and_deviation([top1 for top1, *_ in same]) if same else "not run" for same in found]
            text.append(f"| {method} | {settings and f'`{settings}`'} | {' | '.join(cells)} |")
    return "\n".join(text)


# --- main --------------------------------------------------------------------------------------

def connect(config):
    """Join the other processes of the run, which torchrun has started; the first one alone prints."""
    backend, local = "gloo", int(os.environ.get("LOCAL_RANK", 0))
    ltcl.require(config.device in ("auto", "cpu", "cuda"), f"--device {config.device}: with torchrun each process takes its own "
                 "GPU with --device cuda")
    if config.device != "cpu" and torch.cuda.is_available():
        ltcl.require(local < torch.cuda.device_count(), f"process {local} has no GPU of its own, there are "
                     f"{torch.cuda.device_count()}: lower --nproc_per_node, or take --device cpu")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    if RANK > 0:
        sys.stdout = io.StringIO()


def of_each_seed(given, seeds):
    """The settings of one run per seed, each in a folder of its own, which the same command finds again."""
    config = Config.of(**given)
    out = Path(config.out or f"runs/{run_name(config)}-{zlib.crc32(repr(run_key(config)).encode()):08x}")
    return [replace(config, seed=seed, out=f"{out}-seed{seed}") for seed in dict.fromkeys(seeds)]


def train_all(do, given):
    """Train the run, or one per seed, and add their rows to --results."""
    done = {tuple(row[:len(KEY)]): row for row in read_results(do.results)} if do.results else {}
    if do.seeds:
        configs = of_each_seed(given, do.seeds)
        runs = [(c, None) if run_key(c) in done else opened(asdict(c), True) for c in configs]
    else:
        runs = [opened(given, do.resume)]
    if RANKS > 1:
        connect(runs[0][0])
    if do.results and RANK == 0:
        add_results(do.results, [])
    rows = []
    for config, state in runs:
        row = done.get(run_key(config))
        if row:
            say(f"seed {config.seed}: {do.results} has it already")
        else:
            with contextlib.redirect_stdout(io.StringIO() if do.quiet else sys.stdout):
                run = Run(config, state)
                run.train()
            seconds = sum(record["seconds"] for record in run.log)
            print_result(run.trainer, seconds)
            row = result_row(run.trainer, seconds)
            del run                                     # the next one takes its memory
            if do.results and RANK == 0:
                add_results(do.results, [row])
        rows.append(row)
    if len(rows) > 1:
        columns = dict(zip(COLUMNS, zip(*rows)))
        print(f"\nseeds {', '.join(columns['seed'])}: mean ± standard deviation of "
              + ", ".join(f"{name} {mean_and_deviation(columns[name])}" for name in SCORES))
    if RANKS > 1:
        dist.destroy_process_group()


def main(argv=None):
    try:
        do, given = read_arguments(argv)
        if do.eval:
            evaluate(do.eval, given, do.per_class)
        elif do.predict:
            predict(do.predict[0], do.predict[1:], given)
        elif do.report:
            report(do.report)
        elif do.tables:
            ltcl.require(do.tables.is_file(), f"{do.tables} does not exist: name a file of --results")
            print(tables(read_results(do.tables)))
        else:
            train_all(do, given)
        return 0
    except Stopped as stopped:
        live("")
        number, out = stopped.args
        program = "python" if RANKS == 1 else f"torchrun --nproc_per_node={RANKS}"
        command = f"{program} train.py --resume --out {shlex.quote(out)}"
        command += f" --results {shlex.quote(str(do.results))}" if do.results else ""
        say("stopped, all is saved; to go on: " + ("repeat the command" if do.seeds else command))
        return 128 + number
    except BrokenPipeError:                             # the reader has enough, as head
        return 141                                      # as a shell has it
    except KeyboardInterrupt:
        message, status = "stopped while no training was under way", 130
    except (ltcl.InputError, OSError, MemoryError, RuntimeError) as error:
        text, status = str(error), 2
        if "DataLoader worker" in text:
            message = (f"error: a process that reads images failed ({text.strip().splitlines()[-1]}): "
                       "is memory or shared memory short? take fewer --workers, or 0")
        elif isinstance(error, ltcl.InputError | OSError):
            message = f"error: {text}"
        elif RANKS > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text):
            status, message = 1, ("error: another process of the run ended, or didn't answer within --timeout: "
                                  "start all again" + (": repeat the command" if do.seeds else
                                                       ", with --resume --out and the run's folder"))
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):   # most often no C++ compiler
            message = f"error: --compile on does not work here ({ltcl.first_line(error)}): take --compile off"
        elif (isinstance(error, MemoryError) or "allocate" in text or "out of memory" in text
              or "calculation overflowed" in text):     # torch's words
            message = "error: too little memory: take --device cpu, or train with a smaller --batch-size, --size or --queue"
        else:
            raise
    live("")
    print(message, file=sys.stderr)
    return status


def leave(status):
    """End this process at once: an ordinary exit is aborted by threads that wait for a lost process, and waits for the
    loader's workers."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:                             # its reader has enough, as head
        pass
    except OSError as error:
        print(f"error: the output could not be written ({error.strerror}): make room", file=sys.stderr)
        status = status or 2
    sys.stderr.flush()
    for worker in torch.multiprocessing.active_children():      # one still in its start would never see that it is alone
        worker.kill()
    os._exit(status)


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))   # closed, as >&- does
    sys.stdout.reconfigure(errors="backslashreplace")   # names of files that aren't UTF-8
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    leave(status)
