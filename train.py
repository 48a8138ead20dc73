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
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
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
    print(f"error: torch, torchvision or numpy does not import ({str(error).splitlines()[0]}): "
          "install a set that fits, pip install --upgrade torch torchvision numpy", file=sys.stderr)
    sys.exit(2)


RANKS = int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1     # the processes that torchrun
RANK = int(os.environ["RANK"]) if RANKS > 1 else 0      # started, and which this one is


# --- settings: a field is a flag ---------------------------------------------------------------

def flag(name):
    return "--" + name.replace("_", "-")


def flags_text(settings):
    """Settings, {field: value}, as they are typed."""
    return " ".join(f"{flag(name)} {shlex.quote(f'{value:.12g}' if isinstance(value, float) else str(value))}"
                    for name, value in settings.items())


def check_useful(given, flags, action):
    useless = set(given) - flags
    ltcl.require(not useless, f"{flag(min(useless, default=''))} has no meaning with {action}: leave it out")


def setting(default, help, choices=None, low=None, high=None):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


TINY, BELOW_ONE = 1e-9, 1 - 1e-9  # "above zero" and "below one", as bounds


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
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=BELOW_ONE)
    weight_decay: float = setting(1e-4, "L2 penalty", low=0)
    warmup: float = setting(5.0, "epochs of linear warm-up, at most a fifth of all", low=0)
    schedule: str = setting("step", "learning rate: x0.1 after 60 %% and 80 %%, or a cosine", ["step", "cosine"])
    tau: float = setting(0.1, "temperature of the contrastive loss", low=TINY)
    alpha: float = setting(0.1, "DSCL's weight of the augmentation", low=0, high=1)
    pbsd: float = setting(1.5, "weight of patch-based self-distillation beside the contrastive loss; 0: none", low=0)
    patches: int = setting(5, "patches an image", low=1, high=1000)
    patch_size: int = setting(0, "side of the resized patches in pixels; 0: half a crop, 2/7 of a resized view", low=0,
                              high=1024)
    box_scale: str = setting("area", "a patch is 0.05-0.6 of the view's area [D, code] or side [D, supplement]",
                             ["area", "side"])
    ema: float = setting(0.0, "decay of the momentum encoder that makes DSCL's keys; 0: none", low=0, high=BELOW_ONE)
    queue: int = setting(0, "keys in DSCL's memory; 0: the batch is the memory", low=0, high=10 ** 15)
    experts: int = setting(1, "copies of the last stage and the heads, logits averaged", low=1, high=100)
    classifier: str = setting("auto", "its batches: instance-balanced; class-balanced [H]; logit-adjusted: instance-balanced, "
                              "the log of the class sizes added to the logits (Menon et al. 2021); auto: class-balanced, but for ce",
                              ["auto", "instance-balanced", "class-balanced", "logit-adjusted"])
    logits: str = setting("linear", "of the classifier: linear, or cosines times 30", ["linear", "cosine"])
    average: float = setting(0.0, "decay of the averaged weights that are evaluated; 0: the last ones", low=0, high=BELOW_ONE)
    holdout: float = setting(0.0, "share of each training class that takes the test set's place, to choose settings by",
                             low=0, high=0.9)
    recipe: str = setting("paper", "paper: the paper's settings; record: those of the records on CIFAR", ["paper", "record"])
    curriculum: str = setting("parabolic", "contrast weight over the epochs", list(ltcl.CURRICULA))
    stage2_epochs: int = setting(40, "two-stage: epochs of the classifier", low=1)
    stage2_batch: int = setting(128, "two-stage: its batch", low=1)
    stage2_lr: float = setting(0.1, "two-stage: its learning rate, x0.1 after a half and three quarters", low=TINY)
    aug: str = setting("auto", "crop: padded crop, flip, grayscale [H]; resized: resized crop, colours, blur [D]; strong: "
                       "resized crop and colours, for the classifier TrivialAugment and Cutout; auto: resized for image files, else crop",
                       ["auto", "crop", "resized", "strong"])
    size: int = setting(224, "side of the resized views of image files in pixels; they are read at 8/7 of it, which other views keep",
                        low=8)
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
            value, m = getattr(self, f.name), f.metadata
            name = flag(f.name)
            if f.type is float and type(value) is int:
                setattr(self, f.name, value := float(value))
            ltcl.require(type(value) is f.type, f"{name} is {value!r}: it takes a {f.type.__name__}")
            ltcl.require(m["choices"] is None or value in m["choices"],
                         f"{name} {value!r} is unknown: choose {', '.join(m['choices'] or [])}")
            ltcl.require(f.type is not float or math.isfinite(value), f"{name} is {value}: give a finite number")
            ltcl.require(m["low"] is None or value >= m["low"], f"{name} is {value}: it must be "
                         + ("above 0" if m["low"] == TINY else f"{m['low']} or more"))
            ltcl.require(m["high"] is None or value <= m["high"], f"{name} is {value}: it must be "
                         + ("below 1" if m["high"] == BELOW_ONE else f"{m['high']} or less"))
        ltcl.require(self.method == "dscl" or not (self.ema or self.queue), f"--ema and --queue are DSCL's: "
                     f"leave them out for --method {self.method}")
        ltcl.require(self.dataset in ltcl.FILE_SETS or not (self.train_list or self.test_list), "--train-list and --test-list "
                     f"are for {', '.join(ltcl.FILE_SETS)}: leave them out for --dataset {self.dataset}")
        ltcl.require(bool(self.train_list) == bool(self.test_list), "--train-list and --test-list go together: give both")

    @classmethod
    def of(cls, **given):
        """The presets of data set and method, overridden by what is given."""
        dataset, method = given.get("dataset", cls.dataset), given.get("method", cls.method)
        preset = PRESETS.get(method, {}) | PRESETS.get(dataset, PRESETS[".npz"]) | PRESETS.get((dataset, method), {})
        preset |= PRESETS["record"] if given.get("recipe") == "record" else {}
        changed = {name for name, value in given.items() if value != preset.get(name, getattr(cls, name, None))}
        config, patches = cls(**preset | given), {"patches", "patch_size", "box_scale"}
        idle = {"ce": {"tau", "alpha", "pbsd"} | patches, "sc": {"alpha"}, "psc": {"alpha"}}
        check_useful(changed & idle.get(method, set()), set(), f"--method {method}")
        if not config.pbsd:
            check_useful(changed & patches, set(), "--pbsd 0")
        if method == "ce" and "two-stage" not in (config.curriculum, preset.get("curriculum")):
            check_useful(changed & {"curriculum"}, set(), "--method ce")
        if config.curriculum != "two-stage":
            check_useful(changed & {"stage2_epochs", "stage2_batch", "stage2_lr"}, set(), f"--curriculum {config.curriculum}")
        return config


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
    "record": dict(aug="strong", classifier="logit-adjusted", curriculum="constant", batch_size=256, schedule="cosine",
                   lr=0.3, weight_decay=2.5e-4, tau=0.1),   # constant halves both losses: as lr 0.15, 5e-4 and weights of 1
    "ce": dict(pbsd=0.0), "sc": dict(pbsd=0.0), "psc": dict(pbsd=0.0),
}


