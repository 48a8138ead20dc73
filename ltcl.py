"""ltcl: long-tailed contrastive learning in one file.

Real data has a long tail: a few classes with many images, most with a handful.
Two papers learn better features for it by contrast, and this file implements both, from pixels to accuracy by class size,
on a CPU or a GPU. With DSCL+PBSD and --recipe record a plain ResNet-32 has 86.9 ± 0.1 % on CIFAR-10-LT and 52.7 ± 0.3 on
CIFAR-100-LT at imbalance 100 (the last of 200 epochs, three runs each; hardware, tuning and the papers' own settings: README).

[H] Wang, Han, Wei, Zhang, Wang. Contrastive Learning based Hybrid Networks for
    Long-Tailed Image Classification. CVPR 2021, arXiv 2103.14267.
[D] Xuan, Zhang. Decoupled Contrastive Learning for Long-Tailed Recognition.
    AAAI 2024, arXiv 2403.06151.
[S] Khosla et al. Supervised Contrastive Learning. NeurIPS 2020 (the SC loss).

It reads from top to bottom: data, views, networks, losses, curriculum, trainer; what isn't part
of the method, such as reading files and drawing the built-in data, is the appendix. The settings, c or
config, are train.Config: each field is a flag of train.py. lambda, PBSD's weight, is the field pbsd.

Notation.  x: images [B,3,H,W].  y: labels.  z, q, k: embeddings [B,D] of length 1, q the anchors' (queries), k their
augmentations' (keys).  tau: temperature.  N: images of a batch or a set (M of a test set), R: of all processes' batches.
B: rows (images, or all their views, stacked).  C: classes.  D: embedding dimensions.  K: rows in memory, the queue.
L: patches per image.  V: the classifier's views per image.  E: experts.  P_i: the positives of anchor i, its augmentation
one of them in SC but not in DSCL; P in code: their number.  alpha: [D]'s weight of the augmentation ([H]'s alpha, the
curriculum's coefficient, is called the contrast weight here).  size: [h,w] of a view or patch, or one number for both.
rng: a torch.Generator (numpy's where said).
"""

import contextlib
import copy
import io
import math
import os
import signal
import sys
import tempfile
import threading
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch.optim.swa_utils import get_ema_multi_avg_fn


class InputError(ValueError):
    """Something the user gave cannot work; the message says what it is and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


# ---------------------------------------------------------------------------------------
# 1. Data: a long tail is a balanced set, thinned class by class
# ---------------------------------------------------------------------------------------

def long_tail_counts(n_max, num_classes, imb):
    """Images to keep of each class: n_c = n_max * imb^(-c/(C-1)), rounded down.

    imb is n_max / n_min >= 1; 1 keeps the set balanced. Returns C integers.
    Raises InputError for imb < 1. The protocol of the field, which [H] follows too.
    """
    require(imb >= 1, f"--imb is {imb}: it is the largest class's images over the smallest's, 1 or more")
    return [int(n_max * imb ** (-c / max(num_classes - 1, 1)) + 1e-9) for c in range(num_classes)]     # 49 * 49**-1 is 0.999...


def draw_of_each_class(labels, counts, seed=0):
    """Rows of counts[c] images of each class c, or of all it has: int64 array. Each class's rows are shuffled by
    numpy's legacy stream, carried from class to class, and the first taken: the field's own split has seed 0."""
    rng = np.random.RandomState(seed)                   # numpy's; a stream of our own, the global one stays untouched
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:n_c] for c, n_c in enumerate(counts)])


def long_tail_indices(labels, imb, seed=0):
    """Rows of the long-tailed subset of a labelled set, grouped by class: int64 array.

    labels: [N] integers 0..C-1. Classes keep their order: of a balanced set 0 becomes the head, C-1 the tail.
    Raises InputError for imb < 1, and for one so large that a class would keep no image.
    """
    sizes = np.bincount(labels)
    counts = long_tail_counts(sizes.max(), len(sizes), imb)
    require(min(counts) > 0, f"--imb {imb:g} leaves class {counts.index(min(counts))} no image: "
            f"take at most {sizes.max()}, the largest class's size")
    return draw_of_each_class(np.asarray(labels), counts, seed)


@dataclass
class Dataset:  # made by load_dataset; that and ImageFiles: appendix
    x_train: torch.Tensor  # uint8 [N,3,H,W], or ImageFiles
    y_train: torch.Tensor  # int64 [N], 0..C-1
    x_test: torch.Tensor   # uint8 [M,3,H,W], or ImageFiles
    y_test: torch.Tensor   # int64 [M]
    class_names: list      # C strings


def take(x, rows):
    """These rows of x, a tensor or ImageFiles."""
    return x[rows] if isinstance(x, torch.Tensor) else ImageFiles([x.paths[i] for i in rows])


def hold_out(data, share):
    """The data with a share of each training class, rounded up, as its test set: to choose settings by, so that the
    real test set stays unseen. At least one image of each class stays in training, so a class of one has no test image.
    Raises InputError where no class has two."""
    y, sizes = data.y_train, np.bincount(data.y_train)                          # [N], [C]
    counts = np.ceil(share * sizes - 1e-9).astype(int)                          # [C]; as a float 0.07 * 100 is above 7
    test = draw_of_each_class(y.numpy(), np.minimum(counts, sizes - 1))
    require(len(test) > 0, "--holdout: no class has two images, one to train on and one to test: add some")
    kept = np.setdiff1d(np.arange(len(y)), test)
    return Dataset(take(data.x_train, kept), y[kept], take(data.x_train, test), y[test], data.class_names)


def class_balanced_rows(y, counts, n, rng):
    """[H]'s sampling for the classifier: rows with replacement, each class equally likely. y [N], counts [C] -> [n].
    In float64: multinomial adds the weights up, and with thousands of classes a float32 sum is too coarse."""
    return torch.multinomial(1 / counts[y].double(), n, replacement=True, generator=rng)  # [n]


# ---------------------------------------------------------------------------------------
# 2. Views: random changes that leave the class alone, drawn anew for every image of a batch
# ---------------------------------------------------------------------------------------

def random_crop(x, rng):
    """Pad each side by an eighth of its length (4 pixels of 32), cut a window of the old size: uint8 [B,3,H,W] -> same."""
    B, _, H, W = x.shape
    h, w = H // 8, W // 8
    windows = F.pad(x, [w, w, h, h]).unfold(2, H, 1).unfold(3, W, 1)    # [B,3,2h+1,2w+1,H,W] of one padded copy
    dy, dx = (torch.randint(2 * pad + 1, (B,), generator=rng, device=x.device) for pad in (h, w))   # [B] each
    return windows[torch.arange(B, device=x.device), :, dy, dx]     # [B,3,H,W]


def random_boxes(B, L, H, W, rng, scale=(0.05, 0.6), ratio=(0.75, 1.33), side_scale=False):
    """L boxes in each of B images of H x W pixels: [B,L,4], the corners x1, y1, x2, y2 in pixels.
    A resized crop takes one, [D]'s patches several (Trainer.patch_loss).

    scale is the box's share of the area, as in [D]'s code, and ratio its width over its height, before
    a side longer than the image's is cut to it.
    side_scale: the supplement's drawing, h = s*r*H and w = s*W: s is a share of the side, r stretches the height.
    """
    s, r, u, v = torch.rand(4, B, L, generator=rng, device=rng.device)                  # [B,L] each
    s, r = scale[0] + (scale[1] - scale[0]) * s, ratio[0] * (ratio[1] / ratio[0]) ** r  # the ratio evenly in its logarithm
    h, w = (s * r * H, s * W) if side_scale else ((s * H * W / r).sqrt(), (s * H * W * r).sqrt())   # [B,L]
    h, w = h.clamp(max=H), w.clamp(max=W)
    x1, y1 = u * (W - w), v * (H - h)
    return torch.stack([x1, y1, x1 + w, y1 + h], 2)                                     # [B,L,4]


def cut(x, boxes, size, cells=1.0, samples=-1):
    """RoIAlign: the boxes [B,L,4] of each image or feature map [B,c,h,w], resized: [B*L,c,*size].
    cells: of x, for each pixel of the boxes (1/4 for a map of stride 4); cell i covers the pixels i/cells to (i+1)/cells.
    samples: points taken along each side of an output pixel; -1: one for every cell that it covers."""
    image = torch.arange(len(x), device=x.device, dtype=boxes.dtype).repeat_interleave(boxes.shape[1])  # [B*L]
    return torchvision.ops.roi_align(x.float(), torch.cat([image[:, None], boxes.flatten(0, 1)], 1), size,
                                     spatial_scale=cells, sampling_ratio=samples, aligned=True)


def random_flip(x, rng):
    """Mirror left and right with probability 1/2: [B,3,H,W] -> same."""
    flip = torch.rand(len(x), generator=rng, device=x.device) < 0.5                     # [B]
    row = torch.arange(len(x), device=x.device) + len(x) * flip                         # [B]
    return torch.cat([x, x.flip(3)]).index_select(0, row)   # on bytes much faster than torch.where


def random_grayscale(x, rng, p=0.2):
    """Take the colour away with probability p: float [B,3,H,W] -> same."""
    chosen = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) < p            # [B,1,1,1]
    return torch.lerp(x, TF.rgb_to_grayscale(x), chosen.to(x.dtype))   # faster than torch.where


def recolour(x, brightness, contrast, saturation, hue, grey=0):
    """Change the colours of float images [B,3,H,W] in 0..1. The changes are [B,1,1]; 0 changes nothing. hue is an angle
    in radians, grey 1 takes the colour away. All are affine (hue turns the colours about the grey axis), so that an image
    needs one 3x3 matrix and one shift."""
    b, c, s, eye = brightness, contrast, saturation, torch.eye(3, device=x.device)
    luma = TF.rgb_to_grayscale(eye[:, :, None, None]).flatten()                 # [3] the colours' parts in grey
    to_grey = luma.expand(3, 3)                                                 # [3,3] a colour to its grey
    cross = (eye.roll(-1, 1) - eye.roll(1, 1)) / math.sqrt(3)                   # [3,3] cross product with the grey axis
    turn = hue.cos() * eye + hue.sin() * cross + (1 - hue.cos()) / 3            # [B,3,3] about it (Rodrigues' formula)
    saturate = (1 + s) * eye - s * to_grey                                      # [B,3,3] away from the pixel's grey
    matrix = (1 + b) * (1 + c) * turn @ saturate                                # [B,3,3]
    matrix = torch.lerp(matrix, to_grey @ matrix, grey)                         # [B,3,3]
    shift = -c * (1 + b) * (x.mean((2, 3)) @ luma)[:, None, None]               # [B,1,1] from the image's mean grey
    return torch.baddbmm(shift, matrix, x.flatten(2)).view_as(x).clamp_(0, 1)


def random_jitter(x, rng, jitter=(0.4, 0.4, 0.4, 0.1), p=0.8, grey=0.2):
    """Brightness, contrast, saturation and hue, each by up to its jitter (hue's a share of the full turn), with
    probability p, and no colour with probability grey: float [B,3,H,W] in 0..1 -> same."""
    draws = torch.rand(6, len(x), 1, 1, generator=rng, device=x.device)                 # [6,B,1,1] for b, c, s, h, p, grey
    b, c, s, h = ((2 * u - 1) * most * (draws[4] < p) for u, most in zip(draws, jitter))            # [B,1,1] each
    return recolour(x, b, c, s, 2 * math.pi * h, (draws[5] < grey).to(x.dtype))


def random_change(x, rng):
    """Each image gets one of ten changes, or none, of random strength, after TrivialAugment (Mueller and
    Hutter, ICCV 2021; its list is longer): float [B,3,H,W] in 0..1 -> same."""
    kind = torch.randint(11, (len(x), 1, 1), generator=rng, device=x.device)
    strength = 2 * torch.rand(len(x), 1, 1, generator=rng, device=x.device) - 1
    turn, shear_x, shear_y, shift_x, shift_y, brightness, contrast, saturation, solarize, posterize = (
        strength * (kind == torch.arange(10, device=x.device).view(10, 1, 1, 1)))       # [B,1,1] each, in -1..1
    angle = turn * math.pi / 6                          # up to 30 degrees; shear and shift up to 0.3 of the side
    aspect = x.shape[3] / x.shape[2]                    # affine_grid has both sides from -1 to 1
    to_x = [angle.cos(), (0.3 * shear_x - angle.sin()) / aspect, 0.6 * shift_x]
    to_y = [(0.3 * shear_y + angle.sin()) * aspect, angle.cos(), 0.6 * shift_y]
    affine = torch.cat(to_x + to_y, 1).view(-1, 2, 3)   # [B,2,3]
    x = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False), align_corners=False)
    x = recolour(x, *(0.9 * change for change in (brightness, contrast, saturation)), 0 * strength)
    x = torch.where(x > 1 - solarize.abs()[..., None], 1 - x, x)                # invert what is above a threshold
    levels = 2 ** (8 - 4 * posterize.abs()[..., None])                          # [B,1,1,1] of 256, down to 16
    return torch.where(posterize[..., None] != 0, (x * levels).floor() / levels, x)


def random_cutout(x, rng):
    """A grey box of half the sides, its centre anywhere (DeVries and Taylor 2017): float [B,3,H,W] -> same."""
    B, _, H, W = x.shape
    u, v = torch.rand(2, B, 1, generator=rng, device=x.device)                  # [B,1] each
    rows = (torch.arange(H, device=x.device) + 0.5 - H * u).abs() < H / 4       # [B,H]
    columns = (torch.arange(W, device=x.device) + 0.5 - W * v).abs() < W / 4    # [B,W]
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.5)


def random_blur(x, rng, p=0.5, sigma=(0.1, 2.0)):
    """Gaussian blur with probability p, sigma in pixels: float [B,3,H,W] -> same. The kernel spans a
    tenth of the image (23 pixels of 224), so that images below 20 pixels stay as they are."""
    B, _, H, W = x.shape
    radius = min(H, W) // 20
    if radius == 0:
        return x
    u, draw = torch.rand(2, B, 1, generator=rng, device=x.device)                       # [B,1] each
    t = torch.arange(-radius, radius + 1, device=x.device)                              # [taps]
    sigma = sigma[0] + (sigma[1] - sigma[0]) * u                                        # [B,1]
    kernel = torch.softmax(-t ** 2 / (2 * sigma ** 2), 1)                               # [B,taps] exp(-t^2/2sigma^2), of sum 1
    kernel = torch.where(draw < p, kernel, (t == 0).float()).repeat_interleave(3, 0)    # [3*B,taps]
    x = F.pad(x.reshape(1, 3 * B, H, W), [radius] * 4, mode="reflect")                  # every image's every colour: a channel
    x = F.conv2d(F.conv2d(x, kernel[:, None, :, None], groups=3 * B), kernel[:, None, None, :], groups=3 * B)
    return x.view(B, 3, H, W)


def crop_view(x, rng, size=None):
    """[H]'s, both branches: crop, flip, grayscale. uint8 [B,3,H,W] -> float in 0..1. size is unused: other views need it."""
    return random_grayscale(random_flip(random_crop(x, rng), rng) / 255, rng)


def resized_view(x, rng, size):
    """Resized crop, flip; others begin with it. uint8 [B,3,H,W] -> float [B,3,*size] in 0..1."""
    boxes = random_boxes(len(x), 1, *x.shape[2:], rng, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))   # [B,1,4]
    # one sample a pixel is enough: along a side it covers 8/7 of an image's pixel at most (Trainer.take_data)
    return cut(random_flip(x, rng), boxes, size, samples=1).div_(255)


def colour_view(x, rng, size):
    """ProCo's and BCL's contrastive views: resized crop, flip, colours. uint8 [B,3,H,W] -> float [B,3,*size] in 0..1."""
    return random_jitter(resized_view(x, rng, size), rng)


def query_view(x, rng, size):
    """[D, settings]: resized crop, flip, colours, blur. uint8 [B,3,H,W] -> float [B,3,*size] in 0..1."""
    return random_blur(colour_view(x, rng, size), rng)


def key_view(x, rng, size):
    """[D, settings]: weaker, without hue, grayscale and blur. uint8 [B,3,H,W] -> float [B,3,*size] in 0..1."""
    return random_jitter(resized_view(x, rng, size), rng, (0.4, 0.4, 0.4, 0), p=1, grey=0)


def patch_view(x, rng):
    """What [D] does to a patch: float [B,3,side,side] in 0..1 -> same."""
    return random_blur(random_jitter(random_flip(x, rng), rng), rng)


def strong_view(x, rng, size=None):
    """ProCo's and BCL's classifier view: crop, flip, a random change (in place of AutoAugment), Cutout.
    uint8 [B,3,H,W] -> float in 0..1. size is unused: other views need it."""
    return random_cutout(random_change(random_flip(random_crop(x, rng), rng) / 255, rng), rng)


AUGMENTATIONS = {  # the views of query, key and classifier, and what is done to a patch
    "crop": (crop_view, crop_view, crop_view, lambda x, rng: random_grayscale(random_flip(x, rng), rng)),
    "resized": (query_view, key_view, resized_view, patch_view),
    "strong": (colour_view, colour_view, strong_view, patch_view),
}


# ---------------------------------------------------------------------------------------
# 3. Networks: one backbone, two heads [H]
# ---------------------------------------------------------------------------------------

def block(c_in, c_out, stride):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, option A): every second pixel, new
    channels zero. ZeroPad3d pads the last three dimensions of [B,c,h,w], here c alone."""
    pad = (c_out - c_in) // 2
    shortcut = nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, pad, pad)))
    return torchvision.models.resnet.BasicBlock(c_in, c_out, stride, shortcut if stride > 1 else None)


CIFAR_NETS = {f"resnet{6 * n + 2}": n for n in (1, 3, 5, 9)}    # n blocks in each of three stages
NETS = [*CIFAR_NETS, "resnet18", "resnet50", "resnext50_32x4d"]


def backbone(name):
    """The layers of a network, with random weights: its early stages, its last stage, and its width.

    CIFAR ResNets of depth 6n+2 (He et al. 2016, sec. 4.2): [B,3,H,W] -> [B,64,H/4,W/4].
    torchvision's networks: [B,3,H,W] -> [B,width,H/32,W/32], width 512 or 2048.
    """
    if name not in CIFAR_NETS:
        net = torchvision.models.get_model(name)
        *early, last, _, _ = net.children()             # ..., layer4, pooling, linear layer
        return early, [last], net.fc.in_features
    n = CIFAR_NETS[name]
    widths = [16] * (n + 1) + [32] * n + [64] * n
    blocks = [block(a, b, stride=b // a) for a, b in zip(widths, widths[1:])]
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), *blocks]
    for m in nn.Sequential(*layers).modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    return layers[:-n], layers[-n:], 64


class CosineLinear(nn.Linear):
    """Logits from the angle alone: a large class can't get a longer weight vector (Gidaris and Komodakis, CVPR 2018)."""
    scale = 30                                          # cosines end at 1, too little for a softmax to be sure

    def forward(self, x):
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))    # [B,C]