# --- the command line --------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the whole usage as well
        raise ltcl.InputError(f"{message}; python train.py --help lists the flags")


def read_arguments(argv):
    """What is to be done, and the settings that are given on the command line, {field: value}."""
    parser = Parser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    do = parser.add_argument_group("instead of training a new run")
    do.add_argument("--resume", action="store_true", help="go on with the run in --out where it was saved last")
    do.add_argument("--eval", metavar="RUN", help="accuracy of a trained run: its folder or a .pt file")
    do.add_argument("--predict", metavar=("RUN", "IMAGE"), nargs="+", help="the likeliest classes of your own pictures")
    do.add_argument("--report", metavar="RUN", nargs="+", help="draw runs side by side (needs matplotlib)")
    do.add_argument("--tables", metavar="FILE", help="the tables of a file of --results, as Markdown")
    parser.add_argument("--seeds", metavar="S", type=int, nargs="+", help="one run a seed; those that were stopped go on")
    parser.add_argument("--results", metavar="FILE", help="add a row a run to a .csv file; --seeds leaves out what it has")
    parser.add_argument("--per-class", action="store_true", help="with --eval: the accuracy of each class")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    for f in fields(Config):
        presets = [f"{name if isinstance(name, str) else ' '.join(name)}: {preset[f.name]}"
                   for name, preset in PRESETS.items() if f.name in preset]
        choices = ", ".join(f.metadata["choices"] or [])
        parser.add_argument(flag(f.name), type=f.type, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['help']}{choices and f' ({choices})'} "
                                 f"[{'; '.join([str(f.default) or 'empty', *presets])}]")
    given = vars(parser.parse_args(argv))
    exclusive = "resume", "eval", "predict", "report", "tables", "seeds"
    do = argparse.Namespace(**{name: given.pop(name, None) for name in (*exclusive, "results", "per_class", "quiet")})
    for name in ("eval", "tables", "results"):
        ltcl.require(getattr(do, name) != "", f"--{name} is empty: name a {'run' if name == 'eval' else 'file'}")
    actions = [name for name in exclusive if getattr(do, name)]
    ltcl.require(len(actions) < 2, f"--{' and --'.join(actions)} at once: choose one")
    ltcl.require(do.eval or not do.per_class, "--per-class goes with --eval RUN")
    action = actions[0] if actions else ""
    ltcl.require(action in ("", "resume", "seeds") or not do.results, f"--results has no meaning with --{action}: leave it out")
    if action in ("report", "tables"):
        check_useful(given, set(), f"--{action}")
    ltcl.require(not do.seeds or "seed" not in given, "--seed and --seeds at once: choose one")
    return do, given


# --- going on with a run -----------------------------------------------------------------------