class Expert(nn.Module):
    """The backbone's last stage, both heads [H] and PSC's prototypes. Several make an ensemble, as in [D]."""

    def __init__(self, last, width, num_classes, dim, hidden, cosine):
        super().__init__()
        self.last = nn.Sequential(*last)
        self.head = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                                  nn.Linear(hidden, dim))
        self.classifier = CosineLinear(width, num_classes, bias=False) if cosine else nn.Linear(width, num_classes)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_classes, dim), dim=1))  # PSC's, [C,D]


def batchnorms(net):
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Hybrid(nn.Module):
    """Backbone, projection heads (feature branch) and classifiers (classifier branch).

    Called on float images [B,3,H,W] in 0..1 it gives the classifiers' logits [B,C], the mean over
    the experts. mean and std [3] are the training images' own and travel with the weights.
    amp: the dtype in which the backbone alone computes; None is float32.
    """

    def __init__(self, net, num_classes, mean, std, experts=1, cosine=False, dim=128, hidden=512, amp=None):
        super().__init__()
        early, last, width = backbone(net)
        self.early = nn.Sequential(*early)              # shared by the experts; each has a last stage of its own
        lasts = [last] + [backbone(net)[1] for _ in range(experts - 1)]
        self.experts = nn.ModuleList(Expert(last, width, num_classes, dim, hidden, cosine) for last in lasts)
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))
        self.amp = amp
        # set by Trainer and load(): pictures are resized to stored [h,w], of which size [h,w] is cut
        self.class_names = self.counts = self.stored = self.size = None
        for m in batchnorms(self):
            m.num_batches_tracked = None                # counting costs a kernel launch per layer, nothing reads it

    def maps(self, x):
        """Each expert's feature map, float32 [B,width,h,w]."""
        x = ((x - self.mean) / self.std).contiguous(memory_format=layout(x.device))    # layout: appendix
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            x = self.early(x)
            maps = [expert.last(x) for expert in self.experts]
        return [m.float() for m in maps]

    def embed(self, maps):
        """Unit embeddings of each expert's feature maps, [E,B,D]."""
        return torch.stack([F.normalize(e.head(m.mean((2, 3))), dim=1) for e, m in zip(self.experts, maps)])

    def logits(self, maps):
        """Each expert's logits, [E,B,C]."""
        return torch.stack([e.classifier(m.mean((2, 3))) for e, m in zip(self.experts, maps)])

    def forward(self, x):
        return self.logits(self.maps(x)).mean(0)        # [B,C]

    def preprocess(self, picture):
        """A picture (a path or a PIL image) as this network takes it: float [3,H,W] in 0..1."""
        return TF.center_crop(read_picture(picture, self.stored), self.size) / 255


# ---------------------------------------------------------------------------------------
# 4. Losses: with s = similarity / tau, each is the logsumexp of s over candidates minus s to a target
#
#          candidates in the logsumexp           target
#   SC     all rows but the anchor               mean of the positives, the augmentation among them
#   PSC    the prototypes of the other classes   the own class's prototype
#   DSCL   all rows but the anchor, and memory   alpha * augmentation + (1-alpha) * mean of the other positives
#   PBSD   the augmentations and memory          their mean, weighted as the teacher sees them
#
# Each works alone, pasted below `import torch` and `import torch.nn.functional as F`. They compute in float32 also inside
# autocast: with similarities in bfloat16 the gradient is several percent off at tau 0.07, more for tighter classes. Means
# over positives come from the sums of whole classes, which saves memory and time. The logsumexp of many rows goes in
# blocks: all are kept for backward, but its temporaries are one block's. Rows that are no candidates get the lowest finite
# number for s: with -inf a block of nothing else would have a NaN gradient.
# ---------------------------------------------------------------------------------------