NO_MATTER = {"out", "data", "train_list", "test_list", "workers", "save_every", "eval_every", "timeout"}
ROUNDING = {"device", "compile", "amp", "batchnorm"}    # the run goes on, with other last digits


def say(text):
    """To the user, once: of several processes the first one does."""
    if RANK == 0:
        print(text, file=sys.stderr)


def saved_config(saved, run):
    try:
        return Config(**saved)
    except (TypeError, ltcl.InputError) as error:
        raise ltcl.InputError(f"{run}: its settings are not this program's ({error}): use the version that made it") from None


def same_so_far(old, new, epochs):
    """Have the epochs done the same learning rate and contrast weight under both settings?"""
    times = [epoch + part / 100 for epoch in range(epochs) for part in range(1, 101)]
    return all(ltcl.learning_rate(t, old) == ltcl.learning_rate(t, new) for t in times) and (old.method == "ce" or all(
        ltcl.contrast_weight(e, old.epochs, old.curriculum) == ltcl.contrast_weight(e, new.epochs, new.curriculum)
        for e in range(epochs)))


def resumed(given):
    """The settings of the run in --out with those that are given anew, and its saved state, None where nothing
    was saved yet. Raises InputError for a setting that would make it another run."""
    ltcl.require(given.get("out"), "--resume needs --out, the folder of the run")
    out = Path(given["out"])
    if not (out / "last.pt").exists():
        ltcl.require(out.is_dir() or not out.exists(), f"--out {out} is a file: name the folder of the run")
        try:
            saved = json.loads((out / "config.json").read_text())
        except FileNotFoundError:
            saved = {}
        except ValueError:
            raise ltcl.InputError(f"{out / 'config.json'} is damaged: remove the folder and start anew") from None
        ltcl.require(saved or len(given) > 1, f"--out {out} holds no run: name the folder of one, or give the settings of a new one")
        if out.exists():
            say(f"note: nothing is saved in {out} yet: starts from the beginning")
        return (replace(saved_config(saved, out), **given) if saved else Config.of(**given)), None
    state = ltcl.read_checkpoint(out)
    old = saved_config(state["config"], out)
    new, began = replace(old, **given), state["epoch"] + bool(state["history"])         # epochs begun
    for f in fields(Config):
        a, b = getattr(old, f.name), getattr(new, f.name)
        moved = f.name == "dataset" and a.endswith(".npz") and b.endswith(".npz")       # the fingerprint knows the images
        if a == b or f.name in NO_MATTER or moved:
            continue
        if f.name in ("epochs", "stage2_epochs"):
            ltcl.require(same_so_far(old, new, began), f"{flag(f.name)} {b}: with {a}, the {began} epochs done had another "
                         "learning rate or contrast weight than they would have had: start a new run")
        else:
            ltcl.require(f.name in ROUNDING, f"{flag(f.name)} is {b!r}, but the run in {out} has {a!r}: leave it out to go on, "
                         "or start a new run in another folder with --out")
        say(f"note: {flag(f.name)} goes from {a} to {b}" + ": the last digits change" * (f.name in ROUNDING))
    if state["ranks"] != RANKS:
        say(f"note: the run began with {state['ranks']} processes: others share batches and BatchNorm's statistics otherwise")
    return new, state


class Stopped(Exception):
    """By a signal, its number and the run's folder the arguments; everything is saved."""


@contextlib.contextmanager
def stop_signals():
    """A list that will hold the signal, Ctrl-C or SIGTERM, that asks to stop. A second one ends the program at once."""
    met = []

    def ask(number, _):
        met.append(number)
        if not dist.is_initialized():                   # torchrun passes on what the terminal has sent already
            for n in before:
                signal.signal(n, signal.SIG_DFL)

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
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

def run_name(config):
    data = Path(config.data).resolve().name if config.dataset == "folder" else Path(config.dataset).stem
    return f"{data}-imb{config.imb:g}-{config.method}-{config.net}-seed{config.seed}"


def check_folder(out):
    """Raises InputError where the folder of a new run holds one already."""
    ltcl.require(not any((out / name).exists() for name in ("config.json", "log.jsonl", "last.pt")),
                 f"--out {out} already holds a run: name another folder, or go on with it: --resume --out {out}")
    ltcl.require(out.is_dir() or not out.exists(), f"--out {out} is a file: name a folder")


def make_folder(config, out):
    """The folder of the run: out, or a new one below runs/, which runs started side by side don't share."""
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
            return out
        for n in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                out = Path("runs") / f"{run_name(config)}-{n}"
                out.mkdir(parents=True)
                return out
    except OSError as error:
        raise ltcl.InputError(f"--out {out} cannot be made ({error.strerror}): name another folder") from None


def read_log(out):
    """The epochs in a run's log.jsonl; a last line that was never finished doesn't count."""
    records = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        for line in (out / "log.jsonl").read_text().splitlines():
            records.append(dict(json.loads(line)))
    return records