def sc_loss(z, y, tau=0.1):
    """Supervised contrastive loss [H eq. 1-2] [S, L_out]. A scalar, float32 (float64 stays).

    z: [B,D] unit embeddings, all views stacked.  y: [B] integer labels.  tau > 0.
    P_i: the other rows with anchor i's label, its augmentation among them.

        L_i = -1/|P_i| sum_{j in P_i} log( exp(z_i.z_j/tau) / sum_{k != i} exp(z_i.z_k/tau) )

    The mean over the anchors that have a positive; zero, with a zero gradient, if none has.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        y_sorted = y.sort().values                                                 # [B] y.unique() would make a GPU wait
        group = torch.searchsorted(y_sorted, y)                                    # [B] a class is its first place in y_sorted
        P = torch.searchsorted(y_sorted, y, right=True) - group - 1                # [B] |P_i|: not itself
        total = torch.zeros_like(z).index_add(0, group, z)                         # [B,D] sums over classes: no mask of pairs
        s_class = (z * (total[group] - z)).sum(1) / P.clamp(min=1) / tau           # [B] mean over P_i
        row = torch.arange(len(z), device=z.device)                                # [B]
        # in blocks of [512,B]; no anchor is its own candidate
        lse = [(z[i] / tau @ z.T).masked_fill(i[:, None] == row, torch.finfo(z.dtype).min).logsumexp(1) for i in row.split(512)]
        lse = torch.cat(lse)                                                       # [B] over the candidates
        return torch.where(P > 0, lse - s_class, 0).sum() / (P > 0).sum().clamp(min=1)


def psc_loss(z, y, prototypes, tau=0.1):
    """Prototypical supervised contrastive loss [H, PSC loss]. A scalar, float32 (float64 stays).

    z: [B,D] unit embeddings.  y: [B] labels 0..C-1.  prototypes: [C,D], normalised here, C > 1.

        L_i = -log( exp(z_i.p_{y_i}/tau) / sum_{c != y_i} exp(z_i.p_c/tau) )

    The mean over the anchors. It can be negative, as the own class is not in the denominator. Costs O(B*C), SC O(B*B).
    Raises ValueError for a single prototype: there is nothing to contrast with.
    """
    if len(prototypes) < 2:
        raise ValueError("psc_loss needs the prototypes of two classes or more")
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        p = F.normalize(prototypes.to(z.dtype), dim=1)                             # [C,D]
        s = z @ p.T / tau                                                          # [B,C]
        own = y[:, None].long()                                                    # [B,1]
        others = s.scatter(1, own, torch.finfo(z.dtype).min)                       # [B,C]
        return (others.logsumexp(1) - s.gather(1, own)[:, 0]).mean()


def dscl_loss(q, k, y, queue=None, queue_y=None, alpha=0.1, tau=0.1):
    """Decoupled supervised contrastive loss [D, L_dscl]. A scalar, float32 (float64 stays).

    q: [N,D] the anchors z_i.  k: [N,D] their augmentations z_i+; both get a gradient.  y: [N] labels >= 0.
    queue: [K,D] older embeddings with labels queue_y [K], -1 for an empty slot (of any finite row); both or none (ValueError).
    All are of length 1.  M_i: the rows of q and k of the other images, and the queue.  P_i: those of M_i with z_i's label.

        L_i = -1/(|P_i|+1) sum_{t in {i+} u P_i} log( exp(w_t z_t.z_i/tau) / sum_{m in {i+} u M_i} exp(z_m.z_i/tau) )
        w_t = alpha (|P_i|+1)  for the augmentation i+,   (1-alpha) (|P_i|+1)/|P_i|  for a row of P_i

    The sum has |P_i|+1 terms, and log exp(w s) = w s, so with s_im = z_m.z_i/tau this is what is computed:

        L_i = logsumexp of s_im over {i+} u M_i  -  alpha s_{i,i+}  -  (1-alpha) mean of s_it over P_i

    The mean over the anchors. In SC the augmentation pulls 1 : |P_i| against the class, the weaker the larger the class;
    here alpha : 1-alpha always. With an empty P_i all the weight goes to the augmentation.
    """
    if (queue is None) != (queue_y is None):
        raise ValueError("dscl_loss takes queue and queue_y together")
    if queue is None:
        queue, queue_y = q[:0], y[:0]
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        k, queue, lowest = k.to(q.dtype), queue.to(q.dtype), torch.finfo(q.dtype).min
        # the mean of z_i.z_t over P_i is z_i . (sum over its class, less i's own two rows) / |P_i|: no N x K mask
        y_sorted = y.sort().values                                                 # [N]
        group = torch.searchsorted(y_sorted, y)                                    # [N] a class is its first place in y_sorted
        # a row of the queue whose class the batch lacks gets some other class here, and weight 0 below
        queue_group = torch.searchsorted(y_sorted, queue_y).clamp(max=len(y) - 1)  # [K]
        known = (y_sorted[queue_group] == queue_y).to(q.dtype)                     # [K]
        total = torch.zeros_like(q).index_add(0, group, q + k)                     # [N,D] sums over classes
        total = total.index_add(0, queue_group, queue * known[:, None])            # [N,D]
        others = torch.searchsorted(y_sorted, y, right=True) - group - 1           # [N] other images of the class, two rows each
        P = 2 * others + q.new_zeros(len(y)).index_add(0, queue_group, known)[group]                   # [N] |P_i|
        s_class = (q * (total[group] - q - k)).sum(1) / P.clamp(min=1) / tau       # [N] mean over P_i
        s_augmentation = (q * k).sum(1) / tau                                      # [N]
        target = torch.where(P > 0, alpha * s_augmentation + (1 - alpha) * s_class, s_augmentation)     # [N]
        # the candidates: the keys, the other anchors, and the queue without its empty slots, in blocks
        empty = lowest * (queue_y == -1).to(q.dtype)                               # [K]
        blocks = [q @ k.T / tau, (q @ q.T / tau).fill_diagonal_(lowest)]           # [N,N] each
        blocks += [F.linear(q / tau, queue[i:i + 8192], empty[i:i + 8192]) for i in range(0, len(queue), 8192)]
        lse = torch.stack([s.logsumexp(1) for s in blocks], 1).logsumexp(1)        # [N] over the candidates
        return (lse - target).mean()


def pbsd_loss(c, s, candidates, tau=0.1, valid=None):
    """Patch-based self-distillation [D, L_pbsd]. A scalar, float32 (float64 stays).

    c: [N,L,D] or [N*L,D] teacher, patches pooled from the feature map; no gradient flows into it.
    s: as c, the student's, of the same patches cut from the pixels.  candidates: [R+K,D], the keys and the queue
    (in [D] the other anchors, too).  All rows are of length 1.
    valid: [R+K] bool, False for an empty slot, at least one True; None: all are candidates.

        L_pbsd = 1/L sum_j sum_t -p(z_t|c_j) log p(z_t|s_j),    p(z_t|v) = softmax over t of v.z_t/tau

    The mean over the N images. The candidates get a gradient through log p(z|s) alone.
    """
    with torch.autocast(s.device.type, enabled=False):
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        c, candidates = c.to(s.dtype), candidates.to(s.dtype)
        empty = None if valid is None else torch.finfo(s.dtype).min * (~valid).to(s.dtype)     # [R+K] added to the logits
        p = F.linear(c / tau, candidates, empty).softmax(-1).detach()              # [N,L,R+K] or [N*L,R+K]
        logits = F.linear(s / tau, candidates, empty)                              # [N,L,R+K] or [N*L,R+K]
        return F.cross_entropy(logits.flatten(0, -2), p.flatten(0, -2))


@torch.no_grad()
def embedding_statistics(q, k, y):
    """Does contrast learn? Mean cosine of same-class pairs (an image's two views among them) and of
    other pairs, q against k [N,D], and the embeddings' spread sqrt(1 - |mean|^2): 0 when all are one
    point, 1 when they balance about the centre. Scalar tensors."""
    cosine, same = q @ k.T, y[:, None] == y             # [N,N], [N,N]
    return dict(cos_positive=(cosine * same).sum() / same.sum(),
                cos_negative=(cosine * ~same).sum() / (~same).sum().clamp(min=1),
                spread=q.var(0, correction=0).sum().sqrt())


# ---------------------------------------------------------------------------------------
# 5. Curriculum: from features to classifier [H], and the learning rate
# ---------------------------------------------------------------------------------------

CURRICULA = {  # the contrast weight at t = T/Tmax in 0..1; [H]'s choice first, then alternatives
    "parabolic": lambda t: 1 - t ** 2,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi / 2 * t),
    "constant": lambda t: 0.5,
    "two-stage": lambda t: 1.0,  # [D]: contrast alone, then the classifier on a frozen backbone
}


def contrast_weight(epoch, epochs, curriculum="parabolic"):
    """w(T) of L = w(T) L_con + (1-w(T)) L_ce [H, the hybrid loss], for epoch T = 0..epochs-1;
    0 in the epochs of the second stage, which follow."""
    return CURRICULA[curriculum](epoch / epochs) if epoch < epochs else 0.0


def learning_rate(t, c):
    """The learning rate after t > 0 epochs (1.5: the middle of the second): linear warm-up, then x0.1 after 60 % and
    again after 80 % of --epochs (120 and 160 of 200 in [H]), or half a cosine down to zero. In the second
    stage x0.1 after a half and three quarters (20 and 30 of 40 epochs in [D]). c: the settings, train.Config;
    lr, epochs, warmup, schedule, stage2_epochs and stage2_lr are read."""
    if t > c.epochs:
        t = (t - c.epochs) / c.stage2_epochs
        return c.stage2_lr * 0.1 ** ((t > 0.5) + (t > 0.75))
    warmup = min(c.warmup, 0.2 * c.epochs)              # so that a short run reaches its full learning rate too
    if t <= warmup:
        return c.lr * t / warmup
    if c.schedule == "step":
        return c.lr * 0.1 ** ((t > 0.6 * c.epochs) + (t > 0.8 * c.epochs))
    return c.lr * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (c.epochs - warmup)))


# ---------------------------------------------------------------------------------------
# 6. Trainer: the hybrid [H]
# ---------------------------------------------------------------------------------------

def shot_groups(counts):
    """The field's groups of classes by training images, counts [C]: many > 100, medium 20-100, few < 20. Masks [C]."""
    return dict(many=counts > 100, medium=(counts >= 20) & (counts <= 100), few=counts < 20)


def accuracy(predicted, y, counts):
    """Accuracy in % on a test set [M]: over all images (top1), of each class (by_class, NaN without test images), as
    the mean over classes (balanced) and over those of each shot group (None without test images)."""
    C, hit = len(counts), (predicted == y).double()                                     # [M]
    by_class = 100 * torch.bincount(y, hit, C) / torch.bincount(y, minlength=C)         # [C] NaN without test images
    groups = {name: by_class[group].nanmean() for name, group in shot_groups(counts).items()}
    return dict(top1=100 * hit.mean().item(), balanced=by_class.nanmean().item(), by_class=by_class.tolist(),
                **{name: None if mean.isnan() else mean.item() for name, mean in groups.items()})


class Trainer:
    """One training run: all that changes while it trains is in here.

    config: the settings, train.Config.  data: Dataset, thinned here to --imb. Raises InputError where
    they do not fit together, and during training when the loss stops being a number.

    With torch.distributed at work, every process has a Trainer and takes its part of each batch.
    """

    def __init__(self, config, data):
        c = self.config = config
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        two_stage = c.curriculum == "two-stage"
        for flag, n in (("--batch-size", c.batch_size), ("--stage2-batch", c.stage2_batch if two_stage else 0)):
            require(n % self.ranks == 0, f"{flag} {n} can't be shared by {self.ranks} processes: take a multiple of {self.ranks}")
        require(c.batch_size >= 2 * self.ranks, f"--batch-size {c.batch_size}: BatchNorm needs two images per process or more")
        self.epoch = 0                                  # epochs done
        self.epochs = c.epochs + (c.stage2_epochs if two_stage else 0)
        self.history = []                               # of the steps done in this epoch: [parts] each, the loss first
        self.evaluated = {}                             # the last accuracy
        self.device = pick_device(c.device)
        self.shuffle = torch.Generator()                # of batches: on the host, so that every device has the same ones
        self.rng = torch.Generator(self.device)         # of views, see reseed
        self.take_data(data)
        self.build(*self.look_at_data())

    def take_data(self, data):
        """The training images, less those held out, thinned to a long tail, and the test images."""
        c, files = self.config, isinstance(data.x_train, ImageFiles)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            require(len(x) == len(y) and y.dtype == torch.int64
                    and (files or x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1:] == (3, *data.x_train.shape[2:])),
                    "the data have a wrong type or shape: labels are int64 [N], images uint8 [N,3,H,W] of one size")
        self.class_names = check_labels("the data", data.y_train, data.y_test, data.class_names)    # C strings
        data = hold_out(data, c.holdout) if c.holdout else data     # after the check of the labels
        kept = long_tail_indices(data.y_train, c.imb)                                           # [N]
        require(c.batch_size <= len(kept), f"--batch-size {c.batch_size} is more than the {len(kept)} "
                "training images: take a smaller one")
        x, y = take(data.x_train, kept), data.y_train[kept]
        self.fingerprint = fingerprint(x, y)            # by which load_state_dict() knows them again
        stored = [c.size * 8 // 7] * 2                  # of image files: 256 for resized views of 224
        self.x, self.x_test = (ImageFiles(part.paths, stored) if files else part.to(self.device) for part in (x, data.x_test))
        self.y, self.y_test = y.to(self.device), data.y_test
        self.counts = torch.bincount(y)                                                         # [C]
        self.log_counts = self.counts.to(self.device).log()                                     # [C] log n_c

    def look_at_data(self):
        """Sets the sizes of images and views and the augmentation. Returns mean and standard deviation [3] of the
        pixels in 0..1: of all images, but of no more than 1,000 files."""
        c, files = self.config, isinstance(self.x, ImageFiles)
        sample = torch.arange(0, len(self.y), math.ceil(len(self.y) / 1000) if files else 1)
        pixels, _ = next(self.images(self.x, [sample]))                                         # uint8 [n,3,H,W]
        require(min(pixels.shape[2:]) >= 8, f"the images have {pixels.shape[2]} x {pixels.shape[3]} pixels: "
                "a side needs 8 or more")
        self.aug = c.aug if c.aug != "auto" else "resized" if files else "crop"
        self.stored = list(pixels.shape[2:])            # [h,w] of the images, to which load()'s network resizes others
        self.size = [c.size] * 2 if self.aug == "resized" and files else self.stored            # [h,w] of the views
        # a channel at a time: as floats, pixels take four times the memory
        channels = [torch.stack(torch.std_mean(channel.float().div_(255))) for channel in pixels.cpu().unbind(1)]
        std, mean = torch.stack(channels, 1)                                                    # [3], [3]
        return mean, std.clamp(min=1 / 255)

    def build(self, mean, std):
        """The network with its slow copies (see follow), the queue and the optimisers."""
        c, amp = self.config, pick_amp(self.config.amp, self.device)
        with torch.random.fork_rng(devices=[]):         # the same initial weights on every device
            torch.default_generator.manual_seed(c.seed)         # torch.manual_seed would reach the GPU's, too
            net = Hybrid(c.net, len(self.counts), mean, std, c.experts, c.logits == "cosine", c.dim, c.hidden, amp)
        net = synchronised(net, self.device) if c.batchnorm == "sync" else net          # appendix
        net.class_names, net.counts, net.stored, net.size = self.class_names, self.counts.tolist(), self.stored, self.size
        self.net = net.to(self.device, memory_format=layout(self.device))
        self.key_encoder = copy.deepcopy(self.net).requires_grad_(False) if c.ema else None     # makes the keys
        self.averaged = copy.deepcopy(self.net).requires_grad_(False).eval() if c.average else None     # is evaluated
        if c.compile == "on":
            for encoder in filter(None, (self.net, self.key_encoder)):
                encoder.maps = torch.compile(encoder.maps, dynamic=False)
        self.queue = torch.zeros(c.experts, c.queue, c.dim, device=self.device)                  # [E,K,D]
        self.queue_y = torch.full((c.queue,), -1, device=self.device)                           # [K] -1: empty
        classifiers = [p for e in net.experts for p in e.classifier.parameters()]
        self.optimizers = [torch.optim.SGD(net.parameters(), c.lr, c.momentum, weight_decay=c.weight_decay),
                           torch.optim.SGD(classifiers, c.stage2_lr, c.momentum)]              # of the two stages
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        for e in net.experts:                           # several processes would wait for gradients of unused parts
            e.head.requires_grad_(c.method != "ce")
            e.prototypes.requires_grad_(c.method == "psc")
        self.parallel = distributed(self) if self.ranks > 1 else None      # appendix

    @property
    def weight(self):
        """The epoch's contrast weight."""
        c = self.config
        return 0.0 if c.method == "ce" else contrast_weight(self.epoch, c.epochs, c.curriculum)

    @property
    def classifies(self):
        """Does the epoch train the classifier? All do, but those of the first of two stages, where it is contrast alone.
        (Most other curricula begin at weight 1, too: there the classifier's loss is computed, but counts nothing yet.)"""
        return self.weight < 1 or self.config.curriculum != "two-stage"

    def batches(self, R, steps):
        """The rows of an epoch's batches [steps,n], R for each branch. n is R where the branches share instance-balanced
        rows, or one branch alone is trained; it is 2R where the classifier has class-balanced rows of its own, which follow
        R instance-balanced ones. Each of several processes gets its part of both, R / ranks."""
        c = self.config
        baseline = c.method == "ce" and self.epoch < c.epochs
        balanced = self.classifies and (c.classifier == "class-balanced" or c.classifier == "auto" and not baseline)
        order = torch.randperm(len(self.y), generator=self.shuffle)[:steps * R]
        draws = [order] if self.weight or not balanced else []
        if balanced:
            draws.append(class_balanced_rows(self.y.cpu(), self.counts, steps * R, self.shuffle))
        branches = [rows.view(steps, R).chunk(self.ranks, 1)[self.rank] for rows in draws]      # [steps,R/ranks] each
        return torch.cat(branches, 1).to(self.device)                                           # [steps,n/ranks]

    def images(self, x, plan):
        """Yields (pixels, rows) of each batch of rows in plan: uint8 [n,3,H,W] and [n], on the device. Files are
        read by workers; in place of one that can't be read comes the next that can, with that one's row."""
        if isinstance(x, torch.Tensor):
            yield from ((x[rows], rows) for rows in plan)
            return
        plan = [rows.cpu() for rows in plan]            # once: no step waits for the device
        loader = torch.utils.data.DataLoader(x, batch_sampler=[rows.tolist() for rows in plan],
                                             num_workers=self.config.workers, pin_memory=self.device.type == "cuda",
                                             worker_init_fn=leave_signals_to_the_trainer)
        with signals_blocked():                         # one would kill a worker that is still starting
            batches = iter(loader)
        for (pixels, rows), asked in zip(batches, plan):
            x.report(asked, rows)
            yield pixels.to(self.device, non_blocking=True), rows.to(self.device, non_blocking=True)

    def reseed(self, *place):
        """The generators' state follows from --seed and the place in the run alone: epoch, step, process.
        So there is no random state that a checkpoint could lose."""
        state, = np.random.SeedSequence((self.config.seed, *place)).generate_state(1, np.uint64)
        for rng in (self.shuffle, self.rng):
            rng.manual_seed(int(state))

    def contrast_loss(self, q, k, y, prototypes, queue):
        """One expert's loss, from its embeddings of two views [R,D], prototypes [C,D] and queue [K,D]. Both views are
        anchors in turn; with a momentum encoder q alone [D]."""
        c = self.config
        if c.method == "dscl":
            loss = dscl_loss(q, k, y, queue, self.queue_y, c.alpha, c.tau)
            return loss if c.ema else (loss + dscl_loss(k, q, y, queue, self.queue_y, c.alpha, c.tau)) / 2
        z, yy = torch.cat([q, k]), torch.cat([y, y])    # [2R,D], [2R]
        return sc_loss(z, yy, c.tau) if c.method == "sc" else psc_loss(z, yy, prototypes, c.tau)

    def patch_loss(self, view, maps, keys):
        """PBSD: the same boxes cut from the view's pixels [N,3,H,W] (students) and from its feature
        map (teachers). maps: [N,width,h,w] of each expert.  keys: [E,R,D]."""
        c, (N, _, H, W) = self.config, view.shape
        # 64 of 224 pixels with [D]'s views [D, settings]; with the others, meant for small images, half the side
        side = c.patch_size or (H * 2 // 7 if self.aug == "resized" else H // 2)
        boxes = random_boxes(N, c.patches, H, W, self.rng, side_scale=c.box_scale == "side")    # [N,L,4]
        patches = AUGMENTATIONS[self.aug][3](cut(view, boxes, side), self.rng)                  # [N*L,3,side,side]
        # patches would spoil the running statistics, on which the evaluation of whole images relies
        for m in batchnorms(self.net):
            m.track_running_stats = False
        students = self.net.embed(self.net.maps(patches))                                       # [E,N*L,D]
        # padded convolutions centre cell i on pixel i * stride, but cut() on the middle of its tile, (stride - 1) / 2 pixels
        # further on: so the boxes move by that, for teachers to see the students' pixels. (Unmoved they would be that far
        # apart; [D]'s code, unmoved with aligned=False, is off by half a pixel)
        stride = 4 if c.net in CIFAR_NETS else 32
        with torch.no_grad():
            teachers = self.net.embed([cut(m, boxes + (stride - 1) / 2, 2, 1 / stride) for m in maps])  # [E,N*L,D]
        for m in batchnorms(self.net):
            m.track_running_stats = True
        valid = F.pad(self.queue_y >= 0, (keys.shape[1], 0), value=True)                        # [R+K] keys and full slots
        losses = [pbsd_loss(t, s, torch.cat([k, queue]), c.tau, valid)
                  for t, s, k, queue in zip(teachers, students, keys.detach(), self.queue)]
        return sum(losses) / len(losses)

    def contrast(self, views, maps, y):
        """The feature branch: its losses with what shows whether it learns, and the keys [E,R,D] with their labels [R].
        maps: [2N,width,h,w] of each expert, with a momentum encoder the query's [N,width,h,w] alone."""
        N = len(y)
        z = self.net.embed(maps)                                            # [E,2N,D]; [E,N,D] with a momentum encoder
        q, k = z[:, :N], z[:, N:]                       # [E,N,D] each; with a momentum encoder k is empty here
        if self.key_encoder:
            with torch.no_grad():
                k = self.key_encoder.embed(self.key_encoder.maps(views[1]))
        q, k, y = gather(q, 1), gather(k, 1), gather(y)     # [E,R,D], [E,R,D], [R] of all processes (gather: appendix)
        losses = [self.contrast_loss(q_e, k_e, y, e.prototypes, queue)          # of each expert
                  for q_e, k_e, e, queue in zip(q, k, self.net.experts, self.queue)]
        parts = dict(loss_contrast=sum(losses) / len(losses), **embedding_statistics(q[0], k[0], y))       # the first expert's
        if self.config.pbsd:
            parts["loss_pbsd"] = self.patch_loss(views[0], [m[:N] for m in maps], k)
        return parts, (k.detach(), y)

    def losses(self, x, y, x_ce, y_ce):
        """The loss of a step with its parts, and the keys with their labels. x uint8 [N,3,H,W] and y [N]: this process's
        rows for contrast; x_ce and y_ce: for the classifier, perhaps the same. All views go through the network as one
        batch, N queries, N keys (unless a momentum encoder takes these) and VN for the classifier, so that BatchNorm's
        running statistics, which evaluation uses, are of the mixture that it normalised in training. The first of two
        stages has no views for the classifier; the second, and ce in either, have no others."""
        c, N, V, weight = self.config, len(y), self.config.classifier_views, self.weight
        query, key, ce_view, _ = AUGMENTATIONS[self.aug]
        views = [query(x, self.rng, self.size), key(x, self.rng, self.size)] if weight else []        # [N,3,H,W] each
        seen = views[:1] if self.key_encoder else views        # the momentum encoder takes the keys' view
        classified = [ce_view(x_ce.repeat(V, 1, 1, 1), self.rng, self.size)] if self.classifies else []       # [VN,3,H,W]
        with torch.set_grad_enabled(self.epoch < c.epochs):             # the second stage's backbone is frozen
            maps = self.net.maps(torch.cat(seen + classified))          # [up to (2+V)N,width,h,w] of each expert
        parts, keys, loss = {}, None, 0
        if weight:
            parts, keys = self.contrast(views, [m[:len(seen) * N] for m in maps], y)
            loss = weight * (parts["loss_contrast"] + c.pbsd * parts.get("loss_pbsd", 0))   # [D, L_dscl + lambda L_pbsd]
        if self.classifies:
            logits = self.net.logits([m[-V * N:] for m in maps])        # [E,VN,C]
            if c.classifier == "logit-adjusted":
                # [Menon et al. 2021, logit adjustment]: their tau times log n_c, the log prior but for a constant
                logits = logits + c.adjust * self.log_counts    # [E,VN,C]
            parts["loss_ce"] = F.cross_entropy(logits.flatten(0, 1), y_ce.repeat(c.experts * V))
            loss = loss + (1 - weight) * parts["loss_ce"]               # [H, the hybrid loss]
        return dict(loss=loss, **parts), keys

    def remember(self, keys, y):
        """The keys [E,R,D] join the queue at its end, the R oldest leave it [D, as MoCo]."""
        self.queue = torch.cat([self.queue, keys], 1)[:, len(y):]                               # [E,K,D]
        self.queue_y = torch.cat([self.queue_y, y])[len(y):]                                    # [K]

    def follow(self, slow, decay):
        """slow = decay * slow + (1-decay) * net, for parameters and buffers: momentum encoder [D] or averaged weights."""
        theirs, ours = ([*net.parameters(), *net.buffers()] for net in (slow, self.net))
        get_ema_multi_avg_fn(decay)(theirs, ours, None)

    def step(self, x, y, N, optimizer):
        """One step of SGD on a batch from batches(), this process's N rows that the branches share, or N for contrast and
        then N for the classifier: x uint8 [N,3,H,W] or [2N,3,H,W], y [N] or [2N]. Returns the loss and its parts. It never
        waits for the device, except for fp16's loss scale and with --batchnorm sync."""
        parts, keys = (self.parallel or self.losses)(x[:N], y[:N], x[-N:], y[-N:])
        optimizer.zero_grad()
        self.scaler.scale(parts["loss"]).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        if keys and self.config.queue:
            self.remember(*keys)                        # after backward, which still reads the queue
        # a young average forgets faster, so that its random start is soon gone; in a second stage none is young
        t = self.epoch * (len(self.y) // self.config.batch_size) + len(self.history)            # steps done, about
        average = min(self.config.average, (1 + t) / (10 + t))
        for slow, decay in ((self.key_encoder, self.config.ema), (self.averaged, average)):
            if slow:
                self.follow(slow, decay)
        return {name: part.detach() for name, part in parts.items()}

    def agree(self):
        """Losses become the mean of all processes (those from before a resume are the first's), BatchNorm's running
        statistics those of the first."""
        history = torch.stack(self.history)                                     # [steps,parts]
        dist.all_reduce(history)
        self.history = list(history / self.ranks)
        for net in filter(None, (self.net, self.averaged)):
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def check(self):
        """Raises InputError when losses or weights are no longer numbers."""
        broken = ~torch.stack(self.history)[:, 0].isfinite().cpu()              # [steps]
        broken[-1] |= not torch.cat([t.flatten() for t in self.net.state_dict().values()]).isfinite().all()
        advice = "a lower --lr" + (" or a higher --tau" if self.config.method != "ce" else "")
        require(not broken.any(), f"loss or weights are no longer numbers in epoch {self.epoch + 1}, step "
                f"{broken.int().argmax() + 1}: try {advice}; last.pt is from before")

    def train_epoch(self, tick=lambda step, steps: None):
        """Once over the training set. Returns the epoch's mean losses and statistics, contrast weight and last learning rate.
        Between its steps nothing is read from the device. tick is called there: it may save the state, or raise to stop;
        then the next call goes on there."""
        require(self.epoch < self.epochs, f"all {self.epochs} epochs are done: for more, start a run with more --epochs")
        c, weight, second = self.config, self.weight, self.epoch >= self.config.epochs
        R = min(c.stage2_batch, len(self.y) // self.ranks * self.ranks) if second else c.batch_size
        steps = len(self.y) // R                        # the incomplete last batch is left out
        optimizer = self.optimizers[second]
        self.net.train(not second)                      # in the second BatchNorm is as in evaluation
        self.reseed(self.epoch)
        done, plan = len(self.history), self.batches(R, steps)
        for i, (x, rows) in enumerate(self.images(self.x, plan[done:]), done):
            lr = learning_rate(self.epoch + (i + 1) / steps, c)
            optimizer.param_groups[0]["lr"] = lr
            self.reseed(self.epoch, i + 1, self.rank)   # + 1: numpy takes (epoch, 0, 0) for (epoch,)
            parts = self.step(x, self.y[rows], R // self.ranks, optimizer)
            self.history.append(torch.stack(list(parts.values())))
            if i + 1 < steps:
                tick(i + 1, steps)
        if self.ranks > 1:
            self.agree()
        self.check()
        table, self.history = torch.stack(self.history).cpu(), []               # [steps,parts]
        self.epoch += 1
        return dict(zip(parts, table.mean(0).tolist()), contrast_weight=weight, lr=lr)

    @torch.inference_mode()
    def evaluate(self):
        """Accuracy of the classifier branch on the whole test set (less files that can't be read), see accuracy()."""
        training = self.net.training                    # it may be the middle of an epoch
        net = self.averaged or self.net.eval()
        n = max(1, min(500, 2 ** 21 // math.prod(self.size)))       # large images take more memory
        plan = torch.arange(len(self.y_test), device=self.device).split(n)[self.rank::self.ranks]
        predicted = torch.full((len(self.y_test),), -1, device=self.device)     # [M] -1: another process's, or can't be read
        for (x, rows), asked in zip(self.images(self.x_test, plan), plan):
            classes = net(TF.center_crop(x, self.size) / 255).argmax(1)                         # [n]
            predicted[asked] = torch.where(rows == asked, classes, -1)
        if self.ranks > 1:
            dist.all_reduce(predicted, dist.ReduceOp.MAX)
        self.net.train(training)
        predicted = predicted.cpu()
        known = predicted >= 0                                                  # [M]
        self.evaluated = accuracy(predicted[known], self.y_test[known], self.counts)
        return self.evaluated

    def state_dict(self):
        """All that the rest of the run depends on and that load() needs, in plain values and tensors:
        weights_only=True reads it. The tensors are live: copy.deepcopy keeps a state. Random states
        are not among it: see reseed."""
        return dict(net=self.net.state_dict(), key_encoder=self.key_encoder and self.key_encoder.state_dict(),
                    averaged=self.averaged and self.averaged.state_dict(),
                    queue=self.queue, queue_y=self.queue_y,
                    optimizers=[o.state_dict() for o in self.optimizers], scaler=self.scaler.state_dict(),
                    epoch=self.epoch, history=self.history, evaluated=self.evaluated, ranks=self.ranks,
                    config=asdict(self.config), class_names=self.class_names, counts=self.counts.tolist(),
                    fingerprint=self.fingerprint, stored=self.stored, size=self.size, device=self.device.type,
                    versions={m.__name__: str(m.__version__) for m in (torch, torchvision, np)})

    def load_state_dict(self, state):
        """Go on from a state_dict(). Raises InputError where it is another run's."""
        require(state["class_names"] == self.class_names and state["fingerprint"] == self.fingerprint,
                "the training images are not those that the run began with, or are read otherwise: --data, --dataset or the "
                "files there have changed")
        try:
            nets = [(getattr(self, name), state[name]) for name in ("net", "key_encoder", "averaged")]
            for part, its in nets + list(zip(self.optimizers, state["optimizers"])):
                if part:
                    part.load_state_dict(copy.deepcopy(its))            # optimisers would keep its tensors
            self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())    # one that was off has no state
            self.queue.copy_(state["queue"])
            self.queue_y.copy_(state["queue_y"])
            self.epoch, self.evaluated = state["epoch"], state["evaluated"]
            self.history = [parts.to(self.device) for parts in state["history"]]
        except Exception as error:  # another version's
            raise InputError(f"the checkpoint doesn't fit these settings ({first_line(error)})") from None


# ---------------------------------------------------------------------------------------
# 7. Appendix: files, the built-in data, devices, checkpoints
# ---------------------------------------------------------------------------------------

FILE_SETS = "folder", "imagenet_lt", "inat18"


def first_line(error):
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def load_dataset(name, root="data", train_list="", test_list="", holdout=0):
    """A Dataset by name. Raises InputError for whatever cannot be read or used.

    shapes: drawn here.  cifar10, cifar100: read from root/<name>.npz; where that is missing,
    torchvision downloads them and the file is written.  The path of an .npz: its arrays x_train,
    y_train, x_test, y_test and, if you like, class_names; images uint8 [N,H,W,3] or grey [N,H,W].
    folder: image files root/train/<class>/* and root/val/<class>/* (or test), or those of two list
    files with lines "path label", paths below root; imagenet_lt and inat18 come as such lists.
    Files are read in training, but small ones of one size (64 pixels at most) here. With a holdout the test images may
    be missing: hold_out() will make a test set of those to train on, which stand in for it until then.
    """
    if name == "shapes":
        return draw_shapes()
    if name in FILE_SETS:
        return load_files(Path(root), train_list, test_list, holdout)
    if name.endswith(".npz"):
        return read_npz(Path(name), holdout)
    require(name in ("cifar10", "cifar100"), f"unknown data set {name!r}: choose shapes, "
            f"cifar10, cifar100, {', '.join(FILE_SETS)} or the path of an .npz file; a folder of images is "
            "--dataset folder --data DIR")
    path = Path(root) / f"{name}.npz"
    require(not Path(root).is_file(), f"--data {root} is a file: name the folder that holds {path.name}, or will")
    if not path.exists():
        download_cifar(name, path)
    return read_npz(path)


def check_labels(where, y_train, y_test, names=None):
    """The class names, where both label tensors hold all classes 0..C-1; InputError otherwise."""
    for part, y in (("training", y_train), ("test", y_test)):
        require(len(y) > 0 and y.min() >= 0, f"{where}: the {part} labels are none or negative: classes are 0, 1, 2...")
        C = int(y_train.max()) + 1
        require(y.max() < C, f"{where}: {part} label {y.max()}, but the training labels end at {C - 1}: "
                "number the classes 0..C-1")
        gap = min({*range(len(y) + 1)} - {*y.tolist()})         # the first number that is no label
        require(gap == C, f"{where}: class {gap} has no {part} image: add one, or number the classes 0..C-1 without gaps")
    require(C > 1, f"{where}: there is one class alone: at least two are needed")
    names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name)
             for name in (range(C) if names is None else names)]
    require(len(names) == C, f"{where}: {len(names)} class_names for {C} classes: give one for each")
    return names


def read_npz(path, holdout=0):
    """An .npz file's arrays, checked, as a Dataset. Raises InputError."""
    require(path.exists(), f"{path} does not exist: give the path of an .npz file with --dataset")
    with path.open("rb") as file:                       # numpy takes most other files for a pickle
        require(file.read(2) == b"PK", f"{path} cannot be read, it is no .npz file: write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run any code
            arrays = {key: np.asarray(file[key]) for key in file.files}     # what is no array comes as bytes
    except Exception as error:  # numpy, zipfile and zlib each have their own for a broken file
        raise InputError(f"{path} cannot be read as plain arrays ({first_line(error)}): write it anew with numpy.savez, "
                         "class_names as strings") from None
    parts = ["train", "train" if holdout and not {"x_test", "y_test"} & set(arrays) else "test"]    # hold_out() will split it
    missing = {f"{kind}_{part}" for kind in "xy" for part in parts} - set(arrays)
    require(not missing, f"{path} lacks {', '.join(sorted(missing))}: it needs x_train, y_train, x_test and y_test, "
            "or --holdout 0.2 in place of the last two")
    data = []
    for part in parts:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        require(x.dtype == np.uint8 and (x.ndim == 3 or x.ndim == 4 and x.shape[3] == 3) and x.shape[1] * x.shape[2],
                f"{path}: x_{part} is {x.dtype} {list(x.shape)}: images are uint8 [N,H,W,3] or [N,H,W]")
        require(np.issubdtype(y.dtype, np.integer) and y.shape == x.shape[:1],
                f"{path}: y_{part} is {y.dtype} {list(y.shape)}: labels are integers, one for each of {len(x)} images")
        x = torch.from_numpy(x if x.ndim == 4 else np.stack([x] * 3, 3))               # [N,H,W,3]
        data += [x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64))]
    x_train, y_train, x_test, y_test = data
    names = np.atleast_1d(arrays["class_names"]) if "class_names" in arrays else None
    require(x_train.shape[1:] == x_test.shape[1:], f"{path}: training and test images differ in size: resize them to one")
    return Dataset(*data, check_labels(path, y_train, y_test, names))


def read_picture(file, size=None):
    """A picture of any kind, a path or a PIL image, as uint8 [3,h,w]: turned upright, what is transparent in
    white; the middle of it resized to size [h,w] where that is given. Raises what PIL raises."""
    picture = file.copy() if isinstance(file, Image.Image) else Image.open(file)
    picture.load()
    with contextlib.suppress(Exception):                # a damaged EXIF tag is no damaged picture
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode[0] in "IF":                         # perhaps 16 bits of grey, or floats in 0..1: PIL would cut them off
        deep = picture.mode.startswith("I;16") or picture.mode == "I" and "PPM" in (picture.format, getattr(file, "format", ""))
        picture = picture.convert("F" if picture.mode == "F" else "I")
        high = picture.getextrema()[1]
        scale = 1 / 256 if deep or high > 255 else 255 if picture.mode == "F" and high <= 1 else 1
        picture = picture.point(lambda v: v * scale).convert("L")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    picture = picture.convert("RGB")
    return TF.pil_to_tensor(ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR) if size else picture)


def why_unreadable(path):
    """What to say of a picture that read_picture() could not read."""
    return f"{path} is not a readable image" if os.path.isfile(path) else f"{path} is no file"


class ImageFiles(torch.utils.data.Dataset):
    """Image files of any kind as uint8 [3,h,w], the middle of each resized to size [h,w]. size None: as
    they are. Item i is (pixels, row); row is i, or, if file i cannot be read, that of the next readable
    file, whose pixels are returned instead; -1 where there is none: report() raises then, as a worker must not."""

    def __init__(self, paths, size=None):
        self.paths, self.size, self.unreadable = paths, size, set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        for row in (j % len(self) for j in range(i, i + len(self))):
            with contextlib.suppress(Exception):        # whatever PIL raises for a missing, broken or monstrous file
                return read_picture(self.paths[row], self.size), row
        return torch.zeros(3, *(self.size or (1, 1)), dtype=torch.uint8), -1    # of one size with the rest of its batch

    def report(self, asked, rows):
        """Name files that were asked for and not read, each once. Raises InputError for all, or several and over 1 %."""
        require((rows >= 0).all(), f"none of {len(self)} image files can be read, {self.paths[asked[0]]} for one: "
                "look at them, and whether that is where they are")
        new = {self.paths[i] for i in asked[asked != rows].tolist()} - self.unreadable
        self.unreadable |= new
        for path in sorted(new):
            print(f"warning: {why_unreadable(path)}: left out", file=sys.stderr)
        n = len(self.unreadable)
        require(n <= max(1, 0.01 * len(self)), f"{n} of {len(self)} image files cannot be read, more than 1 %: "
                "mend those named above, or take them out of the folder and of a list file")


def into_memory(files, y):
    """Small images of one size as a tensor and their labels; None for any others."""
    pixels, rows = [], []
    for i in range(len(files)):
        x, row = files[i]
        if row < 0:
            files.report(torch.tensor([i]), torch.tensor([row]))    # raises now: each of the others would try them all again
        if max(x.shape) > 64 or pixels and x.shape != pixels[0].shape:
            return None
        pixels.append(x)
        rows.append(row)
    asked, rows = torch.arange(len(files)), torch.tensor(rows)
    files.report(asked, rows)
    return torch.stack(pixels)[rows == asked], y[rows == asked]


def read_list(path, root):
    """The image paths and labels of a list file with lines "path label". Raises InputError."""
    path = path if path.exists() else root / path
    require(path.is_file(), f"{path} does not exist: --train-list and --test-list are looked for here, then in --data")
    rows = []
    for n, line in enumerate(path.read_text("utf-8-sig", "surrogateescape").splitlines(), 1):
        words = line.strip().rsplit(maxsplit=1)         # a path may hold spaces
        if words:
            require(len(words) == 2 and words[1].isdecimal() and len(words[1]) < 10,
                    f"{path}, line {n}: {line!r} is not a path and a class number")
            rows.append((str(root / words[0]), int(words[1])))
    return rows


def load_files(root, train_list, test_list, holdout):
    """Image files, from two lists or from a tree of class folders, as a Dataset. Raises InputError."""
    if train_list or test_list:
        lists = [train_list, train_list if holdout else test_list]      # hold_out() will make the test set
        rows, names = [read_list(Path(name), root) for name in lists], None
        require(not holdout or len(dict(rows[0])) == len(rows[0]),
                f"{train_list} names an image twice: --holdout could train on it and test on it: name each once")
        for name, part in zip(lists, rows):             # test images would be missed after an epoch, no sooner
            seen = [path for path, _ in part[::len(part) // 1000 + 1]]
            lost = [path for path in seen if not os.path.isfile(path)]
            # a sample can't tell the 1 % that report() allows from a little more
            require(len(lost) <= max(1, 0.1 * len(seen)), f"{name}: {len(lost)} of {len(seen)} images are no files, "
                    f"{min(lost, default='')} for one: --data is the folder in which its paths begin")
    else:
        held_out = root / "train" if holdout else next(filter(Path.is_dir, (root / "val", root / "test")), root / "val")
        trees = []
        for folder in (root / "train", held_out):
            require(folder.is_dir(), f"{folder} does not exist: --data is the folder that holds train/<class>/* "
                    "and val/<class>/* (or test); --holdout 0.2 makes a test set of the training images")
            try:
                trees.append(torchvision.datasets.ImageFolder(folder))
            except FileNotFoundError as error:          # no class folder, or an empty one
                raise InputError(f"{folder}: {first_line(error)}") from None
        train, test = trees
        alone = [sorted(set(a.classes) - set(b.classes)) for a, b in ((train, test), (test, train))]
        require(alone == [[], []], f"{root}: train and {held_out.name} need the same class folders, but train alone has "
                f"{alone[0][:3]}, {held_out.name} alone {alone[1][:3]}")
        rows, names = [train.samples, test.samples], train.classes
    files = [ImageFiles([path for path, _ in part]) for part in rows]
    labels = [torch.tensor([label for _, label in part], dtype=torch.int64) for part in rows]
    names = check_labels(root, *labels, names)
    train = into_memory(files[0], labels[0])
    test = train if rows[0] == rows[1] else train and into_memory(files[1], labels[1])
    if test and train[0].shape[1:] == test[0].shape[1:]:
        return Dataset(*train, *test, names)
    return Dataset(files[0], labels[0], files[1], labels[1], names)


def write_whole(path, content):
    """Write bytes under another name, flush and rename: path is the old file or the new one, never half of one."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({error.strerror}): make room or choose another folder; "
                         "what was there before is whole") from None


def download_cifar(name, path):
    """Download CIFAR-10 or -100 through torchvision and keep it as one .npz file."""
    kind = getattr(torchvision.datasets, name.upper())  # CIFAR10 or CIFAR100
    with tempfile.TemporaryDirectory() as folder:       # a broken download leaves nothing behind
        try:
            train, test = (kind(folder, train=flag, download=True) for flag in (True, False))
        except Exception as error:  # offline, a server's refusal, a checksum: torchvision raises all kinds
            raise InputError(f"{name} could not be downloaded ({error}): get online, or put {name}.npz "
                             f"(x_train, y_train, x_test, y_test) at {path}") from None
    content = io.BytesIO()
    np.savez(content, x_train=train.data, y_train=train.targets, x_test=test.data, y_test=test.targets,
             class_names=train.classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getbuffer())


# The built-in data. A class is an outline with a texture, c -> (c mod 5, c mod 4): twenty
# different pairs in which every outline and every texture belongs to head and tail classes
# alike. What a tail class looks like can be learnt from the head, as [D] claims of real data.

OUTLINES, TEXTURES = ("disc", "square", "triangle", "cross", "ring"), ("plain", "striped", "checked", "target")


def paint_shape(canvas, outline, texture, colours, centre, scale, angle):
    """One shape onto each image: canvas [B,3,S,S] and colours [B,2,3] in 0..1, outline and texture
    [B] numbers, centre [B,2] and scale [B] in halves of the image, angle [B] in radians."""
    S, pick = canvas.shape[-1], torch.arange(len(canvas))
    grid = (torch.arange(S, dtype=torch.float64) + 0.5) * 2 / S - 1         # [S]
    centre, scale, angle = centre[..., None, None], scale[:, None, None], angle[:, None, None]
    x, y = (grid - centre[:, 0]) / scale, (grid[:, None] - centre[:, 1]) / scale
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x  # [B,S,S] the shape's own axes
    r, ax, ay = (x * x + y * y).sqrt(), x.abs(), y.abs()
    distance = torch.stack([                            # to the outline, negative inside; in OUTLINES' order
        r - 0.9,
        torch.maximum(ax, ay) - 0.8,
        torch.maximum(0.87 * ax + 0.5 * y, -y) - 0.55,
        torch.maximum(torch.minimum(ax, ay) - 0.3, torch.maximum(ax, ay) - 0.95),
        (r - 0.65).abs() - 0.28,
    ])[outline, pick]                                   # [B,S,S]
    second = torch.stack([                              # where the second colour goes; in TEXTURES' order
        r < 0,
        (10 * x).sin() > 0,
        (8 * x).sin() * (8 * y).sin() > 0,
        (13 * r).sin() > 0,
    ])[texture, pick]                                   # [B,S,S]
    colour = torch.where(second[:, None], colours[:, 1, :, None, None], colours[:, 0, :, None, None])  # [B,3,S,S]
    inside = (0.5 - distance * scale * S / 2).clamp(0, 1)[:, None]          # [B,1,S,S] soft at the edge
    return canvas + (colour - canvas) * inside


def draw_shapes(n_train=300, n_test=50, seed=0):
    """The built-in data set: 20 classes, n_train and n_test images each, 32 x 32. The same
    pixels everywhere: numpy's legacy stream never changes, and in float64 rounding is too small to change a pixel."""
    rng = np.random.RandomState(seed)

    def draw(labels):                                   # [B] -> uint8 [B,3,32,32]
        B = len(labels)

        def uniform(low, high, *shape):
            return torch.from_numpy(rng.uniform(low, high, (B, *shape)))

        background = uniform(0, 1, 3)                   # [B,3]
        canvas = background[:, :, None, None].expand(B, 3, 32, 32)
        clutter = (torch.from_numpy(rng.randint(len(kind), size=B)) for kind in (OUTLINES, TEXTURES))
        canvas = paint_shape(canvas, *clutter, uniform(0, 1, 2, 3), uniform(-1, 1, 2),
                             uniform(0.15, 0.35), uniform(0, 2 * math.pi))
        contrast = torch.tensor([[1 / 3], [2 / 3]], dtype=torch.float64)    # away from the background
        colours = (background[:, None] + contrast + uniform(-0.15, 0.15, 2, 3)) % 1
        canvas = paint_shape(canvas, labels % 5, labels % 4, colours, uniform(-0.08, 0.08, 2),
                             uniform(0.65, 0.85), uniform(-0.2, 0.2))
        noisy = canvas + uniform(-0.05, 0.05, 3, 32, 32)
        return (noisy * 255).round().clamp(0, 255).to(torch.uint8)

    y_train, y_test = (torch.arange(20).repeat_interleave(n) for n in (n_train, n_test))
    x_train, x_test = (torch.cat([draw(part) for part in y.split(500)]) for y in (y_train, y_test))
    names = [f"{TEXTURES[c % 4]} {OUTLINES[c % 5]}" for c in range(20)]
    return Dataset(x_train, y_train, x_test, y_test, names)


def fingerprint(x, y):
    """A number that tells training images x and labels y [N] from others; of image files their names count."""
    names = "/".join(Path(path).name for path in x.paths) if isinstance(x, ImageFiles) else ""
    return zlib.crc32(y.numpy(), zlib.crc32(names.encode(errors="surrogateescape") if names else x.contiguous().numpy()))


def pick_device(name):
    """A torch.device that works here. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.empty(0, device=name)
        probe.cpu()                                     # tensors of the meta device have no values
        return probe.device
    except Exception as error:  # torch raises all kinds
        raise InputError(f"--device {name} does not work here ({first_line(error):.100}): try --device cpu") from None


def layout(device):
    """channels_last is a fifth faster; on MPS BatchNorm's backward goes wrong with it (pytorch issue 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def pick_amp(name, device):
    """The dtype of --amp on this device; None is float32."""
    if name == "auto":
        name = ("off" if device.type != "cuda" else
                "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def synchronised(net, device):
    """The network with BatchNorm's statistics of all processes. Raises InputError where there is no CUDA."""
    require(device.type == "cuda", "--batchnorm sync works on CUDA alone: take --batchnorm local")
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for m in batchnorms(net):                           # it insists on a counter: on the host, outside the state
        del m.num_batches_tracked
        m.num_batches_tracked = torch.zeros(())
    return net


def distributed(trainer):
    """The trainer's losses() as DistributedDataParallel, which means the gradients of all processes, takes them: as the
    forward of a module."""
    branches = nn.Module()
    branches.net, branches.forward = trainer.net, trainer.losses
    two_stage = trainer.config.curriculum == "two-stage"        # each stage leaves weights without a gradient
    wrapped = nn.parallel.DistributedDataParallel(branches, find_unused_parameters=two_stage)
    wrapped.broadcast_buffers = False                   # agree() does, once an epoch; as an argument it is deprecated
    return wrapped


def gather(t, dim=0):
    """t of all processes, one after the other along dim; t itself where there is one alone.

    Every process computes the same loss over all rows, but its gradient flows into its own rows alone.
    DistributedDataParallel then takes the mean of these gradients where their sum is wanted, so each
    is multiplied by the number of processes here."""
    if not dist.is_initialized():
        return t
    t = t.contiguous()
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.detach())
    parts[dist.get_rank()] = t + (len(parts) - 1) * (t - t.detach())    # t's value, its gradient times the processes
    return torch.cat(parts, dim)


@contextlib.contextmanager
def signals_blocked():
    """SIGINT and SIGTERM wait for the end; processes forked within begin with them blocked."""
    if not hasattr(signal, "pthread_sigmask"):          # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_trainer(_, seconds=30):
    """A signal to the whole group reaches a loader's workers too, but they must live until the trainer has finished its
    step. So SIGINT is ignored, and SIGTERM, which multiprocessing sends at exit as well, ends a worker seconds later."""
    last = threading.Timer(seconds, os._exit, [0])
    last.daemon = True                                  # the worker doesn't wait for it at exit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: last.is_alive() or last.start())
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # its start was in signals_blocked()


def read_checkpoint(run):
    """The state in a run's folder, or in a .pt file, on the CPU. Raises InputError."""
    path = Path(run) / "last.pt" if Path(run).is_dir() else Path(run)
    require(path.is_file(), f"{path} does not exist: give the folder of a run, or its last.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)         # nothing in it is executed
        known = state.keys() >= {"config", "fingerprint", "stored", "class_names", "counts", "epoch", "history", "evaluated",
                                 "ranks"}
    except PermissionError:
        raise
    except Exception:  # torch, zipfile and pickle each have their own for a broken file
        known = False
    require(known, f"{path} is damaged, or no checkpoint of this program: give the last.pt of a run")
    return state


def load(run, device="auto"):
    """The trained network of a run (its folder or a .pt file), in eval mode, on any device.

    net(x) takes float images [B,3,H,W] in 0..1 and gives logits [B,C]; net.preprocess(path) makes such an
    image of a picture file; net.class_names and net.counts: the C classes' names and training images. Raises InputError.
    """
    state = read_checkpoint(run)
    try:
        c = state["config"]
        net = Hybrid(c["net"], len(state["counts"]), torch.zeros(3), torch.ones(3), c["experts"], c["logits"] == "cosine",
                     c["dim"], c["hidden"])
        net.load_state_dict(state["averaged"] or state["net"])
        net.class_names, net.counts, net.stored, net.size = (state[key] for key in ("class_names", "counts", "stored", "size"))
    except Exception as error:  # another version's
        raise InputError(f"{run}: its weights don't fit this program ({first_line(error)})") from None
    return net.to(pick_device(device)).eval()