def live(text):
    """A line that the next one overwrites; on a terminal alone."""
    if sys.stdout.isatty():
        print(f"\r{text}\x1b[K", end="", flush=True)


def small(x):
    return torch.nn.functional.interpolate(x, (64, 64), mode="area")


def save_views(trainer, path, columns=20, rows=8):
    """A picture of the long tail: the classes from head to tail, each a pile of training images as
    high as the class is large, and below it the two contrastive views of one image, the first with the boxes of
    its patches, and the classifier's view."""
    order = trainer.counts.argsort(descending=True, stable=True)
    order = order[torch.linspace(0, len(order) - 1, min(columns, len(order))).long()].tolist()
    found = [(trainer.y == c).nonzero()[:rows, 0] for c in order]
    pixels, _ = next(trainer.images(trainer.x, [torch.cat(found)]))             # uint8 [n,3,H,W]
    images = pixels.cpu().split([len(f) for f in found])                        # [<=rows,3,H,W] of each class
    height = [math.ceil(rows * trainer.counts[c] / trainer.counts.max()) for c in order]
    first, rng = torch.stack([x[0] for x in images]), torch.Generator().manual_seed(0)
    views = [small(view(first, rng, trainer.size)) for view in trainer.augmentation[:3]]        # [columns,3,64,64] each
    if trainer.config.pbsd:
        c = trainer.config
        boxes = ltcl.random_boxes(len(first), c.patches, 64, 64, rng, side_scale=c.box_scale == "side")
        views[0] = torch.stack([torchvision.utils.draw_bounding_boxes(*pair, colors="yellow") for pair in zip(views[0], boxes)])
    images = [small(x / 255) for x in images]
    white = torch.ones(3, 64, 64)
    pile = [x[h - r] if 0 <= h - r < len(x) else white for r in range(rows, 0, -1) for x, h in zip(images, height)]
    grid = torch.cat([torch.stack(pile + [white] * len(order)), *views])
    content = io.BytesIO()
    torchvision.utils.save_image(grid, content, format="png", nrow=len(order), padding=4, pad_value=1)
    ltcl.write_whole(path, content.getbuffer())


EPOCH = dict.fromkeys(("epoch", "loss", "loss_contrast", "loss_pbsd", "loss_ce", "contrast_weight", "lr", "cos_positive",
                       "cos_negative", "spread", "top1", "balanced", "many", "medium", "few", "seconds"))
SAVE_SECONDS = 600                                      # an epoch that takes longer is saved on the way


def keep_memory():
    """Large tensors that are freed stay with the process. glibc hands them back to the system, and to get new pages
    for the next ones takes half of a CPU's step at batch 512 (other C libraries: nothing happens)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4       # malloc.h's numbers
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def make_trainer(config, state=None):
    """The trainer with its data, in the state where there is one."""
    if ltcl.pick_device(config.device).type == "cpu":
        keep_memory()
    if RANK > 0:                                        # the first process may have to download
        dist.all_reduce(torch.zeros(1))
    data = ltcl.load_dataset(config.dataset, config.data, config.train_list, config.test_list, config.size)
    if RANK == 0 and RANKS > 1:
        dist.all_reduce(torch.zeros(1))
    torch.backends.cudnn.benchmark = True               # a run's batches are all of one shape
    trainer = ltcl.Trainer(config, data)
    if state:
        trainer.load_state_dict(state)
    return trainer


class Run:
    """A trainer and its folder: config.json, log.jsonl (an object an epoch), views.png and last.pt.

    config, out: the settings and the folder, None for a new one.  state: what last.pt held, to go on from there.
    """

    def __init__(self, config, out, state=None):
        print(" ".join(f"{name}={value}" for name, value in asdict(config).items()))
        t = self.trainer = make_trainer(config, state)
        self.records, self.number = [], 0
        self.start = self.saved = self.shown = time.time()
        self.begun = t.epoch + bool(t.history) / 2      # about where the clock starts
        self.out = out
        if RANK == 0:
            self.out = out = make_folder(config, out)
            config.out = str(out)
            self.records = [r for r in read_log(out) if r["epoch"] <= t.epoch]
            ltcl.write_whole(out / "config.json", json.dumps(asdict(config), indent=1).encode())
            self.write_log()
            if not state:
                save_views(t, out / "views.png")
        print(f"{len(t.y)} training images in {len(t.counts)} classes of {t.counts.max()} to {t.counts.min()}, "
              f"{len(t.y_test)} test images; on {t.device}; into {out}", flush=True)
        if t.config.imb > 1 and (t.counts.diff() > 0).any():
            say("warning: --imb thins the classes from the first, as the head, to the last, but some have too few images for "
                "their place: --imb 1 takes all images as they are")
        if t.config.queue > len(t.y):
            say(f"warning: --queue {t.config.queue} is more than the {len(t.y)} training images: it holds some twice")
        steps = len(t.y) // t.config.batch_size * t.config.epochs
        if steps < 100:
            say(f"warning: {steps} steps in all are too few for BatchNorm's statistics: take a smaller --batch-size or "
                "more --epochs")

    def write_log(self):
        ltcl.write_whole(self.out / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.records).encode())

    def save(self):
        self.saved = time.time()
        if RANK == 0:
            content = io.BytesIO()
            torch.save(self.trainer.state_dict(), content)
            ltcl.write_whole(self.out / "last.pt", content.getbuffer())

    def left(self, done):                               # epochs done, fractions counted
        t = self.trainer
        return f"{(time.time() - self.start) / max(done - self.begun, 1e-3) * (t.epochs - done) / 60:.1f} min left"

    def between_steps(self, step, steps):
        t, number = self.trainer, asked_to_stop(self.signals)
        if number or time.time() - self.saved > SAVE_SECONDS:
            t.check()
            t.elapsed = time.time() - self.began
            self.save()
        if number:
            raise Stopped(number, self.out)
        if time.time() - self.shown > 1:                # to read the loss is to wait for the device: once a second
            self.shown = time.time()
            speed = step * t.config.batch_size / (self.shown - self.began)
            live(f"epoch {t.epoch + 1:3}/{t.epochs}  step {step}/{steps}  loss {t.history[-1][0].item():6.3f}  "
                 f"{speed:,.0f} images/s  {self.left(t.epoch + step / steps)}")

    def epoch(self):
        """Train one, evaluate, log, save."""
        t, c = self.trainer, self.trainer.config
        self.began = time.time() - t.elapsed
        record = EPOCH | t.train_epoch(self.between_steps)
        speed = len(t.y) / (time.time() - self.began)
        due = t.epoch % c.eval_every == 0 or t.epoch == t.epochs
        if due and record["loss_ce"] is not None:
            record |= {name: value for name, value in t.evaluate().items() if name in EPOCH}
        record |= dict(epoch=t.epoch, seconds=round(time.time() - self.began, 3))
        t.elapsed = 0
        self.records.append(record)
        number = asked_to_stop(self.signals)
        if RANK == 0:
            self.write_log()                            # before last.pt: a kill between them costs an epoch, not its line
        if number or t.epoch % c.save_every == 0 or t.epoch == t.epochs:
            self.save()
        top1 = ("no classifier yet" if record["loss_ce"] is None else "not evaluated" if record["top1"] is None
                else f"top-1 {record['top1']:5.2f} %")
        live("")
        print(f"epoch {t.epoch:3}/{t.epochs}  loss {record['loss']:6.3f}  contrast weight {record['contrast_weight']:.2f}  "
              f"lr {record['lr']:.4f}  {top1}  {speed:,.0f} images/s  {record['seconds']:5.1f} s  {self.left(t.epoch)}",
              flush=True)
        if number and t.epoch < t.epochs:
            raise Stopped(number, self.out)
        self.number = number                            # of a signal in the last epoch, for the seeds that follow

    def train(self):
        """To the last epoch. Raises Stopped."""
        with stop_signals() as self.signals:
            if self.trainer.epoch == self.trainer.epochs:       # finished before, perhaps on another test set
                self.trainer.evaluate()
            while self.trainer.epoch < self.trainer.epochs:
                self.epoch()


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
    """With the imbalance that the training images have, thinned or not."""
    c, n = trainer.config, trainer.counts
    return f"{c.method} on {c.dataset}, imbalance {n.max() / n.min():.4g}, {c.net}, seed {c.seed}"


def print_result(trainer, seconds):
    c = trainer.config
    print_table(f"{run_title(trainer)}: {trainer.epochs} epochs in {seconds:.0f} s on {trainer.device}, last epoch's accuracy",
                trainer.evaluated, trainer.counts)
    again = dict(dataset=c.dataset, method="dscl" if c.method == "ce" else "ce")
    again |= {} if c.recipe == "paper" else dict(recipe=c.recipe)
    names = ("data", "train_list", "test_list", "imb", "net", "epochs", "batch_size", "lr", "size", "holdout")
    preset = Config.of(**again)
    again |= {name: getattr(c, name) for name in names if getattr(c, name) != getattr(preset, name)}
    if c.dataset == "shapes" and c.method == "ce":
        again = dict(dataset="cifar100", imb=100, method="dscl")
    print(f"\nSaved in {c.out}. To try next: python train.py {flags_text(again)}")


# --- using what was trained --------------------------------------------------------------------

def warn_untrained(state):
    c = state["config"]
    if c["curriculum"] == "two-stage" and c["method"] != "ce" and state["epoch"] + bool(state["history"]) <= c["epochs"]:
        say("warning: the second stage, which trains the classifier, has not begun: its weights are random")


def evaluate(run, given, per_class):
    """Print the accuracy of a trained run on its test set."""
    state = ltcl.read_checkpoint(run)
    check_useful(given, {"dataset", "data", "train_list", "test_list", "workers", "device", "amp"}, "--eval")
    config = replace(saved_config(state["config"], run), batchnorm="local", compile="off")      # neither matters here
    trainer = make_trainer(replace(config, **given), state)
    accuracy = trainer.evaluate()
    warn_untrained(state)
    print_table(f"{run}: {run_title(trainer)}, after {trainer.epoch} of {trainer.epochs} epochs", accuracy, trainer.counts)
    if per_class:
        print(f"\n  {'training images':>15}  accuracy %  class")
        for i in trainer.counts.argsort(descending=True, stable=True).tolist():
            print(f"  {trainer.counts[i]:15}  {accuracy['by_class'][i]:10.2f}  {trainer.class_names[i]}")


@torch.inference_mode()
def predict(run, pictures, given):
    """Print the five likeliest classes of each picture file."""
    check_useful(given, {"device"}, "--predict")
    ltcl.require(pictures, "--predict takes a run and the image files: name one or more")
    net, readable = ltcl.load(run, given.get("device", "auto")), 0
    warn_untrained(ltcl.read_checkpoint(run))
    for path in pictures:
        try:
            x = net.preprocess(path)                    # [3,H,W]
        except Exception:  # whatever PIL raises
            reason = "is not a readable image" if Path(path).is_file() else "is no file"
            print(f"warning: {path} {reason}: skipped", file=sys.stderr)
            continue
        readable += 1
        likely, classes = net(x[None].to(net.mean.device))[0].softmax(0).topk(min(5, len(net.class_names)))
        print(f"{path}: " + ", ".join(f"{net.class_names[c]} {100 * p:.1f} %" for p, c in zip(likely, classes)))
    ltcl.require(readable, f"none of {len(pictures)} files is a readable image")


def report(runs):
    """Draw the runs side by side into report.png in the first one's folder: losses and contrast weight over
    the epochs, and accuracy by class in order of frequency."""
    try:
        from matplotlib import figure as mpl  # no pyplot: no window, nothing to close
    except ImportError:
        raise ltcl.InputError("--report needs matplotlib: pip install matplotlib") from None
    figure = mpl.Figure((2 + 3.2 * len(runs), 8), layout="constrained")
    losses, tops, classes = figure.subplots(3, len(runs), squeeze=False, sharey="row")
    for run, loss, top, by_class in zip(map(Path, runs), losses, tops, classes):
        ltcl.require(run.is_dir(), f"{run} is not a folder: --report takes the folders of runs")
        log, state = read_log(run), ltcl.read_checkpoint(run)
        ltcl.require(log, f"{run / 'log.jsonl'} holds no epoch: train the run first")
        for axes, curves in ((loss, dict(loss="loss", loss_contrast="contrast", loss_pbsd="PBSD", loss_ce="cross-entropy",
                                         contrast_weight="contrast weight")),
                             (top, dict(top1="all", many="many", medium="medium", few="few"))):
            for name, label in curves.items():          # also those without points: a colour means the same in all runs
                rows = [r for r in log if r.get(name) is not None]
                style = dict(color="grey", linestyle="--") if name == "contrast_weight" else {}
                axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], label=label, marker="." if len(rows) == 1 else None,
                          linewidth=2.5 if name in ("loss", "top1") else 1.2, **style)
            axes.set_xlabel("epoch")
        loss.set_title(run.name, parse_math=False)
        top.set_ylim(0, 100)
        counts, accuracy = torch.tensor(state["counts"]), state["evaluated"].get("by_class")
        if accuracy:
            order = counts.argsort(descending=True, stable=True)
            by_class.bar(range(len(order)), torch.tensor(accuracy)[order].tolist(), width=1, alpha=0.6)
        by_class.set(xlabel=f"classes, from {counts.max()} training images to {counts.min()}", ylim=(0, 100))
    for row in (losses, tops):
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
    for row, label in ((losses, "training loss"), (tops, "test accuracy, %"), (classes, "accuracy of the class, %")):
        row[0].set_ylabel(label)
    content, path = io.BytesIO(), Path(runs[0]) / "report.png"
    figure.savefig(content, dpi=100)
    ltcl.write_whole(path, content.getbuffer())
    print(f"drawn in {path}")


# --- results: a row a run, and tables of them --------------------------------------------------

KEY, SCORES = ("dataset", "imb", "method", "settings", "seed", "epochs"), ("top-1", "many", "medium", "few")
COLUMNS = (*KEY, *SCORES, "seconds", "hardware", "commit")      # of a row, a list of strings


def settings_text(config):
    """The flags by which a run's settings differ from the presets."""
    preset = Config.of(dataset=config.dataset, method=config.method, recipe=config.recipe)
    others = {"dataset", "imb", "method", "seed", "epochs", "device", "compile", "amp"} | NO_MATTER
    if config.dataset == "folder":                      # another folder is another data set
        others -= {"data", "train_list", "test_list"}
    return flags_text({name: value for name, value in asdict(config).items() if name not in others
                       and (value != getattr(preset, name) or name == "recipe" and value != "paper")})


def run_key(config):
    """The columns by which a run's row is found."""
    return [config.dataset, f"{config.imb:.12g}", config.method, settings_text(config), str(config.seed), str(config.epochs)]


def result_row(trainer, seconds):
    hardware, commit = f"{torch.get_num_threads()} threads", ""
    with contextlib.suppress(OSError, StopIteration):   # Linux alone tells the name of its processor
        hardware = next(line for line in open("/proc/cpuinfo") if "model name" in line).split(": ")[1].strip() + ", " + hardware
    if trainer.device.type == "cuda":
        hardware = f"{trainer.ranks} x {torch.cuda.get_device_name()}"
    hardware += f", torch {torch.__version__}, {trainer.net.amp or torch.float32}".replace("torch.", "")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True,
                                         stderr=subprocess.DEVNULL).strip()
    accuracy = [trainer.evaluated[name] for name in ("top1", "many", "medium", "few")]
    return run_key(trainer.config) + ["" if a is None else f"{a:.2f}" for a in accuracy] + [f"{seconds:.0f}", hardware, commit]


def read_results(path):
    """The rows of a results file, none where there is no such file. Raises InputError."""
    if not Path(path).exists():
        ltcl.require(Path(path).absolute().parent.is_dir(), f"--results {path}: there is no such folder: make it, or name another file")
        return []
    try:
        with open(path, newline="") as file:
            head, *rows = list(csv.reader(file)) or [()]
        [float(score) for row in rows for score in [*filter(None, row[len(KEY):-3]), *row[-3:-2]]]       # seconds are a must
    except (OSError, ValueError, csv.Error) as error:
        raise ltcl.InputError(f"{path} cannot be read as a .csv file ({error}): name another --results") from None
    ltcl.require(tuple(head) == COLUMNS and all(len(row) == len(COLUMNS) for row in rows),
                 f"{path} is no file of results: its columns are {', '.join(COLUMNS)}")
    return rows


def add_result(path, row):
    """Append a run's row, unless the file has the run; runs side by side may write into one file."""
    if row[:len(KEY)] in [other[:len(KEY)] for other in read_results(path)]:
        return say(f"seed {row[4]}: {path} has it already")
    try:
        with contextlib.suppress(FileExistsError), open(path, "x", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
        with open(path, "a+", newline="") as file:
            file.seek(0)
            if not file.read().endswith("\n"):          # an editor's doing
                file.write("\n")
            csv.writer(file, lineterminator="\n").writerow(row)
    except OSError as error:
        raise ltcl.InputError(f"{path} could not be written ({error.strerror}): make room, look at its last line; "
                              "--resume on the run adds its row") from None


def spread(values):
    """Mean ± standard deviation of numbers as text; n/a where there are none."""
    values = [float(v) for v in values if v]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else "n/a"


PAPER = [("ce", ""), ("ce", "--classifier class-balanced"), ("sc", ""), ("psc", ""), ("dscl", "--pbsd 0"), ("dscl", ""),
         ("ce", "--recipe record"), ("dscl", "--pbsd 0 --recipe record"), ("dscl", "--recipe record")]


def tables(rows):
    """Markdown: a table for each data set and imbalance, and the papers' grid with what of it was run."""
    groups = {}
    for row in (dict(zip(COLUMNS, row)) for row in rows):
        runs = groups.setdefault((row["dataset"], row["imb"]), {})
        runs.setdefault((row["method"], row["settings"], row["epochs"]), []).append(row)
    text = []
    for (dataset, imb), runs in groups.items():
        text += [f"**{dataset}, imbalance {imb}**", "",
                 "| method | settings | epochs | top-1 | many | medium | few | seeds | seconds |", "|---" * 9 + "|"]
        for (method, settings, epochs), same in runs.items():
            cells = [spread([row[name] for row in same]) for name in SCORES]
            text.append(f"| {method} | {settings and f'`{settings}`'} | {epochs} | {' | '.join(cells)} | {len(same)} | "
                        f"{statistics.mean(float(row['seconds']) for row in same):.0f} |")
        text.append("")
    columns = [(dataset, imb) for dataset in ("cifar10", "cifar100") for imb in ("100", "50", "10")]
    if not groups.keys() & set(columns):                # own images alone
        return "\n".join(text)
    text += ["**The papers' settings: ResNet-32, 200 epochs, top-1**", "",
             "| method | settings | " + " | ".join(f"{dataset}, {imb}" for dataset, imb in columns) + " |", "|---" * 8 + "|"]
    for method, settings in PAPER:
        found = [groups.get(column, {}).get((method, settings, "200")) for column in columns]
        cells = [spread([row["top-1"] for row in same]) if same else "not run" for same in found]
        text.append(f"| {method} | {settings and f'`{settings}`'} | {' | '.join(cells)} |")
    return "\n".join(text)


# --- main --------------------------------------------------------------------------------------

class Lost(Exception):
    """Another process of the run is gone."""


@contextlib.contextmanager
def processes(config):
    """Connect with the other processes of the run where torchrun started several; the first one alone prints."""
    if RANKS == 1:
        yield
        return
    backend, local = "gloo", int(os.environ.get("LOCAL_RANK", 0))
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        ltcl.require(local < torch.cuda.device_count(), f"process {local} has no GPU of its own, there are "
                     f"{torch.cuda.device_count()}: lower --nproc_per_node, or take --device cpu")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
        with contextlib.redirect_stdout(io.StringIO()) if RANK else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "onnection" not in str(error):
            raise
        raise Lost(f"another process of the run ended, or didn't answer within --timeout {config.timeout:g} s: "
                   "start all again, with --resume --out and the run's folder") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def planned(do, given):
    """Config, state and folder (None: a new one) of each run that is to be trained."""
    done = [row[:len(KEY)] for row in read_results(do.results)] if do.results else []
    if not do.seeds:
        config, state = resumed(given) if do.resume else (Config.of(**given), None)
        out = Path(config.out) if config.out else None
        if not do.resume:
            ltcl.require(run_key(config) not in done, f"{do.results} has this run already: take another --seed, or another file")
        if out and not do.resume and RANK == 0:
            check_folder(out)
        return [(config, state, out)]
    runs = []
    for seed in dict.fromkeys(do.seeds):                # each once
        config = Config.of(**given | dict(seed=seed))
        path = config.dataset if config.dataset.endswith(".npz") else ""
        name = f"{run_name(config)} {config.epochs} epochs {path} {settings_text(config)}"      # other settings, another folder
        out = f"{Path(given['out'])}-seed{seed}" if given.get("out") else "runs/" + re.sub(r"[^\w.]+", "-", name)[:200].strip("-")
        if run_key(config) in done:
            say(f"seed {seed}: {do.results} has it already")
        else:
            runs.append((*resumed(asdict(replace(config, out=out))), Path(out)))
    return runs


def train_all(do, given):
    runs = planned(do, given)
    with processes(runs[0][0] if runs else Config.of(**given)):
        rows = []
        for config, state, out in runs:
            with contextlib.redirect_stdout(io.StringIO()) if do.quiet else contextlib.nullcontext():
                run = Run(config, out, state)
                run.train()
            seconds = sum(r["seconds"] for r in run.records)
            print_result(run.trainer, seconds)
            rows.append(result_row(run.trainer, seconds))
            if do.results and RANK == 0:
                add_result(do.results, rows[-1])
            if run.number and len(rows) < len(runs):
                raise Stopped(run.number, run.out)
        if do.seeds and do.results and RANK == 0:               # with those that the file had
            keys = [run_key(Config.of(**given | dict(seed=seed))) for seed in do.seeds]
            rows = [row for row in read_results(do.results) if row[:len(KEY)] in keys]
        if len(rows) > 1:
            scores = dict(zip(COLUMNS, zip(*rows)))             # the values of each column
            print(f"\nseeds {', '.join(scores['seed'])}: mean ± standard deviation of "
                  + ", ".join(f"{name} {spread(scores[name])}" for name in SCORES))


def main(argv=None):
    try:
        do, given = read_arguments(argv)
        ltcl.require(RANKS == 1 or not (do.eval or do.predict or do.report or do.tables),
                     "--eval, --predict, --report and --tables take one process: leave torchrun out")
        if do.eval:
            evaluate(do.eval, given, do.per_class)
        elif do.predict:
            predict(do.predict[0], do.predict[1:], given)
        elif do.report:
            report(do.report)
        elif do.tables:
            ltcl.require(Path(do.tables).is_file(), f"{do.tables} does not exist: name a file of --results")
            print(tables(read_results(do.tables)))
        else:
            train_all(do, given)
        return 0
    except Stopped as stopped:
        number, out = stopped.args
        program = "python" if RANKS == 1 else f"torchrun --nproc_per_node={RANKS}"
        command = f"{program} train.py --resume --out {shlex.quote(str(out))}"
        command += f" --results {shlex.quote(do.results)}" if do.results else ""
        live("")
        say("stopped, all is saved; to go on: " + ("repeat the command" if do.seeds else command))
        return 128 + number
    except KeyboardInterrupt:
        message, status = "stopped", 130
    except Lost as lost:
        message, status = f"error: {lost}", 1
    except (ltcl.InputError, OSError, RuntimeError) as error:
        text, status = str(error), 2
        if "DataLoader worker" in text:
            message = (f"error: a process that reads images failed ({text.strip().splitlines()[-1]}): "
                       "is memory or shared memory short? take fewer --workers, or 0")
        elif not isinstance(error, RuntimeError):
            message = f"error: {text}"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):   # most often no C++ compiler
            message = f"error: --compile on does not work here ({text.splitlines()[0]}): leave it out"
        elif "allocate" in text or "out of memory" in text:                             # torch's words
            message = "error: too little memory: take a smaller --batch-size or --queue"
        else:
            raise
    live("")
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")   # names of files that aren't UTF-8
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BrokenPipeError):          # of a reader that has enough, as head
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)    # an ordinary exit is aborted by threads that wait for a lost process, and waits for workers, who ignore signals
