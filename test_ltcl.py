"""Tests: python -m pytest -q.  Benchmark: python test_ltcl.py"""

import csv
import dataclasses
import errno
import functools
import gc
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import time
import weakref
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltcl
import train

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True, scope="session")
def shapes_are_drawn_once():
    """It takes seconds."""
    draw = ltcl.draw_shapes
    ltcl.draw_shapes = functools.cache(draw)
    yield
    ltcl.draw_shapes = draw


STARTED = []


def start(*args, **how):
    STARTED.append(subprocess.Popen(*args, **how))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """Also where a test fails, its processes end with it."""
    yield
    while STARTED:
        if (run := STARTED.pop()).poll() is None:
            run.kill()
            run.wait()


def unit(*shape, seed=0, dtype=torch.float64):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=-1).to(dtype)


# --- losses: oracles, as the papers write them ---------------------------------------------

def naive_sc(z, y, tau):
    terms = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        positives = [j for j in others if y[j] == y[i]]
        below = sum((torch.exp(z[i] @ z[k] / tau) for k in others), torch.zeros(()).double())
        if positives:
            terms.append(-sum(torch.log(torch.exp(z[i] @ z[j] / tau) / below) for j in positives) / len(positives))
    return sum(terms) / len(terms) if terms else 0 * z.sum()


def naive_psc(z, y, prototypes, tau):
    p = [p / p.norm() for p in prototypes]
    terms = [-torch.log(torch.exp(z[i] @ p[y[i]] / tau)
                        / sum(torch.exp(z[i] @ p[c] / tau) for c in range(len(p)) if c != y[i])) for i in range(len(z))]
    return sum(terms) / len(terms)


def naive_dscl(q, k, y, queue, queue_y, alpha, tau):
    terms = []
    for i in range(len(q)):
        memory = [(row[j], y[j]) for j in range(len(q)) if j != i for row in (q, k)]
        memory += [(row, label) for row, label in zip(queue, queue_y) if label != -1]
        below = sum(torch.exp(q[i] @ row / tau) for row, _ in memory + [(k[i], y[i])])
        positives = [row for row, label in memory if label == y[i]]
        P = len(positives)
        weighted = [(1.0 if P == 0 else alpha * (P + 1), k[i])] + [((1 - alpha) * (P + 1) / P, row) for row in positives]
        terms.append(-sum(torch.log(torch.exp(w * (row @ q[i]) / tau) / below) for w, row in weighted) / (P + 1))
    return sum(terms) / len(terms)


def naive_pbsd(c, s, candidates, tau):
    total = 0
    for i in range(len(c)):
        for j in range(c.shape[1]):
            p, q = (torch.stack([torch.exp(v[i, j] @ z / tau) for z in zs]) for v, zs in ((c, candidates.detach()), (s, candidates)))
            total = total - sum(p[t] / p.sum() * torch.log(q[t] / q.sum()) for t in range(len(candidates))) / c.shape[1]
    return total / len(c)


def textbook_sc(z, y, tau=0.1):
    """With matrices, as it is usually written; also what the benchmark compares with."""
    s = z @ z.T / tau
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z))
    positive = (y[:, None] == y).float() * others
    log_p = s - (s.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def textbook_dscl(q, k, y, queue, queue_y, alpha=0.1, tau=0.1):
    N = len(q)
    s = q @ torch.cat([k, q, queue]).T / tau
    s = s - s.max(1, keepdim=True).values.detach()
    other = torch.ones_like(s)
    other[torch.arange(N), N + torch.arange(N)] = 0
    augmentation = torch.zeros_like(s)
    augmentation[torch.arange(N), torch.arange(N)] = 1
    positive = (y[:, None] == torch.cat([y, y, queue_y])).float() * other * (1 - augmentation)
    P = positive.sum(1, keepdim=True)
    weight = augmentation * alpha * (P + 1) + positive * (1 - alpha) * (P + 1) / P
    log_p = s - (s.exp() * other).sum(1, keepdim=True).log()
    return -((weight * log_p).sum(1) / (P[:, 0] + 1)).mean()


LABELS = [[0, 0, 1, 1, 2, 0], [0, 1, 2, 3, 4, 5], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 1], [7, 7, 2, 2, 7, 2]]


def same_value_and_gradient(ours, oracle, inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    a, b = ours(*inputs), oracle(*inputs)
    assert a.dtype == torch.float64 and a.shape == ()
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for g, h in zip(*(torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in (a, b))):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_losses_against_double_loops(labels, tau):
    y = torch.tensor(labels)
    q, k, p = unit(6, 5), unit(6, 5, seed=1), 3 * unit(9, 5, seed=2)
    same_value_and_gradient(lambda z: ltcl.sc_loss(z, y, tau), lambda z: naive_sc(z, y, tau), [q])
    same_value_and_gradient(lambda z, p: ltcl.psc_loss(z, y, p, tau), lambda z, p: naive_psc(z, y, p, tau), [q, p])
    for queue, queue_y in ((unit(0, 5), []), (unit(7, 5, seed=3), [0, -1, 1, 3, -1, 7, 0])):
        for alpha in (0.0, 0.1, 1.0):
            same_value_and_gradient(
                lambda q, k, m: ltcl.dscl_loss(q, k, y, m, torch.tensor(queue_y).long(), alpha, tau),
                lambda q, k, m: naive_dscl(q, k, y, m, queue_y, alpha, tau), [q, k, queue])


def test_losses_against_the_textbook():
    q, k, m, y = unit(600, 16), unit(600, 16, seed=1), unit(9000, 16, seed=2), torch.arange(600) % 10    # more than a block of each
    torch.testing.assert_close(ltcl.sc_loss(q, y), textbook_sc(q, y), check_dtype=False)
    queue_y = torch.arange(9000) % 13
    torch.testing.assert_close(ltcl.dscl_loss(q, k, y, m, queue_y), textbook_dscl(q, k, y, m, queue_y), check_dtype=False)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_pbsd_against_double_loops(tau):
    c, s, z = unit(3, 2, 5), unit(3, 2, 5, seed=1), unit(6, 5, seed=2)
    same_value_and_gradient(lambda s, z: ltcl.pbsd_loss(c, s, z, tau), lambda s, z: naive_pbsd(c, s, z, tau), [s, z])
    valid = torch.tensor([1, 0, 1, 1, 0, 1]) > 0
    same_value_and_gradient(lambda s: ltcl.pbsd_loss(c, s, z, tau, valid), lambda s: naive_pbsd(c, s, z[valid], tau), [s])
    c, s = c.requires_grad_(), s.requires_grad_()
    ltcl.pbsd_loss(c, s, z, tau).backward()
    assert c.grad is None and s.grad.abs().sum() > 0


def test_pbsd_is_least_where_the_student_is_the_teacher():
    c, z = unit(3, 2, 5), unit(6, 5, seed=2)
    student = c.clone().requires_grad_()
    loss = ltcl.pbsd_loss(c, student, z)
    loss.backward()
    assert student.grad.abs().max() < 1e-12
    assert all(ltcl.pbsd_loss(c, unit(3, 2, 5, seed=i), z) > loss for i in range(1, 9))


def test_dscl_without_queue_equals_an_empty_one():
    q, k, y = unit(6, 5), unit(6, 5, seed=1), torch.tensor(LABELS[0])
    assert ltcl.dscl_loss(q, k, y) == ltcl.dscl_loss(q, k, y, unit(4, 5, seed=2), torch.full((4,), -1))


def test_dscl_with_the_share_of_sc_is_sc():
    y = torch.arange(4).repeat(3)                       # three images a class, so |P_i| = 4 and alpha = 1/5
    q, k = unit(12, 8), unit(12, 8, seed=1)
    both = (ltcl.dscl_loss(q, k, y, alpha=1 / 5) + ltcl.dscl_loss(k, q, y, alpha=1 / 5)) / 2
    torch.testing.assert_close(both, ltcl.sc_loss(torch.cat([q, k]), torch.cat([y, y])), rtol=1e-12, atol=0)


def test_dscl_draws_the_augmentation_with_probability_alpha():
    """[D]: at convergence p(z_i+ | z_i) = alpha in every class; in SC it falls with the class's size."""
    y = torch.tensor([0] * 2 + [1] * 4 + [2] * 8)

    def share(loss):                                    # p(z_i+ | z_i), the mean of each class
        q, k = (torch.randn(14, 32, generator=torch.Generator().manual_seed(s)).double().requires_grad_() for s in (0, 1))
        optimizer = torch.optim.Adam([q, k], 0.02)
        for _ in range(500):
            optimizer.zero_grad()
            loss(F.normalize(q, dim=1), F.normalize(k, dim=1)).backward()
            optimizer.step()
        q, k = F.normalize(q, dim=1).detach(), F.normalize(k, dim=1).detach()
        s = (q @ torch.cat([k, q]).T / 0.1).masked_fill(torch.eye(14).repeat(1, 2).bool() & (torch.arange(28) >= 14), -math.inf)
        p = s.softmax(1).diagonal()
        return torch.stack([p[y == c].mean() for c in range(3)])

    torch.testing.assert_close(share(lambda q, k: ltcl.dscl_loss(q, k, y, alpha=0.3)), torch.full((3,), 0.3).double(),
                               rtol=0.02, atol=0)
    sc = share(lambda q, k: ltcl.sc_loss(torch.cat([q, k]), torch.cat([y, y])))
    torch.testing.assert_close(sc, torch.tensor([1 / 3, 1 / 7, 1 / 15]).double(), rtol=0.05, atol=0)


def test_embedding_statistics():
    z, y = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), torch.tensor([0, 0, 1, 2])
    sixty = torch.tensor([[1, 0], [1, 0], [0.5, 0.75 ** 0.5], [0.5, 0.75 ** 0.5]])      # degrees apart
    for q, expected in ((z, dict(cos_positive=1 / 3, cos_negative=-0.2, spread=1)),     # 4 - 2 of 6 pairs, -2 of 10
                        (z[:1].expand(4, 2), dict(cos_positive=1, cos_negative=1, spread=0)),
                        (sixty, dict(cos_positive=1, cos_negative=0.6, spread=0.5))):
        assert {name: v.item() for name, v in ltcl.embedding_statistics(q, q, y).items()} == pytest.approx(expected)


def all_losses(z, y, tau, k=None):
    p = torch.eye(8, z.shape[1], dtype=z.dtype) + 0.1
    return [ltcl.sc_loss(z, y, tau), ltcl.psc_loss(z, y, p, tau), ltcl.dscl_loss(z, z if k is None else k, y, tau=tau),
            ltcl.dscl_loss(z, z, y, z, y.roll(1), tau=tau), ltcl.pbsd_loss(z[:, None].flip(0), z[:, None], z, tau)]


@pytest.mark.skipif(not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
                    reason="torch.compile needs a C++ compiler and Python's headers")
def test_a_compiled_loss_has_the_same_gradient():       # a sum over blocks along the first dimension had not
    q, k, queue = (unit(n, 16, seed=n).requires_grad_() for n in (24, 25, 64))
    y, queue_y = torch.arange(24) % 5, torch.arange(64) % 6 - 1
    a, b = (torch.autograd.grad(loss(q, k[:24], y, queue, queue_y, tau=0.5), (q, k, queue))
            for loss in (ltcl.dscl_loss, torch.compile(ltcl.dscl_loss)))
    for one, other in zip(a, b):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("labels", [*LABELS, [0], [0, 1], [5, 5]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_finite(labels, dtype):
    for tau in (0.01, 0.07, 1.0):
        for i in range(5):
            z = unit(len(labels), 8, dtype=dtype).requires_grad_()
            loss = all_losses(z, torch.tensor(labels), tau)[i]
            loss.backward()
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.isfinite() and z.grad.isfinite().all()


def test_sc_without_positives_is_zero_with_zero_gradient():
    z = unit(4, 8).requires_grad_()
    loss = ltcl.sc_loss(z, torch.arange(4))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_losses_on_anything(seed):
    """Sizes, label patterns, temperatures and types at random: finite, the same in any order, pulled by what it should be."""
    rng = np.random.RandomState(seed)
    N, D, C, K, L = rng.randint(1, 40), rng.randint(2, 33), rng.randint(2, 12), rng.randint(1, 50), rng.randint(1, 4)
    dtype = [torch.float16, torch.bfloat16, torch.float32, torch.float64][rng.randint(4)]
    tau, alpha = float(10 ** rng.uniform(-2, 1)), float(rng.uniform(0, 1))
    y = torch.from_numpy(rng.choice([rng.randint(C), C], N) if rng.rand() < 0.2 else rng.randint(C, size=N)).clamp(max=C - 1)
    queue_y = torch.from_numpy(rng.randint(-1, C, K))
    z, k, s, m, p = (unit(*shape, D, seed=seed + i, dtype=dtype).requires_grad_()
                     for i, shape in enumerate([(N,), (N,), (N, L), (K,), (C,)]))
    if rng.rand() < 0.3:
        k = z.detach().clone().requires_grad_()         # both views the same point
    losses = [lambda o: ltcl.sc_loss(z[o], y[o], tau), lambda o: ltcl.psc_loss(z[o], y[o], p, tau),
              lambda o: ltcl.dscl_loss(z[o], k[o], y[o], m, queue_y, alpha, tau), lambda o: ltcl.dscl_loss(z[o], k[o], y[o], None, None, alpha, tau),
              lambda o: ltcl.pbsd_loss(k[o, None].expand(-1, L, -1), s[o], m, tau)]
    for loss in losses:
        value, again = loss(torch.arange(N)), loss(torch.from_numpy(rng.permutation(N)))
        gradients = torch.autograd.grad(value, [z, k, s, m, p], allow_unused=True)
        assert value.isfinite() and value.dtype == torch.promote_types(dtype, torch.float32)
        assert all(g is None or g.isfinite().all() for g in gradients)
        torch.testing.assert_close(value, again, rtol=1e-4, atol=1e-4)


def test_psc_of_one_prototype_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        ltcl.psc_loss(unit(2, 4), torch.zeros(2).long(), unit(1, 4))


def test_dscl_takes_queue_and_labels_together():
    with pytest.raises(ValueError, match="together"):
        ltcl.dscl_loss(unit(2, 4), unit(2, 4), torch.arange(2), unit(3, 4))


def test_permuting_the_batch_changes_nothing():
    y, order = torch.tensor([0, 0, 1, 2, 1, 0, 3, 4]), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    z, k = unit(8, 8), unit(8, 8, seed=1)
    for a, b in zip(all_losses(z, y, 0.1, k)[:3], all_losses(z[order], y[order], 0.1, k[order])[:3]):
        torch.testing.assert_close(a, b)


def test_losses_leave_autocast():
    z, y = unit(6, 8, dtype=torch.float32), torch.tensor(LABELS[0])
    outside = all_losses(z, y, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert all_losses(z, y, 0.1) == outside


@pytest.mark.parametrize("loss", [ltcl.sc_loss, ltcl.psc_loss, ltcl.dscl_loss, ltcl.pbsd_loss])
def test_a_loss_works_pasted_alone(loss):
    space = {}
    exec("import torch\nimport torch.nn.functional as F\n" + inspect.getsource(loss), space)
    z, y = unit(*(6, 1, 8) if loss is ltcl.pbsd_loss else (6, 8)), torch.tensor(LABELS[0])
    more = {"sc_loss": (y,), "psc_loss": (y, unit(3, 8)), "dscl_loss": (unit(6, 8, seed=1), y, unit(2, 8), y[:2]),
            "pbsd_loss": (unit(6, 1, 8, seed=1), unit(9, 8, seed=2), 0.1, torch.arange(9) < 7)}
    args = more[loss.__name__]
    assert space[loss.__name__](z, *args) == loss(z, *args)


# --- data and views ------------------------------------------------------------------------

@pytest.mark.parametrize("n_max, C, totals", [(5000, 10, (12406, 13996, 20431)), (500, 100, (10847, 12608, 19573))])
def test_long_tail_totals(n_max, C, totals):
    for imb, total in zip((100, 50, 10), totals):
        counts = ltcl.long_tail_counts(n_max, C, imb)
        assert sum(counts) == total and counts[0] == n_max and counts[-1] == n_max // imb
    assert ltcl.long_tail_counts(n_max, C, 1) == [n_max] * C
    assert ltcl.long_tail_counts(49, 2, 49) == [49, 1]  # 49 / 49 is below 1 in floats
    with pytest.raises(ltcl.InputError, match="imb is 0.5"):
        ltcl.long_tail_counts(n_max, C, 0.5)


def test_shot_groups_of_cifar():
    for n_max, C, sizes in ((500, 100, [35, 35, 30]), (5000, 10, [8, 2, 0])):
        groups = ltcl.shot_groups(torch.tensor(ltcl.long_tail_counts(n_max, C, 100)))
        assert [int(g.sum()) for g in groups.values()] == sizes
    assert [int(g.sum()) for g in ltcl.shot_groups(torch.tensor([101, 100, 20, 19])).values()] == [1, 2, 1]


def test_long_tail_indices_follow_the_protocol():
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(10), 60))
    np.random.seed(0)                                   # the protocol as the field's code has it, on the global stream
    expected = []
    for c in range(10):
        rows = np.where(labels == c)[0]
        np.random.shuffle(rows)
        expected.extend(rows[:int(60 * (1 / 20) ** (c / 9))])
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    rows = ltcl.long_tail_indices(labels, 20)
    assert rows.dtype == np.int64 and rows.tolist() == expected
    assert (np.random.get_state()[1] == state).all()    # and the global stream is left alone
    assert sorted(ltcl.long_tail_indices(labels, 1)) == list(range(600))


def test_class_balanced_rows():
    y = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    rows = ltcl.class_balanced_rows(y, torch.bincount(y), 30000, torch.Generator().manual_seed(0))
    assert ((torch.bincount(y[rows]) - 10000).abs() < 300).all()        # 300 is 3.7 standard deviations
    assert ((torch.bincount(rows[y[rows] == 2])[990:] - 1000).abs() < 130).all()
    counts = torch.full((8142,), 20)                    # as many classes as iNaturalist's, some of them large and the last
    counts[-50:] = 850
    y = torch.arange(8142).repeat_interleave(counts)
    rows = ltcl.class_balanced_rows(y, counts, 8142 * 100, torch.Generator().manual_seed(0))
    per_class = torch.bincount(y[rows], minlength=8142) / 100
    for part in (per_class[:-50], per_class[-50:-25], per_class[-25:]):
        assert abs(part.mean() - 1) < 0.08              # 4 standard deviations of 25 classes


def test_shapes_are_the_same_pixels_everywhere():
    for data, n, pixels in ((ltcl.draw_shapes(n_train=20, n_test=5), 400, [3215430779, 228258810]),
                            (ltcl.draw_shapes(), 6000, [2983394186, 3429623754])):              # as it is used: in several parts
        assert data.x_train.shape == (n, 3, 32, 32) and data.x_train.dtype == torch.uint8
        assert [zlib.crc32(x.numpy().tobytes()) for x in (data.x_train, data.x_test)] == pixels
        assert len(set(data.class_names)) == 20


def test_views_are_drawn_for_each_image():
    x = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).expand(256, -1, -1, -1)
    rng = torch.Generator().manual_seed(0)
    one, two = ltcl.crop_view(x, rng), ltcl.crop_view(x, rng)
    assert one.shape == x.shape and 0 <= one.min() and one.max() <= 1
    assert len({zlib.crc32(v.numpy().tobytes()) for v in one}) > 120    # 9*9*2 views of an image, a fifth of them grey
    assert sum(bool((a == b).all()) for a, b in zip(one, two)) < 10     # the two views are independent
    grey = (one[:, 0] == one[:, 1]).all(2).all(1).float().mean()
    assert 0.1 < grey < 0.3
    flipped = ltcl.random_flip(x, rng)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert 90 < mirrored.sum() < 166 and (mirrored | (flipped == x).flatten(1).all(1)).all()


@pytest.mark.parametrize("H, W", [(28, 28), (32, 32), (64, 64), (64, 16), (24, 64)])
def test_a_crop_is_a_window_of_the_padded_image(H, W):
    x = torch.randint(1, 256, (40, 3, H, W), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crops, h, w, shifts = ltcl.random_crop(x, torch.Generator().manual_seed(0)), H // 8, W // 8, set()
    padded = F.pad(x, [w, w, h, h])
    for image, crop in zip(padded, crops):
        found = [(i, j) for i in range(2 * h + 1) for j in range(2 * w + 1)
                 if (image[:, i:i + H, j:j + W] == crop).all()]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 20 and all({*side} >= {0, 2 * pad} for side, pad in zip(zip(*shifts), (h, w)))


def test_boxes_keep_their_scale_ratio_and_image():
    rng = torch.Generator().manual_seed(0)
    x1, y1, x2, y2 = ltcl.random_boxes(500, 4, 24, 32, rng, scale=(0.1, 0.3)).unbind(2)
    w, h = x2 - x1, y2 - y1
    assert x1.min() >= 0 and y1.min() >= 0 and x2.max() <= 32.0001 and y2.max() <= 24.0001
    area, ratio = w * h / (24 * 32), w / h
    assert 0.1 < area.min() < 0.11 and 0.29 < area.max() < 0.3001 and 0.749 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.331
    assert len({round(v, 3) for v in x1.flatten().tolist()}) > 1000     # drawn for every image and patch
    assert torch.stack([x1, y1]).flatten(1).corrcoef()[0, 1].abs() < 0.1 and ratio.log().mean().abs() < 0.01
    x1, y1, x2, y2 = ltcl.random_boxes(500, 1, 24, 32, rng, scale=(0.9, 1)).unbind(2)      # sides are cut to the image's
    assert x1.min() >= 0 and y1.min() >= 0 and x2.max() <= 32.0001 and y2.max() <= 24.0001
    x1, y1, x2, y2 = ltcl.random_boxes(500, 4, 32, 32, rng, scale=(0.1, 0.3), side_scale=True).unbind(2)
    assert 3.19 < (x2 - x1).min() < 3.4 and 9.4 < (x2 - x1).max() < 9.61
    assert (y2 - y1).min() < 2.8 and (y2 - y1).max() > 11


def test_teacher_and_student_look_at_the_same_place():
    """A bright square in a dark image lights the features pooled from the box around it and no others."""
    x = torch.zeros(2, 3, 32, 32)
    x[0, :, 8:16, 12:20] = 1
    x[1, :, 20:28, 0:8] = 1
    boxes = torch.tensor([[[12, 8, 20, 16], [20, 8, 28, 16], [12, 16, 20, 24], [0, 20, 8, 28]]] * 2).float()
    expected = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).float()
    pixels = ltcl.cut(x, boxes, 16)
    assert (pixels[:, :, 1:-1, 1:-1] == expected.view(8, 1, 1, 1)).all()    # the rim is interpolated with its neighbours
    pooled = ltcl.cut(x, boxes, 2).mean((2, 3))                             # an identity feature map: exact
    torch.testing.assert_close(pooled, expected[:, None].expand(8, 3), rtol=0, atol=0)
    cells = F.avg_pool2d(x, 4)                                              # a feature map of stride 4
    torch.testing.assert_close(ltcl.cut(cells, boxes, 2, cells=1 / 4).mean((2, 3)), expected[:, None].expand(8, 3))
    whole, noise = torch.tensor([[[0, 0, 32, 32.0]]] * 2), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ltcl.cut(x, whole, 32), x)
    torch.testing.assert_close(ltcl.cut(noise, whole, 4), F.avg_pool2d(noise, 8))       # all pixels count


def test_colours():
    tv, x = torchvision.transforms.functional, torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(ltcl.random_grayscale(x, rng, p=1), tv.rgb_to_grayscale(x, 3), rtol=0, atol=1e-3)
    grey = (ltcl.random_grayscale(x.repeat(10, 1, 1, 1), rng) != x.repeat(10, 1, 1, 1)).flatten(1).any(1)
    assert 90 < grey.sum() < 166
    assert (ltcl.random_jitter(x, rng, p=0, grey=0) - x).abs().max() < 1e-6
    torch.testing.assert_close(ltcl.random_jitter(x, rng, p=0, grey=1), tv.rgb_to_grayscale(x, 3), rtol=0, atol=1e-3)
    jittered = ltcl.random_jitter(x.repeat(10, 1, 1, 1), rng)
    assert 90 < (jittered.std(1).amax((1, 2)) < 1e-5).sum() < 166
    for i, adjust in enumerate(("brightness", "contrast", "saturation")):   # torchvision's, its factor found by search
        jitter = [0.0] * 4
        jitter[i] = 0.2
        ours = ltcl.random_jitter(x[:4], rng, jitter, p=1, grey=0)
        for image, out in zip(x, ours):
            theirs = [getattr(tv, f"adjust_{adjust}")(image, f) for f in torch.linspace(0.8, 1.2, 401)]
            assert min((t - out).abs().max() for t in theirs) < 2e-3
    b, c, s = torch.full((3, 1, 1, 1), 0.2)             # all at once are one after the other
    all_three = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x[:1], 1.2), 1.2), 1.2)
    torch.testing.assert_close(ltcl.recolour(x[:1], b, c, s, 0 * s), all_three, rtol=0, atol=1e-3)
    flat = torch.full((2000, 3, 2, 2), 0.5)
    bright = ltcl.random_jitter(flat, rng, (0.4, 0, 0, 0), p=1, grey=0) / flat
    assert 0.5999 < bright.min() < 0.61 and 1.39 < bright.max() < 1.4001
    assert 0.75 < (ltcl.random_jitter(flat, rng, grey=0) != flat).flatten(1).any(1).float().mean() < 0.85
    assert inspect.signature(ltcl.random_jitter).parameters["jitter"].default == (0.4, 0.4, 0.4, 0.1)
    flat[:, 0] = 0.7
    both = ltcl.random_jitter(flat, rng, (0.4, 0, 0, 0), p=0.5, grey=0.5)
    changed = (tv.rgb_to_grayscale(both) - tv.rgb_to_grayscale(flat)).abs().amax((1, 2, 3)) > 1e-4
    assert torch.stack([changed, both.std(1).amax((1, 2)) < 1e-5]).float().corrcoef()[0, 1].abs() < 0.1     # drawn apart
    hues = ltcl.random_jitter(flat, rng, (0, 0, 0, 0.1), p=1, grey=0)
    cosine = F.cosine_similarity(hues - hues.mean(1, keepdim=True), flat - flat.mean(1, keepdim=True))
    assert 0.8089 < cosine.min() < 0.811                # a tenth of a turn either way
    turned = ltcl.random_jitter(x, rng, (0, 0, 0, 0.1), p=1, grey=0)
    torch.testing.assert_close(turned.mean(1), x.mean(1), rtol=0, atol=0.02)
    assert (turned - x).abs().amax((1, 2, 3)).gt(0.01).float().mean() > 0.9


def test_strong_changes():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(1100, -1, -1, -1).contiguous()
    changed = ltcl.random_change(x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape and 0 <= changed.min() and changed.max() <= 1
    same = (changed - x).abs().amax((1, 2, 3)) < 1e-4
    assert 60 < same.sum() < 160                        # one of eleven kinds is none
    assert len({zlib.crc32(v.numpy().tobytes()) for v in changed[~same]}) > 0.95 * (~same).sum()
    wide = torch.rand(200, 3, 16, 48, generator=torch.Generator().manual_seed(0))
    changed, g = ltcl.random_change(wide, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(2)
    kind, strength = torch.randint(11, (200, 1, 1), generator=g), 2 * torch.rand(200, 1, 1, generator=g) - 1
    for i in (kind == 0).nonzero()[:, 0].tolist():      # a turn doesn't stretch what is not square
        turned = torchvision.transforms.functional.rotate(wide[i], 30 * strength[i].item(), torchvision.transforms.InterpolationMode.BILINEAR)
        torch.testing.assert_close(changed[i], turned, rtol=0, atol=1e-4)
    for i in (kind == 3).nonzero()[:, 0].tolist():      # a shift is by up to 0.3 of the side
        assert (changed[i, :, 8] == 0).all(0).sum().item() == pytest.approx(0.3 * 48 * abs(strength[i].item()), abs=1.01)
    for n, adjust in ((5, "brightness"), (6, "contrast"), (7, "saturation")):
        for i in (kind == n).nonzero()[:, 0].tolist():
            theirs = getattr(torchvision.transforms.functional, f"adjust_{adjust}")(wide[i], 1 + 0.9 * strength[i].item())
            torch.testing.assert_close(changed[i], theirs, rtol=0, atol=2e-3)
    for i in (kind == 4).nonzero()[:, 0].tolist():
        assert (changed[i, :, :, 24] == 0).all(0).sum().item() == pytest.approx(0.3 * 16 * abs(strength[i].item()), abs=1.01)
    for i in ((kind == 1) | (kind == 2)).nonzero()[:, 0].tolist():      # a shear along x or y
        angles = [math.degrees(math.atan(0.3 * strength[i].item())), 0][::1 if kind[i] == 1 else -1]
        sheared = torchvision.transforms.functional.affine(wide[i], 0, [0, 0], 1, angles, torchvision.transforms.InterpolationMode.BILINEAR)
        torch.testing.assert_close(changed[i], sheared, rtol=0, atol=1e-4)
    for i in (kind == 9).nonzero()[:, 0].tolist():      # posterised: 16 to 256 levels
        assert len(changed[i].unique()) == pytest.approx(2 ** (8 - 4 * abs(strength[i].item())), abs=2)
    half = torch.linspace(0, 1, 32).expand(500, 3, 32, 32).contiguous()
    over = ltcl.random_change(half, torch.Generator().manual_seed(1))
    falls = (over[:, 0, 16, :-1] - over[:, 0, 16, 1:]).amax(1) > 0.3        # solarised: up, then down
    assert falls.sum() > 5
    x = torch.zeros(300, 3, 32, 32)
    hidden = (ltcl.random_cutout(x, torch.Generator().manual_seed(0)) == 0.5).all(1).sum((1, 2))
    assert hidden.max() == 256 and 64 <= hidden.min() < 120             # 16 x 16, less where it hangs over the rim
    hidden = (ltcl.random_cutout(torch.zeros(20000, 3, 8, 8), torch.Generator().manual_seed(0)) > 0).float()
    for lines in (hidden.mean((0, 1, 3)), hidden.mean((0, 1, 2))):
        torch.testing.assert_close(lines, lines.flip(0), rtol=0, atol=0.01)     # as often at one rim as at the other
    boxes = ltcl.random_cutout(torch.zeros(2000, 3, 32, 32), torch.Generator().manual_seed(0))[:, 0] > 0
    centres = torch.stack([along.float() @ torch.arange(32.) / along.sum(1) for along in (boxes.any(2), boxes.any(1))])
    assert centres.corrcoef()[0, 1].abs() < 0.1         # on no diagonal


def test_hold_out():
    data = tiny_data(n=(40, 40, 40))
    data.x_train[:, 0, 0, 0] = torch.arange(120)        # each image its own mark
    held = ltcl.hold_out(data, 0.1)
    assert torch.bincount(held.y_train).tolist() == [36] * 3 and torch.bincount(held.y_test).tolist() == [4] * 3
    marks = held.x_train[:, 0, 0, 0].tolist() + held.x_test[:, 0, 0, 0].tolist()
    assert sorted(marks) == list(range(120)) and held.x_test.shape[0] == 12
    for x, y in ((held.x_train, held.y_train), (held.x_test, held.y_test)):
        assert torch.equal(x[:, 0, 0, 0].long() // 40, y)
    trainers = [ltcl.Trainer(train.Config.of(dataset="t.npz", imb=4, holdout=0.1, net="resnet8", batch_size=8, device="cpu",
                                             seed=seed), data) for seed in (0, 1)]
    assert trainers[0].counts.tolist() == [36, 18, 9] and len(trainers[0].y_test) == 12
    assert torch.equal(trainers[0].x, trainers[1].x) and torch.equal(trainers[0].x_test, trainers[1].x_test)    # of every seed
    assert len(ltcl.hold_out(tiny_data(n=(100, 100)), 0.07).y_test) == 14       # 0.07 * 100 is above 7 in floats
    held = ltcl.hold_out(tiny_data(n=(12, 6, 1)), 0.1)  # one image: to train on
    assert torch.bincount(held.y_train).tolist() == [10, 5, 1] and torch.bincount(held.y_test).tolist() == [2, 1]
    assert torch.bincount(ltcl.hold_out(tiny_data(n=(5, 5, 5)), 0.9).y_train).tolist() == [1, 1, 1]
    with pytest.raises(ltcl.InputError, match="no class has two images"):
        ltcl.hold_out(tiny_data(n=(1, 1, 1)), 0.5)


def test_an_npz_without_test_images(tmp_path, capsys):
    path = write_npz(tmp_path / "a.npz", **arrays(n=(12, 6, 1)) | dict(x_test=None, y_test=None))
    argv = [*TINY, "--dataset", path, "--method", "ce", "--out", str(tmp_path / "run")]
    refused(capsys, tmp_path, argv, "lacks x_test, y_test", "--holdout")
    assert train.main([*argv, "--holdout", "0.1"]) == 0 and "16 training images in 3 classes of 10 to 1, 3 test" in capsys.readouterr().out
    assert train.main(["--eval", str(tmp_path / "run"), "--per-class"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "n/a", "2"]    # one image: to train on


def test_averaged_weights_are_evaluated_saved_and_loaded(tiny, tmp_path):
    assert train.main([*tiny, "--average", "0.5", "--experts", "2", "--logits", "cosine", "--hidden", "48", "--dim", "24", "--out", str(tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    net, weight = ltcl.load(tmp_path / "run", "cpu"), "experts.0.classifier.weight"
    assert net.experts[0].head[3].weight.shape == (24, 48)
    assert torch.equal(net.state_dict()[weight], state["averaged"][weight]) and not torch.equal(state["net"][weight], state["averaged"][weight])
    x = torch.rand(2, 3, 8, 8)
    cosines = F.cosine_similarity(net.maps(x)[0].mean((2, 3))[:, None], net.experts[0].classifier.weight, dim=2)
    torch.testing.assert_close(net.logits(net.maps(x))[0], 30 * cosines)
    assert not any("classifier.bias" in key for key in state["net"])
    with torch.no_grad():
        before = net(x)
        net.experts[0].classifier.weight[1] *= 5        # lengths don't matter
        torch.testing.assert_close(net(x), before)


def test_blur_is_torchvisions():
    x = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    out = ltcl.random_blur(x, torch.Generator().manual_seed(0), p=1, sigma=(1.0, 1.0))
    torch.testing.assert_close(out, torchvision.transforms.functional.gaussian_blur(x, [7, 7], [1.0, 1.0]), rtol=0, atol=1e-5)
    wide = torch.rand(1, 3, 400, 19)                    # a tenth of the longer side would be a kernel wider than the image
    assert torch.equal(ltcl.random_blur(wide, torch.Generator(), p=1), wide)
    wide = torch.rand(1, 3, 400, 20)
    assert not torch.equal(ltcl.random_blur(wide, torch.Generator(), p=1), wide)
    point = torch.zeros(400, 3, 64, 64)
    point[..., 32, 32] = 1
    centre = ltcl.random_blur(point, torch.Generator().manual_seed(0), p=1)[..., 32, 32]
    assert 0.0466 < centre.min() < 0.048 and centre.max() > 0.999       # of sigma 2 to 0.1
    x = x.repeat(100, 1, 1, 1)
    half = (ltcl.random_blur(x, torch.Generator().manual_seed(0)) == x).flatten(1).all(1).float().mean()
    assert 0.47 < half < 0.57                           # a sigma below 0.17 changes nothing


@pytest.mark.parametrize("name, side", [("resnet8", 32), ("resnet20", 32), ("resnet18", 224)])
def test_a_teacher_looks_at_the_middle_of_its_box(name, side, monkeypatch):
    """What the pixels do to the pooled features is centred where the box is, as far as a net of random weights goes."""
    trainer, boxes, cut = tiny_trainer(net=name), [], ltcl.cut
    monkeypatch.setattr(ltcl, "cut", lambda x, b, *rest: boxes.append((b, *rest)) or cut(x, b, *rest))
    x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    maps = trainer.net.eval().maps(x)
    trainer.patch_loss(x.detach(), maps, unit(1, 4, 128, dtype=torch.float32))
    (students, _), (teachers, *how) = boxes
    shift = teachers - students
    assert shift.std() < 1e-4 and how == [2, maps[0].shape[3] / side]
    box, centres = torch.tensor([[[0.4, 0.4, 0.6, 0.6]]]).expand(4, 1, 4) * side, []
    for moved in (box + shift.mean(), box):
        pooled = cut(maps[0], moved, 2, maps[0].shape[3] / side)
        grad, = torch.autograd.grad((pooled * unit(*pooled.shape, dtype=torch.float32)).sum(), x, retain_graph=True)
        energy = grad.square().sum((0, 1))                              # [H,W]
        middle = torch.arange(side) + 0.5
        centres.append(torch.stack([energy.sum(0) @ middle, energy.sum(1) @ middle]) / energy.sum() - side / 2)
    assert centres[0].abs().max() < 0.4 * shift.mean() < 0.6 * shift.mean() < -centres[1].max(), centres


def test_half_of_the_resized_views_are_mirrored():
    ramp = torch.arange(40, dtype=torch.uint8).expand(400, 3, 40, 40)
    views = ltcl.resized_view(ramp, torch.Generator().manual_seed(0), 8)
    falling = (views.diff(dim=3) < 0).flatten(1)
    assert views.amin() < 3 / 255 and views.amax((1, 2, 3)).sub(views.amin((1, 2, 3))).max() > 34 / 255     # some show it all
    assert views.amax((1, 2, 3)).sub(views.amin((1, 2, 3))).min() < 12 / 255    # and some 8 % of it
    assert 160 < falling.any(1).sum() < 240 and (falling.all(1) == falling.any(1)).all()


def test_views_of_large_images():
    x = torch.randint(256, (8, 3, 72, 72), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    for view in (*ltcl.AUGMENTATIONS["resized"][:3], ltcl.colour_view):
        out = view(x, rng, 64)
        assert out.shape == (8, 3, 64, 64) and 0 <= out.min() and out.max() <= 1 and out.std() > 0.05
    x = x.repeat(8, 1, 1, 1)
    sharp, query = (view(x, torch.Generator().manual_seed(0), 64) for view in (ltcl.colour_view, ltcl.query_view))
    assert 20 < (sharp == query).flatten(1).all(1).sum() < 44           # half of the queries are blurred
    x[:, 0], x[:, 1:] = 150, 50                         # a key keeps its hue
    key = ltcl.key_view(x, rng, 64)
    assert (key[:, 1] - key[:, 2]).abs().max() < 1e-5 and (key[:, 0] - key[:, 1]).min() > 0.05
    assert (key[:, 0] - 150 / 255).abs().amax((1, 2)).min() > 1e-4      # and each is jittered
    hidden = [(view(x, rng, 64) == 0.5).all(1).sum((1, 2)).min() for view in ltcl.AUGMENTATIONS["strong"][:3]]
    assert hidden[0] == hidden[1] == 0 < hidden[2]      # Cutout is the classifier's alone


def test_what_the_views_are_made_of(monkeypatch):
    made, boxes, rng = [], [], torch.Generator().manual_seed(0)
    for name in ("crop", "boxes", "flip", "grayscale", "jitter", "change", "cutout", "blur"):
        def recorded(*args, name=name, real=getattr(ltcl, "random_" + name), **how):
            made[-1] += f" {name}"
            boxes.extend([how] * (name == "boxes"))
            return real(*args, **how)
        monkeypatch.setattr(ltcl, "random_" + name, recorded)
    for aug, expected in (("crop", [" crop flip grayscale"] * 3 + [" flip grayscale"]),
                          ("resized", [" flip boxes jitter blur", " flip boxes jitter", " flip boxes", " flip jitter blur"]),
                          ("strong", [" flip boxes jitter"] * 2 + [" crop flip change cutout", " flip jitter blur"])):
        made.clear()
        *views, patch = ltcl.AUGMENTATIONS[aug]
        for view in (*views, lambda x, rng, _: patch(x / 255, rng)):
            made.append("")
            view(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), rng, [32, 32])
        assert [{*m.split()} for m in made] == [{*e.split()} for e in expected], aug
    assert boxes == 5 * [dict(scale=(0.08, 1), ratio=(3 / 4, 4 / 3))]
    white = torch.full((50, 3, 32, 32), 255, dtype=torch.uint8)
    for view in (ltcl.crop_view, ltcl.resized_view, ltcl.strong_view):
        torch.testing.assert_close(view(white, rng, [32, 32]).amax((1, 2, 3)).median(), torch.tensor(1.0))


# --- networks, curriculum, trainer ---------------------------------------------------------

@pytest.mark.parametrize("net, parameters", [("resnet20", 269722), ("resnet32", 464154), ("resnet56", 853018)])
def test_parameter_counts(net, parameters):             # He et al. 2016, table 6, with 10 classes
    hybrid = ltcl.Hybrid(net, 10, torch.zeros(3), torch.ones(3))
    parts = hybrid.early, hybrid.experts[0].last, hybrid.experts[0].classifier
    assert sum(p.numel() for part in parts for p in part.parameters()) == parameters
    assert hybrid(torch.rand(2, 3, 28, 28)).shape == (2, 10)
    assert hybrid.experts[0].last[-1].conv2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)     # He et al. 2015
    assert hybrid.experts[0].last[0].conv1.weight.shape == (64, 32, 3, 3)       # an expert has the whole last stage
    x = torch.rand(2, 3, 28, 28)
    expected = hybrid.eval()((x - 0.5) / 0.25)
    hybrid.mean += 0.5
    hybrid.std *= 0.25
    torch.testing.assert_close(hybrid(x), expected)
    maps = hybrid.maps(torch.rand(4, 3, 64, 64))
    z, (first, norm, _, second) = hybrid.embed(maps)[0], hybrid.experts[0].head
    hidden = F.relu(norm(first(maps[0].mean((2, 3)))))  # [4,512]
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(z, F.normalize(second(hidden), dim=1))
    assert hidden.shape == (4, 512) and 0.2 < (hidden == 0).float().mean() < 0.8
    torch.testing.assert_close(hybrid.experts[0].prototypes.norm(dim=1), torch.ones(10))


def test_curricula_and_learning_rate():
    assert [ltcl.contrast_weight(t, 10) for t in (0, 5)] == [1, 0.75]
    assert ltcl.contrast_weight(5, 10, "linear") == 0.5 and ltcl.contrast_weight(9, 10, "constant") == 0.5
    assert ltcl.contrast_weight(5, 10, "cosine") == pytest.approx(math.sqrt(0.5))
    c = train.Config.of(dataset="cifar100")
    assert [ltcl.learning_rate(t, c) for t in (1, 5, 120, 120.1, 160, 160.1, 200)] == pytest.approx(
        [0.1, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    assert [ltcl.learning_rate(200 + t, c) for t in (1, 20, 20.1, 30, 30.1, 40)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    c.schedule = "cosine"
    assert ltcl.learning_rate(102.5, c) == pytest.approx(0.25) and ltcl.learning_rate(200, c) == pytest.approx(0)
    c.epochs = 5                                        # a short run warms up for a fifth of it
    assert ltcl.learning_rate(0.5, c) == pytest.approx(0.25) and ltcl.learning_rate(1, c) == 0.5


def test_the_learning_rate_changes_with_every_step(monkeypatch):
    trainer, rates, step = tiny_trainer(method="ce", epochs=10), [], ltcl.Trainer.step
    monkeypatch.setattr(trainer, "step", lambda *args: rates.append(args[3].param_groups[0]["lr"]) or step(trainer, *args))
    trainer.train_epoch()
    assert rates == pytest.approx([0.05 / 4, 0.05 / 2])         # of a warm-up of two epochs


def test_accuracy_of_groups():
    counts = torch.tensor([200, 50, 50, 5])
    y = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    result = ltcl.accuracy(torch.tensor([0, 0, 1, 0, 0, 0, 3, 0]), y, counts)
    assert result == dict(top1=50, balanced=50, many=100, medium=25, few=50, by_class=[100, 50, 0, 50])
    assert ltcl.accuracy(y, y, counts + 100)["few"] is None
    assert ltcl.accuracy(y[:6], y[:6], counts)["few"] is None       # no test image of them
    skewed = ltcl.accuracy(torch.zeros(4).long(), torch.tensor([0, 0, 0, 1]), torch.tensor([200, 200]))
    assert skewed["top1"] == 75 and skewed["balanced"] == 50 == skewed["many"]


def arrays(n=(12, 6, 3), test=2, size=8, grey=False, seed=0):
    """Tiny images that tell their class by brightness."""
    rng = np.random.RandomState(seed)
    y = {"train": np.repeat(np.arange(len(n)), n), "test": np.repeat(np.arange(len(n)), test)}
    channels = () if grey else (3,)
    x = {part: (rng.randint(60, size=(len(labels), size, size, *channels))
                + labels.reshape(-1, 1, 1, *[1] * len(channels)) * 60).astype(np.uint8) for part, labels in y.items()}
    return dict(x_train=x["train"], y_train=y["train"], x_test=x["test"], y_test=y["test"])


def write_npz(path, **changes):
    kept = {key: value for key, value in (arrays() | changes).items() if value is not None}
    np.savez(path, **kept)
    return str(path)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


TINY = ["--net", "resnet8", "--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--device", "cpu"]


@pytest.fixture
def tiny(tmp_path):
    return ["--dataset", write_npz(tmp_path / "tiny.npz"), *TINY]


def test_every_method_end_to_end(tiny, tmp_path, capsys):
    for method in ("ce", "sc", "psc", "dscl"):
        out = tmp_path / method
        assert train.main([*tiny, "--method", method, "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        for words in ("top-1", "many", "medium", "few", "chance %", "n/a", "33.33", "To try next: python train.py"):
            assert words in shown
        log = log_of(out)
        assert [e["epoch"] for e in log] == [1, 2] and log[0].keys() == train.EPOCH.keys()
        assert log[1]["many"] is None and log[1]["medium"] is None and log[1]["few"] == log[1]["balanced"]
        contrast = [log[1][key] for key in ("loss_contrast", "cos_positive", "cos_negative", "spread")]
        assert all(v is None for v in contrast) if method == "ce" else all(math.isfinite(v) for v in contrast)
        for e in log:
            w, pbsd = e["contrast_weight"], 1.5 * (e["loss_pbsd"] or 0)
            assert (e["loss_pbsd"] is not None) == (method == "dscl")
            mixed = w * ((e["loss_contrast"] or 0) + pbsd) + (1 - w) * e["loss_ce"]
            assert e["loss"] == pytest.approx(mixed, abs=1e-5)
        assert log[1]["contrast_weight"] == (0 if method == "ce" else 0.75)
        saved = torch.load(out / "last.pt", weights_only=True)
        assert saved["epoch"] == 2 and saved["counts"] == [12, 6, 3] and saved["class_names"] == ["0", "1", "2"]
        x = torch.from_numpy(arrays()["x_train"]).float() / 255
        std, mean = torch.std_mean(x, (0, 1, 2))
        torch.testing.assert_close(saved["net"]["mean"].flatten(), mean)
        torch.testing.assert_close(saved["net"]["std"].flatten(), std)
        assert json.loads((out / "config.json").read_text())["method"] == method
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "last.pt", "log.jsonl", "views.png"]


def test_one_seed_twice_is_identical_and_another_is_not(tiny, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.manual_seed(len(name) + int(seed))        # the global stream must not matter
        assert train.main([*tiny, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    a, b, c = (torch.load(tmp_path / name / "last.pt", weights_only=True)["net"] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["experts.0.classifier.weight"], c["experts.0.classifier.weight"])


def test_it_learns():
    whole = ltcl.draw_shapes(n_train=60, n_test=20, seed=1)
    train_rows, test_rows = whole.y_train < 2, whole.y_test < 2     # plain discs and striped squares
    data = ltcl.Dataset(whole.x_train[train_rows], whole.y_train[train_rows], whole.x_test[test_rows],
                        whole.y_test[test_rows], ["disc", "square"])
    trainer = ltcl.Trainer(train.Config.of(imb=2, epochs=20, batch_size=16, lr=0.05, device="cpu"), data)
    first, *_, last = [trainer.train_epoch() for _ in range(20)]
    assert trainer.evaluate()["top1"] >= 90
    gaps = [epoch["cos_positive"] - epoch["cos_negative"] for epoch in (first, last)]
    assert gaps[1] > gaps[0] + 0.2


def tiny_data(n=(12, 6, 3), seed=0):
    a = arrays(n=n, seed=seed)
    x, x_test = (torch.from_numpy(a[key]).permute(0, 3, 1, 2).contiguous() for key in ("x_train", "x_test"))
    return ltcl.Dataset(x, torch.from_numpy(a["y_train"]), x_test, torch.from_numpy(a["y_test"]), list("abc"))


def tiny_trainer(**settings):
    settings = dict(dataset="tiny.npz", net="resnet8", batch_size=8, lr=0.05, device="cpu", epochs=2) | settings
    if train.Config.of(**settings).pbsd:
        settings.setdefault("patches", 2)
    return ltcl.Trainer(train.Config.of(**settings), tiny_data())


def test_synchronised_batchnorm_trains(monkeypatch):    # in one process it does without CUDA
    monkeypatch.setattr(ltcl, "require", lambda *_: None)
    trainer, plain = (tiny_trainer(method="sc", batchnorm=kind) for kind in ("sync", "local"))
    assert trainer.train_epoch()["loss"] == pytest.approx(plain.train_epoch()["loss"], rel=1e-3)
    plain.load_state_dict(trainer.state_dict())


def test_a_stop_in_a_seeds_last_evaluation_holds_for_the_next(tiny, tmp_path, monkeypatch):
    evaluate, argv = ltcl.Trainer.evaluate, [*tiny, "--method", "ce", "--quiet", "--out", str(tmp_path / "run"), "--seeds", "0", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(ltcl.Trainer, "evaluate", lambda self: evaluate(self) if self.epoch < self.epochs else
                      (signal.raise_signal(signal.SIGTERM), evaluate(self))[1])
        assert train.main(argv) == 128 + signal.SIGTERM
    assert not (tmp_path / "run-seed1").exists()
    assert train.main(argv) == 0


def test_a_stop_in_the_evaluation_of_a_finished_run(tiny, tmp_path, monkeypatch):
    argv, evaluate = [*tiny, "--method", "ce", "--quiet", "--out", str(tmp_path / "run")], ltcl.Trainer.evaluate
    assert train.main([*argv, "--seeds", "0"]) == 0
    monkeypatch.setattr(ltcl.Trainer, "evaluate", lambda self: (signal.raise_signal(signal.SIGTERM), evaluate(self))[1])
    assert train.main([*argv, "--seeds", "0", "1"]) == 128 + signal.SIGTERM
    assert not (tmp_path / "run-seed1").exists()


def test_a_seeds_run_of_another_method_is_named_by_it(tiny, tmp_path, capsys):
    argv = [*tiny, "--quiet", "--out", str(tmp_path / "run"), "--seeds", "0"]
    assert train.main(argv) == 0
    refused(capsys, tmp_path, [*argv, "--method", "ce"], "--method is 'ce'", "has 'dscl'")      # not by what follows from it
    refused(capsys, tmp_path, [*argv, "--method", "ce", "--alpha", "0.3"], "--alpha has no meaning with --method ce")


@pytest.mark.parametrize("K", [1, 5, 8, 13, 40])
def test_the_queue_against_a_list(K):
    trainer, expected, g = tiny_trainer(queue=K), [], torch.Generator().manual_seed(0)
    assert (trainer.queue_y == -1).all()
    for n in (3, 8, 8, 1, 20, 7):
        keys, y = torch.rand(1, n, 128, generator=g), torch.randint(3, (n,), generator=g)
        trainer.remember(keys, y)
        expected = (expected + list(zip(keys[0], y)))[-K:]
        kept = trainer.queue_y >= 0
        assert kept.sum() == len(expected)
        ours = torch.cat([trainer.queue[0], trainer.queue_y[:, None]], 1)[kept].tolist()
        assert sorted(ours) == sorted(torch.cat([k, label[None]]).tolist() for k, label in expected)
        if len(expected) == K:                              # the oldest first
            assert torch.equal(trainer.queue[0], torch.stack([k for k, _ in expected]))


@pytest.mark.parametrize("ema", [0, 0.5])
def test_the_statistics_are_of_query_against_key(ema, monkeypatch):
    trainer, N = tiny_trainer(ema=ema, pbsd=0), 8
    x, y, shown = trainer.x[:N], trainer.y[:N], []
    losses, statistics = ltcl.dscl_loss, ltcl.embedding_statistics
    monkeypatch.setattr(ltcl, "dscl_loss", lambda q, k, *rest: shown.append((q, k)) or losses(q, k, *rest))
    parts, _ = trainer.losses(x, y, x, y)
    q, k = shown[0]
    expected = statistics(q, k, y)
    assert not torch.equal(q, k) and all(torch.equal(parts[name], value) for name, value in expected.items())
    assert parts["cos_positive"] != statistics(q, q, y)["cos_positive"]


def test_the_queue_is_filled_after_the_loss(monkeypatch):
    trainer, seen = tiny_trainer(queue=16, epochs=1, pbsd=0.0), []
    loss = ltcl.dscl_loss
    monkeypatch.setattr(ltcl, "dscl_loss", lambda q, k, y, queue, queue_y, *rest: seen.append((queue_y >= 0).sum().item())
                        or loss(q, k, y, queue, queue_y, *rest))
    trainer.train_epoch()
    assert seen == [0, 0, 8, 8] and (trainer.queue_y >= 0).all()


def test_the_momentum_encoder_follows_parameters_and_buffers(monkeypatch):
    trainer = tiny_trainer(ema=0.9, queue=16)
    follow, before = trainer.follow, {name: t.clone() for name, t in trainer.key_encoder.state_dict().items()}
    monkeypatch.setattr(trainer, "follow", lambda *_: None)
    trainer.train_epoch()
    moved = {name: t.clone() for name, t in trainer.key_encoder.state_dict().items()}
    assert not torch.equal(moved["early.1.running_mean"], before["early.1.running_mean"])   # its own BatchNorm has seen the keys
    follow(trainer.key_encoder, 0.9)
    live, changed = trainer.net.state_dict(), set()
    for name, t in trainer.key_encoder.state_dict().items():
        if t.is_floating_point():
            torch.testing.assert_close(t, 0.9 * moved[name] + 0.1 * live[name])
            changed |= {name} if not torch.equal(t, before[name]) else set()
    assert "early.1.running_var" in changed and "early.0.weight" in changed
    assert all(p.grad is None for p in trainer.key_encoder.parameters())
    decays = []
    monkeypatch.setattr(trainer, "follow", lambda slow, decay: decays.append((slow is trainer.key_encoder, decay)))
    trainer.train_epoch()
    assert decays == [(True, 0.9)] * 2


STEPS = [dict(method="ce"), dict(method="sc"), dict(method="psc"), dict(), dict(experts=2),
         dict(ema=0.9, queue=40), dict(aug="resized"), dict(curriculum="two-stage"),
         dict(recipe="record", batch_size=8, classifier_views=2, average=0.9, logits="cosine")]


@pytest.mark.parametrize("settings", STEPS)
def test_a_step_never_waits_for_the_device(settings):
    """FakeTensorMode has no values: whatever needs one on the host raises."""
    trainer = tiny_trainer(**settings)
    N, plan = 8, trainer.batches(8, 2)
    trainer.net.train()
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rows = mode.from_tensor(plan[0])
        parts = trainer.step(trainer.x[rows], trainer.y[rows], N, trainer.optimizers[0])
        assert "loss" in parts and isinstance(parts["loss"], fake_tensor.FakeTensor)
        with pytest.raises(fake_tensor.DataDependentOutputException):
            parts["loss"].item()


class NoConstants(TorchDispatchMode):
    """Refuses tensors made of the host's numbers: on another device these would have to be copied and waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("settings", STEPS)
def test_a_step_copies_nothing_from_the_host(settings):
    trainer = tiny_trainer(**settings)
    rows = trainer.batches(8, 2)[0]
    trainer.net.train()
    with NoConstants():
        trainer.step(trainer.x[rows], trainer.y[rows], 8, trainer.optimizers[0])
        with pytest.raises(AssertionError):
            torch.ones(3)[[0, 1]]
    if trainer.config.curriculum != "two-stage":    # DistributedDataParallel waits for every gradient
        assert all((p.grad is not None) == p.requires_grad for p in trainer.net.parameters())
    for e in trainer.net.experts:
        assert e.prototypes.requires_grad == (trainer.config.method == "psc")
        assert all(p.requires_grad == (trainer.config.method != "ce") for p in e.head.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", STEPS)
def test_a_step_never_waits_for_cuda(settings):
    trainer = tiny_trainer(**settings | {"device": "cuda"})
    rows = trainer.batches(8, 2)
    trainer.net.train()
    for sync in ("default", "error"):                   # the first step warms up
        torch.cuda.set_sync_debug_mode(sync)
        try:
            trainer.step(trainer.x[rows[0]], trainer.y[rows[0]], 8, trainer.optimizers[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["ce", "sc"])
def test_batches_of_the_classifier(method):
    for classifier in ("auto", "class-balanced", "instance-balanced", "logit-adjusted"):
        trainer = tiny_trainer(method=method, classifier=classifier)
        plan = torch.cat([trainer.batches(8, 2) for _ in range(200)])       # [400,n]
        contrast, classes = plan[:, :8], torch.bincount(trainer.y[plan[:, -8:]].flatten()) / (400 * 8)
        balanced = classifier == "class-balanced" or (classifier == "auto" and method == "sc")
        assert plan.shape[1] == (16 if balanced and method == "sc" else 8)
        expected = torch.full((3,), 1 / 3) if balanced else trainer.counts / trainer.counts.sum()
        torch.testing.assert_close(classes, expected, rtol=0.1, atol=0)
        if method == "sc":
            torch.testing.assert_close(torch.bincount(trainer.y[contrast].flatten()) / 3200, trainer.counts / 21, rtol=0.1, atol=0)


def test_the_second_stage_of_cross_entropy_is_class_balanced():
    trainer = tiny_trainer(method="ce", curriculum="two-stage")
    for trainer.epoch, share in ((0, 12 / 21), (2, 1 / 3)):
        classes = trainer.y[torch.cat([trainer.batches(8, 2) for _ in range(200)])]
        assert (classes == 0).double().mean().item() == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("adjust", [1.0, 1.5])
def test_logit_adjustment_is_balanced_softmax(adjust):
    trainer = tiny_trainer(method="ce", classifier="logit-adjusted", adjust=adjust, aug="crop")
    logits, y = torch.randn(1, 3, 3), torch.tensor([0, 2, 1])
    trainer.net.logits = lambda maps: logits
    parts, _ = trainer.losses(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), y, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), y)
    weighted = logits[0].exp() * torch.tensor([12.0, 6, 3]) ** adjust       # n_c exp(logit_c), for adjust 1
    torch.testing.assert_close(parts["loss"], -(weighted[range(3), y] / weighted.sum(1)).log().mean())


@pytest.mark.parametrize("settings", [dict(method="ce"), dict(method="sc", curriculum="constant"), dict(curriculum="constant", experts=2),
                                      dict(curriculum="constant", ema=0.5), dict(method="ce", curriculum="two-stage")])
def test_the_classifier_sees_several_views_of_each_image_with_its_label(settings, monkeypatch):
    query, key, _, patch = ltcl.AUGMENTATIONS["crop"]
    seen = []

    def plain(x, rng, size):                            # the k-th view of an image is k brighter
        seen.append(len(x))
        return (x + 9 * torch.arange(len(x)).div(4, rounding_mode="floor").view(-1, 1, 1, 1)).float() / 255

    monkeypatch.setitem(ltcl.AUGMENTATIONS, "crop", (query, key, plain, patch))
    trainer = tiny_trainer(aug="crop", classifier_views=3, **settings)
    trainer.epoch = 2 if "two-stage" in settings.values() else 0
    x, y = torch.randint(200, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 2, 1, 0])
    trainer.net.eval()                                  # BatchNorm's running statistics: an image's logits are its own
    parts, _ = trainer.losses(x, y, x, y)
    logits = [trainer.net.logits(trainer.net.maps((x + 9 * k).float() / 255)) for k in range(3)]        # [E,4,C] each
    theirs = [F.cross_entropy(e, y) for view in logits for e in view]
    torch.testing.assert_close(parts["loss_ce"], sum(theirs) / len(theirs))
    assert seen == [12] and parts["loss_ce"] != theirs[0]


def test_patches_leave_batchnorm_alone():
    trainer = tiny_trainer()
    view, before = torch.rand(8, 3, 8, 8), {k: v.clone() for k, v in trainer.net.state_dict().items()}
    trainer.net.train()
    maps = [torch.rand(8, 64, 2, 2)]
    keys = F.normalize(torch.randn(1, 8, 128), dim=2).requires_grad_()
    loss = trainer.patch_loss(view, maps, keys)
    loss.backward()
    assert keys.grad is None
    assert all(torch.equal(before[k], v) for k, v in trainer.net.state_dict().items())
    assert trainer.net.early[0].weight.grad.abs().sum() > 0
    trainer.net(view)
    assert not torch.equal(before["early.1.running_mean"], trainer.net.state_dict()["early.1.running_mean"])


def test_patches_have_their_size_and_an_empty_queue_is_none(monkeypatch):
    sizes, losses, cut, keys = [], [], ltcl.cut, unit(1, 8, 128, dtype=torch.float32)
    monkeypatch.setattr(ltcl, "cut", lambda x, boxes, size, *rest: sizes.append(size) or cut(x, boxes, size, *rest))
    scales, boxes = [], ltcl.random_boxes
    monkeypatch.setattr(ltcl, "random_boxes", lambda *args, side_scale: scales.append(side_scale) or boxes(*args, side_scale=side_scale))
    for settings in (dict(), dict(queue=16), dict(aug="resized"), dict(patch_size=10, box_scale="side")):
        trainer = tiny_trainer(**settings)
        trainer.reseed(0)
        losses.append(trainer.patch_loss(torch.ones(8, 3, 56, 56), [torch.ones(8, 64, 14, 14)], keys).item())
    assert sizes[::2] == [28, 28, 16, 10] and scales == [False, False, False, True] and losses[0] == pytest.approx(losses[1])


def test_two_stages():
    trainer = tiny_trainer(curriculum="two-stage", stage2_epochs=8, stage2_batch=4, stage2_lr=0.02, ema=0.9, queue=16)
    first = [trainer.train_epoch() for _ in range(2)]
    assert all("loss_ce" not in e and e["contrast_weight"] == 1 for e in first)
    frozen = {k: v.clone() for k, v in trainer.state_dict()["net"].items()}
    of, tracked, maps = set(), [], trainer.net.maps
    trainer.net.maps = lambda x: (m := maps(x), tracked.append(m[0].requires_grad))[0]
    second = [trainer.train_epoch(lambda step, steps: of.add(steps)) for _ in range(8)]
    assert of == {21 // 4} and tracked == [False] * 40
    assert [(o["momentum"], o["weight_decay"]) for o in trainer.optimizers[1].param_groups] == [(0.9, 0)]
    assert trainer.epoch == trainer.epochs == 10
    assert all("loss_contrast" not in e and e["contrast_weight"] == 0 for e in second)
    changed = {k for k, v in trainer.net.state_dict().items() if not torch.equal(v, frozen[k])}
    assert changed == {"experts.0.classifier.weight", "experts.0.classifier.bias"}      # BatchNorm untouched
    assert second[7]["lr"] == pytest.approx(0.0002) and second[7]["loss_ce"] < second[0]["loss_ce"]


def test_thinning_what_is_no_balanced_set_warns(tmp_path, capsys):
    for n, imb, warned in (((12, 12, 12), "2", False), ((12, 6, 3), "2", False), ((6, 3, 12), "2", True), ((3, 6, 12), "1", False)):
        path = write_npz(tmp_path / "uneven.npz", **arrays(n=n))
        argv = ["--dataset", path, *TINY, "--epochs", "1", "--method", "ce", "--imb", imb, "--out", str(tmp_path / str(n))]
        assert train.main(argv) == 0
        assert ("too few images for their place" in capsys.readouterr().err) == warned


def test_evaluation_before_the_classifier_is_trained_warns(tiny, tmp_path, monkeypatch, capsys):
    argv = [*tiny, "--curriculum", "two-stage", "--stage2-epochs", "1", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        interrupt(patch, {2})
        assert train.main(argv) == 130
    assert "1 steps are few to train a classifier" in capsys.readouterr().err
    for warned in (True, False):
        capsys.readouterr()
        assert train.main(["--eval", str(tmp_path / "run")]) == 0
        assert ("no epoch has trained the classifier yet" in capsys.readouterr().err) == warned
        assert train.main(["--predict", str(tmp_path / "run"), write_picture(tmp_path / "a.png")]) == 0
        assert ("no epoch has trained the classifier yet" in capsys.readouterr().err) == warned
        assert train.main([*argv, "--resume"]) == 0
    capsys.readouterr()
    # cross-entropy has a classifier in its first stage, too; the parabola leaves it none of the first epoch
    for curriculum, method, epoch, history, warned in (("two-stage", "ce", 0, [], True), ("two-stage", "ce", 0, [0], False),
                                                       ("two-stage", "ce", 1, [], False), ("parabolic", "sc", 1, [], True),
                                                       ("parabolic", "sc", 1, [0], False), ("constant", "sc", 1, [], False)):
        train.warn_untrained(dict(config=dict(curriculum=curriculum, method=method, epochs=2), epoch=epoch, history=history))
        assert bool(capsys.readouterr().err) == warned


def test_experts_share_the_early_stages_and_average_their_logits():
    one, three = (ltcl.Hybrid("resnet8", 5, torch.zeros(3), torch.ones(3), experts=E).eval() for E in (1, 3))
    x, count = torch.rand(4, 3, 32, 32), lambda m: sum(p.numel() for p in m.parameters())
    assert count(three) == count(one) + 2 * count(one.experts[0])
    logits = three.logits(three.maps(x))
    assert logits.shape == (3, 4, 5) and not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(three(x), (logits[0] + logits[1] + logits[2]) / 3)
    trainer = tiny_trainer(experts=2, queue=16, ema=0.9)
    start = [e.last[0].conv1.weight.clone() for e in trainer.net.experts]
    trainer.train_epoch()
    assert all(not torch.equal(a, e.last[0].conv1.weight) for a, e in zip(start, trainer.net.experts))


@pytest.mark.parametrize("settings", [dict(method="sc", recipe="record", batch_size=8, classifier_views=2, logits="cosine", average=0.5), dict(method="sc", pbsd=1.0), dict(box_scale="side"), dict(queue=30, hidden=48, dim=24), dict(ema=0.5, batch_size=21), dict(aug="resized"),
                                      dict(method="ce", curriculum="two-stage", stage2_epochs=1),
                                      dict(method="psc", experts=2), dict(curriculum="two-stage", stage2_epochs=1)])
def test_combinations_train(settings):
    trainer = tiny_trainer(**settings)
    start = weights(trainer)
    for _ in range(trainer.epochs):
        last = trainer.train_epoch()
    assert math.isfinite(last["loss"]) and 0 <= trainer.evaluate()["top1"] <= 100 and not torch.equal(weights(trainer), start)


def test_torchvisions_networks():
    for name, width in (("resnet18", 512), ("resnext50_32x4d", 2048)):
        net = ltcl.Hybrid(name, 4, torch.zeros(3), torch.ones(3), experts=2).eval()
        maps = net.maps(torch.rand(2, 3, 64, 64))
        assert [m.shape for m in maps] == [(2, width, 2, 2)] * 2 and net.logits(maps).shape == (2, 2, 4)


@pytest.mark.parametrize("grey, size", [(True, 28), (False, 64)])
def test_other_images(grey, size, tmp_path):
    path = write_npz(tmp_path / "other.npz", **arrays(grey=grey, size=size), class_names=np.array(["cat", "dog", "ant"]))
    assert train.main(["--dataset", path, *TINY, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    data = ltcl.load_dataset(path)
    assert data.x_train.shape == (21, 3, size, size) and data.class_names == ["cat", "dog", "ant"]
    assert ltcl.check_labels("here", data.y_train, data.y_test, np.array([b"cat", b"dog", b"ant"])) == data.class_names   # h5py's
    if grey:
        assert (data.x_train[:, 0] == data.x_train[:, 2]).all()


def test_evaluation_now_and_then(tiny, tmp_path):
    assert train.main([*tiny, "--epochs", "5", "--eval-every", "2", "--out", str(tmp_path / "run")]) == 0
    log = log_of(tmp_path / "run")
    assert [e["top1"] is not None for e in log] == [False, True, False, True, True]


def test_mixed_precision_on_the_cpu(tiny, tmp_path):
    for amp in ("bf16", "fp16"):
        assert train.main([*tiny, "--amp", amp, "--out", str(tmp_path / amp)]) == 0
        state = torch.load(tmp_path / amp / "last.pt", weights_only=True)
        assert bool(state["scaler"]) == (amp == "fp16")         # bfloat16 needs no loss scale


@pytest.mark.parametrize("amp, capability, warned", [("bf16", "AVX2", True), ("bf16", "AVX512", False), ("off", "AVX2", False)])
def test_slow_mixed_precision_is_told(tiny, amp, capability, warned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert train.main([*tiny, "--amp", amp, "--out", str(tmp_path / "run")]) == 0
    assert ("take --amp off" in capsys.readouterr().err) == warned


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept(tmp_path):
    script = ("import resource, torch, train\n"
              "def faults():\n"
              "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
              "    for _ in range(5): torch.ones(2 ** 25)\n"           # 128 MiB
              "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
              "anew = faults(), train.keep_memory(), faults()\n"
              "print(anew[0], faults())")
    run = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    anew, kept = map(int, run.stdout.split())
    assert kept < anew / 10, (anew, kept)


def test_the_command_line_itself(tiny, tmp_path):
    run = subprocess.run([sys.executable, str(HERE / "train.py"), *tiny], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("min left") == 2 and "Saved in" in run.stdout
    assert (tmp_path / "runs" / "tiny-imb1-dscl-resnet8-seed0-1" / "last.pt").is_file()     # beside the user, not the code


# --- folders and lists of image files ---------------------------------------------------------

def write_tree(root, n=(8, 6, 4, 1), size=(80, 60), held_out="val", modes=("RGB", "L", "P", "RGBA")):
    """Class folders of bright to dark pictures, in all modes that pictures come in."""
    rng = np.random.RandomState(0)
    for part, counts in (("train", n), (held_out, [2] * len(n))):
        for c, count in enumerate(counts):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(count):
                pixels = (rng.randint(60, size=(size[1], size[0], 3)) + 50 * c).astype(np.uint8)
                Image.fromarray(pixels).convert(modes[i % len(modes)]).save(root / part / f"class{c}" / f"{i}.png")
    return root


FOLDER = ["--dataset", "folder", "--net", "resnet18", "--method", "dscl", "--size", "64", "--batch-size", "6", "--epochs", "1",
          "--lr", "0.02", "--workers", "2", "--device", "cpu"]


def test_a_folder_of_large_images_end_to_end(tmp_path, capfd):
    write_tree(tmp_path / "data", size=(260, 224), held_out="test")
    assert train.main([*FOLDER, "--data", str(tmp_path / "data"), "--queue", "64", "--ema", "0.9", "--curriculum", "two-stage",
                       "--stage2-epochs", "1", "--stage2-lr", "0.1", "--out", str(tmp_path / "run")]) == 0
    shown = capfd.readouterr()
    assert "warning: --queue 64" in shown.err and "19 training images in 4 classes of 8 to 1, 8 test images" in shown.out
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["class_names"] == ["class0", "class1", "class2", "class3"] and (saved["queue_y"] >= 0).sum() == 18
    log = log_of(tmp_path / "run")
    assert log[0]["loss_pbsd"] > 0 and log[0]["loss_ce"] is None is log[0]["top1"] and log[1]["loss_contrast"] is None
    assert (tmp_path / "run" / "views.png").stat().st_size > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_loaders_workers_too(number, tmp_path):
    write_tree(tmp_path / "data", size=(80, 70))
    argv = [*FOLDER, "--data", tmp_path / "data", "--method", "ce", "--net", "resnet8", "--size", "32", "--epochs", "500", "--out", tmp_path / "run"]
    run = start([sys.executable, HERE / "train.py", *map(str, argv)], cwd=HERE, start_new_session=True, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.time() + 120
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and time.time() < until:
        time.sleep(0.05)
    os.killpg(run.pid, number)
    err = run.communicate(timeout=120)[1]
    assert run.returncode == 128 + number and "all is saved" in err and "Traceback" not in err, err


def test_image_files_are_read_at_8_7_of_the_size(tmp_path):
    data = ltcl.load_dataset("folder", write_tree(tmp_path))
    for aug, size in (("auto", [64, 64]), ("crop", [73, 73])):         # other views than the resized keep it
        trainer = ltcl.Trainer(train.Config.of(dataset="folder", size=64, workers=0, batch_size=4, net="resnet8", device="cpu", aug=aug), data)
        assert trainer.stored == trainer.x.size == trainer.x_test.size == [73, 73] and trainer.size == size
    assert tiny_trainer(aug="resized").size == [8, 8]                   # images in memory keep theirs


def weights(trainer):
    return torch.cat([t.flatten() for t in trainer.net.state_dict().values()])


def test_trainers_of_one_state_share_nothing():
    settings = dict(method="dscl", pbsd=0, queue=8, epochs=3)
    alone, first, second = (tiny_trainer(**settings) for _ in range(3))
    alone.train_epoch()
    first.train_epoch()
    second.load_state_dict(first.state_dict())
    for trainer in (alone, first, second, first, second, alone):
        trainer.train_epoch()
    assert torch.equal(weights(first), weights(alone)) and torch.equal(weights(second), weights(alone))
    with pytest.raises(ltcl.InputError, match="doesn't fit"):
        tiny_trainer(method="dscl", pbsd=0, epochs=3).load_state_dict(first.state_dict())       # has no queue
    assert ltcl.first_line(ValueError("a\nb")) == "a" and ltcl.first_line(MemoryError()) == "MemoryError"     # which is mute


@pytest.mark.parametrize("settings", [{}, dict(curriculum="two-stage", stage2_epochs=1, stage2_batch=4)])
def test_an_evaluation_within_an_epoch_changes_nothing(settings):
    plain, curious = (tiny_trainer(method="sc", epochs=1, **settings) for _ in range(2))
    for _ in range(plain.epochs):
        plain.train_epoch()
        curious.train_epoch(lambda step, steps: curious.evaluate())
        assert torch.equal(weights(plain), weights(curious))


def test_an_evaluation_takes_fewer_large_images_at_once_and_all_in_all(monkeypatch):
    trainer, plans = tiny_trainer(method="ce"), []
    monkeypatch.setattr(trainer, "images", lambda x, plan: plans.append(plan) or iter(()))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    trainer.y_test = torch.zeros(1100, dtype=torch.int64)
    for side, most in ((32, 500), (224, 41), (2000, 1)):
        for trainer.rank, trainer.ranks in ((0, 1), (0, 2), (1, 2)):
            trainer.size = [side, side]
            trainer.evaluate()
        alone, *parts = plans[-3:]
        assert len(alone[0]) == most and all(parts)
        for several in (alone, parts[0] + parts[1]):    # the processes' parts make the whole
            assert torch.cat(several).sort().values.tolist() == list(range(1100))


def test_a_trainer_goes_with_its_name():
    gc.disable()
    try:
        trainer = tiny_trainer(method="sc", average=0.9)
        trainer.train_epoch()
        seen = weakref.ref(trainer.net)
        del trainer
        assert seen() is None                           # no cycle that keeps images and networks on the device
    finally:
        gc.enable()


def test_a_young_average_forgets_the_first_weights():
    trainer = tiny_trainer(method="ce", average=0.999)
    start, decays, follow = weights(trainer), [], trainer.follow
    trainer.follow = lambda slow, decay: decays.append(decay) or follow(slow, decay)
    trainer.train_epoch()
    average = torch.cat([t.flatten() for t in trainer.averaged.state_dict().values()])
    assert (average - weights(trainer)).norm() < 0.3 * (start - weights(trainer)).norm()
    trainer.evaluate()                                  # by its running statistics, which it leaves as they are
    assert torch.equal(average, torch.cat([t.flatten() for t in trainer.averaged.state_dict().values()]))
    trainer.train_epoch()
    assert decays == [(1 + t) / (10 + t) for t in range(4)]
    trainer.averaged.experts[0].classifier.bias[1] = 1e3
    assert trainer.evaluate()["by_class"] == [0, 100, 0]        # it is the average that is evaluated


def test_data_of_ones_own(monkeypatch, tmp_path):
    config = train.Config.of(dataset="tiny.npz", net="resnet8", batch_size=8, method="ce", epochs=1, device="cpu")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the caller's CUDA stream"))
    data = tiny_data()
    data.x_train = data.x_train.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)        # NHWC in memory
    data.class_names = np.array(data.class_names)
    data.x_train[:, 2] = 0                              # a colour that isn't there
    state = torch.get_rng_state()
    trainer = ltcl.Trainer(config, data)
    trainer.train_epoch()
    assert torch.equal(state, torch.get_rng_state())    # the caller's stream
    torch.save(trainer.state_dict(), tmp_path / "a.pt")
    assert ltcl.load(tmp_path / "a.pt", "cpu").class_names == ["a", "b", "c"]
    for change in (dict(x_train=data.x_train / 255), dict(y_train=data.y_train.int()), dict(y_train=2 * data.y_train),
                   dict(class_names=["a"]), dict(x_test=data.x_test[:, :, 1:]), dict(x_train=data.x_train[1:]), dict(y_test=data.y_test[1:]),
                   dict(x_train=data.x_train[:, :1], x_test=data.x_test[:, :1]), dict(y_train=data.y_train[1:]),
                   dict(y_train=data.y_train - 1)):
        for holdout in (0.0, 0.1):                      # a part cut off could take the fault with it
            with pytest.raises(ltcl.InputError, match="the data"):
                ltcl.Trainer(dataclasses.replace(config, holdout=holdout), dataclasses.replace(data, **change))


def test_the_network_takes_pixels_from_0_to_1_and_knows_their_statistics(monkeypatch):
    trainer, seen = tiny_trainer(), []
    pixels = (trainer.x / 255).transpose(0, 1).flatten(1)               # [3,N*H*W]
    torch.testing.assert_close(trainer.net.mean.flatten(), pixels.mean(1))
    torch.testing.assert_close(trainer.net.std.flatten(), pixels.std(1))
    monkeypatch.setattr(trainer.net, "forward", lambda x, real=trainer.net.forward: seen.append(x) or real(x))
    trainer.evaluate()
    torch.testing.assert_close(torch.cat(seen), trainer.x_test / 255, rtol=0, atol=0)


def test_every_setting_changes_the_weights():
    def after(**settings):
        trainer = tiny_trainer(**dict(curriculum="constant", queue=30) | settings)
        trainer.train_epoch()
        return weights(trainer)

    plain = after()
    for name, value in dict(lr=0.1, momentum=0.5, weight_decay=0.1, tau=1.0, alpha=0.5, pbsd=0.5, patches=3, patch_size=6, box_scale="side",
                            ema=0.5, queue=0, classifier="instance-balanced", curriculum="linear", aug="resized",
                            amp="bf16", seed=1).items():
        assert not torch.equal(after(**{name: value}), plain), name


def test_each_view_goes_where_it_belongs(monkeypatch):
    trainer, seen = tiny_trainer(ema=0.9), []
    views = [lambda x, rng, size, i=i: x + 100.0 * i for i in range(3)]
    monkeypatch.setitem(ltcl.AUGMENTATIONS, "crop", (*views, ltcl.AUGMENTATIONS["crop"][3]))
    for part, name in ((trainer.net, "maps"), (trainer.key_encoder, "maps"), (trainer, "patch_loss")):
        monkeypatch.setattr(part, name, lambda x, *rest, real=getattr(part, name): seen.append(x[:, 0, 0, 0].tolist()) or real(x, *rest))
    x = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 8, 8)       # of contrast, then of the classifier
    trainer.step(x, torch.arange(16) % 3, 8, trainer.optimizers[0])
    assert seen[:3] == [[*range(8), *range(208, 216)], [*range(100, 108)], [*range(8)]]   # query and classifier, key, patches


def test_both_views_are_anchors_but_a_momentum_encoders():
    q, k, p, queue, y = unit(8, 128), unit(8, 128, seed=1), unit(3, 128, seed=2), unit(0, 128), torch.arange(8) % 3
    one, other = (ltcl.dscl_loss(*pair, y, alpha=0.3, tau=0.5) for pair in ((q, k), (k, q)))
    both = torch.cat([q, k]), torch.cat([y, y])
    for settings, expected in ((dict(alpha=0.3), (one + other) / 2), (dict(alpha=0.3, ema=0.9), one),
                               (dict(method="psc"), ltcl.psc_loss(*both, p, 0.5)), (dict(method="sc"), ltcl.sc_loss(*both, 0.5))):
        torch.testing.assert_close(tiny_trainer(tau=0.5, **settings).contrast_loss(q, k, y, p, queue), expected)


def test_what_the_contrast_hands_on(monkeypatch):
    """The queries' maps to the teachers, the keys with their labels to the queue, each expert's own queue to both losses."""
    trainer, y, teachers, queues, taus = tiny_trainer(experts=2, queue=16, tau=0.5), torch.arange(8) % 3, [], [], []
    trainer.remember(unit(2, 16, 128, dtype=torch.float32), torch.arange(16) % 3)
    dscl, pbsd, patch_loss = ltcl.dscl_loss, ltcl.pbsd_loss, trainer.patch_loss
    monkeypatch.setattr(ltcl, "dscl_loss", lambda q, k, y, queue, *rest: queues.append(queue) or dscl(q, k, y, queue, *rest))
    monkeypatch.setattr(ltcl, "pbsd_loss", lambda c, s, z, tau, valid: queues.append(z[8:]) or taus.append(tau)
                        or pbsd(c, s, z, tau, valid))
    monkeypatch.setattr(trainer, "patch_loss", lambda view, maps, keys: teachers.extend(maps) or patch_loss(view, maps, keys))
    maps = [torch.rand(16, 64, 2, 2) for _ in range(2)]
    _, (keys, labels) = trainer.contrast([torch.rand(8, 3, 8, 8)] * 2, maps, y)
    assert torch.equal(keys, trainer.net.embed(maps)[:, 8:]) and torch.equal(labels, y)
    assert states_equal(teachers, [m[:8] for m in maps])
    assert states_equal(queues, [trainer.queue[i] for i in (0, 0, 1, 1, 0, 1)])     # both views are anchors; then the patches
    assert taus == [0.5, 0.5]


def test_two_experts_that_are_alike_are_as_one():
    one, two = tiny_trainer(), tiny_trainer(experts=2)
    two.net.early.load_state_dict(one.net.early.state_dict())
    for expert in two.net.experts:
        expert.load_state_dict(one.net.experts[0].state_dict())
    rows, parts = torch.arange(0, 21, 3), []
    for trainer in (one, two):
        trainer.reseed(0, 1)
        parts.append(trainer.losses(*[trainer.x[rows], trainer.y[rows]] * 2)[0])
    a, b = ({name: part.item() for name, part in its.items()} for its in parts)
    assert a == pytest.approx(b, rel=1e-4)


def test_no_epoch_after_the_last():
    trainer = tiny_trainer(method="sc", epochs=1)
    trainer.train_epoch()
    with pytest.raises(ltcl.InputError, match="all 1 epochs are done"):
        trainer.train_epoch()


def test_small_images_of_one_size_go_into_memory(tmp_path):
    write_tree(tmp_path, size=(64, 64))
    data = ltcl.load_dataset("folder", tmp_path)
    assert data.x_train.shape == (19, 3, 64, 64) and data.x_test.shape == (8, 3, 64, 64)
    write_tree(tmp_path / "larger", size=(65, 64))
    assert isinstance(ltcl.load_dataset("folder", tmp_path / "larger").x_train, ltcl.ImageFiles)
    write_tree(tmp_path / "mixed", size=(32, 32))
    (tmp_path / "mixed" / "train" / "class0" / "0.png").write_bytes(
        (write_tree(tmp_path / "other", size=(30, 32)) / "train" / "class0" / "0.png").read_bytes())
    assert isinstance(ltcl.load_dataset("folder", tmp_path / "mixed").x_train, ltcl.ImageFiles)


@pytest.mark.parametrize("size", [(32, 32), (80, 70)])          # in memory, and not
def test_thinned_files_keep_their_labels(size, tmp_path):
    write_tree(tmp_path, n=(12, 12, 12, 12), size=size, modes=("RGB",))
    trainer = ltcl.Trainer(train.Config.of(dataset="folder", imb=4, holdout=0.3, workers=0, batch_size=4, net="resnet8",
                                           size=32, device="cpu"), ltcl.load_dataset("folder", tmp_path, holdout=0.3))
    assert trainer.counts.tolist() == [8, 5, 3, 2] and torch.bincount(trainer.y_test).tolist() == [4] * 4
    for x, y in ((trainer.x, trainer.y), (trainer.x_test, trainer.y_test)):
        pixels, rows = next(trainer.images(x, [torch.arange(len(y))]))
        assert torch.equal(((pixels.float().mean((1, 2, 3)) - 30) / 50).round().long(), y[rows])    # a class's brightness


@pytest.mark.parametrize("size", [(32, 32), (80, 70)])
def test_an_unreadable_image_is_named_and_left_out(size, tmp_path, capfd, monkeypatch):
    evaluated, accuracy = [], ltcl.accuracy
    monkeypatch.setattr(ltcl, "accuracy", lambda predicted, y, counts: evaluated.append(len(y)) or accuracy(predicted, y, counts))
    write_tree(tmp_path / "data", n=(90, 40), size=size, modes=("RGB",))        # one may be, for all its share
    for bad in (tmp_path / "data" / "train" / "class0" / "7.png", tmp_path / "data" / "val" / "class1" / "1.png"):
        bad.write_bytes(bad.read_bytes()[:100])
    for i in range(200):                                # one test image in a hundred may be unreadable
        copy = tmp_path / "data" / "val" / "class0" / f"copy{i}.png"
        copy.write_bytes((tmp_path / "data" / "val" / "class0" / "0.png").read_bytes())
    argv = [*FOLDER, "--method", "ce", "--data", str(tmp_path / "data"), "--net", "resnet8", "--batch-size", "60",
            "--size", "32"]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "is not a readable image" in line]
    assert evaluated == [203] and len(warnings) == 2 and any("7.png" in w for w in warnings) and any("1.png" in w for w in warnings)
    for i in (3, 4):                                    # 3 of 130
        (tmp_path / "data" / "train" / "class0" / f"{i}.png").write_bytes(b"")
    assert train.main([*argv, "--out", str(tmp_path / "run2")]) == 2
    assert "3 of 130 image files cannot be read" in capfd.readouterr().err.splitlines()[-1]
    files = ltcl.ImageFiles([f"{i}.png" for i in range(200)])
    files.report(torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 2, 2]))        # two of 200 are 1 %
    with pytest.raises(ltcl.InputError, match="3 of 200 image files cannot be read"):
        files.report(torch.tensor([3]), torch.tensor([4]))


def test_images_that_are_all_missing_are_noticed_at_the_first(monkeypatch):
    looked = []
    monkeypatch.setattr(ltcl, "read_picture", lambda path, size: looked.append(path) or Image.open(path))
    with pytest.raises(ltcl.InputError, match="none of 50 image files can be read, nowhere/0.png"):
        ltcl.into_memory(ltcl.ImageFiles([f"nowhere/{i}.png" for i in range(50)], None), torch.zeros(50))
    assert len(looked) == 50                            # and not 50 for each of 50


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_goes_away_within_a_batch(workers, tmp_path):
    write_tree(tmp_path / "data", n=(4, 4), modes=("RGB",))
    files = ltcl.ImageFiles(sorted(map(str, (tmp_path / "data" / "val").rglob("*.png"))), [32, 32])

    class Loader(ltcl.ImageFiles):                      # item 2 is asked for when all are away
        def __getitem__(self, i):
            if i == 2:
                self.paths = ["nowhere.png"] * len(self.paths)
            return super().__getitem__(i)

    trainer = tiny_trainer(method="ce")
    trainer.config.workers = workers
    with pytest.raises(ltcl.InputError, match="none of 4 image files can be read"):
        next(trainer.images(Loader(files.paths, files.size), [torch.arange(4)]))


def test_images_that_all_cannot_be_read_end_the_run(tmp_path):
    write_tree(tmp_path / "data", n=(4, 4), modes=("RGB",))
    for bad in (tmp_path / "data" / "val").rglob("*.png"):
        bad.write_bytes(b"")
    argv = [*FOLDER, "--method", "ce", "--data", tmp_path / "data", "--net", "resnet8", "--size", "32", "--out", tmp_path / "run"]
    run = subprocess.run([sys.executable, HERE / "train.py", *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: none of 4 image files can be read")


@pytest.mark.skipif(sys.platform != "linux", reason="workers that inherit a patch, names of any bytes")
def test_a_failing_worker_and_odd_names(tmp_path, capsys):
    root = write_tree(tmp_path / "data", n=(4, 4), modes=("RGB",))
    odd = os.fsdecode(b"caf\xe9.png")
    (root / "train" / "class0" / "0.png").rename(root / "train" / "class0" / odd)
    for part in ("train", "val"):
        files = sorted((root / part).rglob("*.png"))
        text = "".join(f"{p.relative_to(root)} {p.parent.name[-1]}\n" for p in files)
        (tmp_path / f"{part}.txt").write_text(text, "utf-8-sig", "surrogateescape")     # as Notepad marks UTF-8
    argv = [*FOLDER, "--method", "ce", "--data", str(root), "--net", "resnet8", "--size", "32"]
    lists = ["--train-list", str(tmp_path / "train.txt"), "--test-list", str(tmp_path / "val.txt")]
    for more in ([], lists):
        assert train.main([*argv, *more, "--out", str(tmp_path / f"run{len(more)}")]) == 0
        assert "not a readable image" not in capsys.readouterr().err

    script = ("import sys, time, ltcl, train\ndef fail(*_): raise OSError('no space left')\nltcl.ImageFiles.__getitem__ = fail\n"
              "ltcl.into_memory = lambda *_: None\nstart = ltcl.leave_signals_to_the_trainer\n"
              "def slow(i):\n    time.sleep(4 * i)\n    start(i)\n"                    # the second starts after the trainer's end
              "ltcl.leave_signals_to_the_trainer = slow\n"
              "train.leave(train.main(sys.argv[1:]))")
    run = subprocess.run([sys.executable, "-c", script, *argv, *lists, "--out", str(tmp_path / "failed")], cwd=HERE, capture_output=True,
                         text=True, timeout=120)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 2 and "no space left" in last and last.startswith("error: a process that reads images failed")
    script = ("import functools, torch, ltcl\nfrom train import Config\nlast = functools.partial(ltcl.leave_signals_to_the_trainer, seconds=1)\n"
              "ltcl.leave_signals_to_the_trainer = last\nread = ltcl.ImageFiles.__getitem__\n"
              "def fail(files, i):\n    if torch.utils.data.get_worker_info().id == 0:\n        raise OSError('broken')\n    return read(files, i)\n"
              "config = Config.of(dataset='folder', method='ce', net='resnet8', batch_size=4, size=32, workers=2)\n"
              f"data = ltcl.load_dataset('folder', {str(root)!r})\n"
              "trainer = ltcl.Trainer(config, data)\nltcl.ImageFiles.__getitem__ = fail\ntrainer.train_epoch()")
    run = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True, timeout=120)     # it ends
    assert run.returncode == 1 and "OSError: broken" in run.stderr, run.stderr


@pytest.mark.parametrize("size", [(32, 32), (80, 70)])
def test_a_folder_without_test_images(size, tmp_path, capsys):
    root = write_tree(tmp_path / "data", n=(20, 10), size=size, modes=("RGB",))
    shutil.rmtree(root / "val")
    argv = [*FOLDER, "--method", "ce", "--data", str(root), "--net", "resnet8", "--size", "32", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 2 and "--holdout" in capsys.readouterr().err
    (root / "test").mkdir()
    shutil.copy(next((root / "train").rglob("*.png")), root / "test" / "unlabelled.png")        # no class folder in it
    assert train.main(argv) == 2 and "Couldn't find any class folder" in capsys.readouterr().err
    assert train.main([*argv, "--holdout", "0.3"]) == 0
    assert "21 training images in 2 classes of 14 to 7, 9 test images" in capsys.readouterr().out
    assert train.main(["--eval", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert train.main([*argv, "--holdout", "0.3", "--size", "72", "--method", "ce", "--out", str(tmp_path / "large")]) == 0
    assert ("resnet8 is meant for views of 32 pixels" in capsys.readouterr().err) == (size == (80, 70))     # others are in memory


def test_list_files(tmp_path, capsys, monkeypatch):
    root = write_tree(tmp_path / "images", n=(100, 50), size=(32, 32), modes=("RGB",))
    for part in ("train", "val"):
        files = sorted((root / part).rglob("*.png"))
        (tmp_path / f"{part}.txt").write_text("".join(f"{p.relative_to(root).as_posix()} {p.parent.name[-1]}\n" for p in files))
    lists = ["--train-list", str(tmp_path / "train.txt"), "--test-list", str(tmp_path / "val.txt")]
    monkeypatch.chdir(tmp_path)                         # a list lies here or below --data
    data = ltcl.load_dataset("folder", root, "train.txt", "val.txt")
    assert torch.bincount(data.y_train).tolist() == [100, 50] and data.class_names == ["0", "1"]
    (tmp_path / "spaces.txt").write_text("a folder/a picture of it.png  12\n\n")
    assert ltcl.read_list(tmp_path / "spaces.txt", root) == [(str(root / "a folder/a picture of it.png"), 12)]
    argv = [*FOLDER, "--data", str(root), "--net", "resnet8", "--out", str(tmp_path / "run"), *lists]
    whole = (tmp_path / "train.txt").read_text()
    for line, words in (("no-label", "'no-label' is not a path"), ("a.png -1", "'a.png -1'"), ("a.png x", "'a.png x'"), ("a.png", "line 151")):
        (tmp_path / "train.txt").write_text(whole + line + "\n")
        refused(capsys, tmp_path, argv, "train.txt, line 151", words)
    (tmp_path / "train.txt").write_text(whole)
    (tmp_path / "val.txt").write_text((tmp_path / "val.txt").read_text() + "val/class1/0.png 7\n")
    refused(capsys, tmp_path, argv, "test label 7")
    (tmp_path / "val.txt").write_text((tmp_path / "val.txt").read_text().replace(" 7\n", " 1\n"))
    (tmp_path / "train.txt").write_text(whole + "train/missing.png 1\n")
    assert train.main([*argv, "--method", "ce"]) == 0   # one of 151 is missing
    assert "missing.png is no file: left out" in capsys.readouterr().err
    last = (tmp_path / "val.txt").read_text().splitlines()[-1].replace(" 1", " 0") + "\n"       # a wrong label
    (tmp_path / "other.txt").write_text((tmp_path / "val.txt").read_text() + 20 * last)
    titles = []
    for do in (["--resume", "--out"], ["--eval"]):      # a finished run is evaluated on the images that are named now
        capsys.readouterr()
        assert train.main([*do, str(tmp_path / "run"), "--test-list", str(tmp_path / "other.txt")]) == 0
        titles.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  accuracy")))
    old = log_of(tmp_path / "run")[-1]["top1"]
    assert titles[0] == titles[1] and f"{old:.2f}" not in titles[0]
    refused(capsys, tmp_path, [*argv[:-1], "nowhere.txt", "--out", tmp_path / "run3"], "nowhere.txt does not exist", "then in --data")
    (tmp_path / "below.txt").write_text((tmp_path / "val.txt").read_text().replace("val/", "", 2))       # before an epoch is trained
    refused(capsys, tmp_path, [*argv[:-1], "below.txt", "--out", tmp_path / "run3"], "below.txt: 2 of 5 images are no files",
            f"{root}/class0/0.png for one", "--data")
    (tmp_path / "train.txt").write_text(whole.replace(" ", "\t") + "\n\n")
    refused(capsys, tmp_path, [*argv[:-2], "--out", tmp_path / "run4"], "--test-list", "--holdout")
    (tmp_path / "twice.txt").write_text(whole + whole.splitlines()[-1])
    refused(capsys, tmp_path, [*argv[:-3], tmp_path / "twice.txt", "--holdout", "0.1", "--out", tmp_path / "run4"], "twice.txt names an image twice")
    assert train.main([*argv[:-2], "--method", "ce", "--holdout", "0.1", "--out", str(tmp_path / "run4")]) == 0
    assert "135 training images in 2 classes of 90 to 45, 15 test images" in capsys.readouterr().out
    assert train.main([*argv[:-1], "nowhere.txt", "--method", "ce", "--holdout", "0.1", "--out", str(tmp_path / "run5")]) == 0
    assert log_of(tmp_path / "run5")[-1]["top1"] == log_of(tmp_path / "run4")[-1]["top1"]       # the second list plays no part
    refused(capsys, tmp_path, ["--eval", tmp_path / "run4", "--test-list", tmp_path / "val.txt"],      # nor could it there
            "--test-list has no meaning with --eval of a run with --holdout")
    assert train.main(["--eval", str(tmp_path / "run4")]) == 0 and "held-out 0.1 as test set" in capsys.readouterr().out
    refused(capsys, tmp_path, [*FOLDER, "--dataset", "imagenet_lt", "--data", root], "ImageNet_LT_train.txt", "--train-list")


def test_bad_folders(tmp_path, capsys):
    argv = [*FOLDER, "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    refused(capsys, tmp_path, argv, "train does not exist")
    write_tree(tmp_path, n=(3, 3), size=(32, 32))
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "zebra")
    refused(capsys, tmp_path, argv, "train alone has ['class1'], val alone ['zebra']")
    (tmp_path / "val" / "empty").mkdir()
    refused(capsys, tmp_path, argv, f"{tmp_path / 'val'}: Found no valid file for the classes empty")
    (tmp_path / "val" / "empty").rmdir()
    for p in (tmp_path / "train" / "class0").iterdir():
        p.unlink()
    refused(capsys, tmp_path, argv, "class0")
    for content in (b"\xff\xfe\x00", b"a.png 99999999999999999999999\n"):
        (tmp_path / "a.txt").write_bytes(content)
        refused(capsys, tmp_path, [*argv, "--train-list", "a.txt", "--test-list", "a.txt"], "line 1", "not a path and a class number")


def test_presets_are_the_papers_settings():
    c = train.Config.of(dataset="imagenet_lt")
    assert (c.net, c.epochs, c.batch_size, c.lr, c.weight_decay, c.warmup, c.schedule) == ("resnet50", 200, 256, 0.1, 5e-4, 10, "cosine")
    assert (c.ema, c.queue, c.tau, c.alpha, c.patches, c.pbsd, c.curriculum) == (0.999, 65536, 0.07, 0.1, 5, 1.5, "two-stage")
    assert (c.stage2_epochs, c.stage2_batch, c.stage2_lr, c.imb) == (40, 2048, 10, 1)
    assert train.Config.of(dataset="inat18", method="sc").queue == 0
    assert train.Config.of(dataset="inat18", method="ce", curriculum="parabolic").curriculum == "parabolic"    # its second stage left out
    assert train.Config.of(dataset="cifar10", method="psc").tau == 1 and train.Config.of(dataset="cifar100", method="psc").tau == 0.1
    c = train.Config.of(dataset="cifar100")
    assert (c.net, c.epochs, c.batch_size, c.lr, c.momentum, c.weight_decay, c.warmup, c.schedule) == (
        "resnet32", 200, 512, 0.5, 0.9, 1e-4, 5, "step")
    assert (c.imb, c.tau, c.alpha, c.pbsd, c.patches, c.ema, c.queue, c.curriculum, c.classifier, c.box_scale) == (
        100, 0.1, 0.1, 1.5, 5, 0, 0, "parabolic", "auto", "area")
    record = train.Config.of(dataset="cifar10", method="psc", recipe="record")
    assert (record.aug, record.classifier, record.curriculum, record.batch_size, record.schedule, record.lr, record.weight_decay) == (
        "strong", "logit-adjusted", "constant", 256, "cosine", 0.3, 2.5e-4)
    assert record.tau == 0.1 and train.settings_text(record) == "--recipe record"
    assert record.adjust == 1.5 and train.Config.of(dataset="cifar100", recipe="record").adjust == 1
    assert train.settings_text(train.Config.of(dataset="cifar10", recipe="record", pbsd=0, adjust=1)) == "--pbsd 0 --adjust 1 --recipe record"
    on_val = train.Config.of(dataset="imagenet_lt", test_list="ImageNet_LT_val.txt")        # its row is another's
    assert train.settings_text(on_val) == "--test-list ImageNet_LT_val.txt"
    assert train.settings_text(train.Config.of(dataset="imagenet_lt", data="elsewhere")) == ""


# --- nothing lost: stopping, killing and going on ------------------------------------------------

def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


def same_run(a, b):
    """Do two finished runs agree in all but their folder and their clock?"""
    states = [torch.load(out / "last.pt", weights_only=True) for out in (a, b)]
    logs = [log_of(out) for out in (a, b)]
    for state, log in zip(states, logs):
        state["config"]["out"] = ""
        for record in [*log, *state["log"]]:
            record["seconds"] = 0
    assert [r["epoch"] for r in logs[0]] == list(range(1, len(logs[0]) + 1))
    return logs[0] == logs[1] and states_equal(*states)


def interrupt(monkeypatch, at, number=signal.SIGINT):
    """Send a signal in the middle of the steps in at, counted over all runs."""
    step, count = ltcl.Trainer.step, iter(range(10 ** 6))

    def stepping(*args):
        if next(count) in at:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(ltcl.Trainer, "step", stepping)


@pytest.mark.parametrize("flags", [["--method", "ce", "--average", "0.9", "--save-every", "5"], ["--queue", "12", "--ema", "0.9"], ["--method", "psc", "--experts", "2", "--amp", "fp16"],
                                   ["--curriculum", "two-stage", "--stage2-epochs", "2", "--stage2-batch", "8"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_is_bit_identical(flags, number, tiny, tmp_path, monkeypatch, capsys):
    argv, out = [*tiny, *flags, "--epochs", "3", "--batch-size", "5"], tmp_path / "stopped"     # 4 steps an epoch
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    interrupt(monkeypatch, {1, 3, 8}, number)           # within an epoch, in its last step, in another epoch
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    assert train.main([*argv, "--out", str(out)]) == 128 + number
    for where in ((0, 2), (1, 0), (2, 1)):
        state = torch.load(out / "last.pt", weights_only=True)
        assert (state["epoch"], len(state["history"])) == where
        command = capsys.readouterr().err.splitlines()[-1].partition("to go on: ")[2].split()
        assert command == ["python", "train.py", "--resume", "--out", str(out)]
        status = train.main(command[2:])
    assert status == 0 and same_run(out, tmp_path / "whole")
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert train.main(command[2:]) == 0 and same_run(out, tmp_path / "whole")       # nothing is left to do


def test_saved_every_other_epoch_and_on_long_ones(tiny, tmp_path, monkeypatch, capsys):
    saved, write = [], ltcl.write_whole
    monkeypatch.setattr(ltcl, "write_whole", lambda path, content: saved.append(path.name) or write(path, content))
    argv = [*tiny, "--method", "ce", "--epochs", "5", "--save-every", "2"]
    assert train.main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert [name for name in saved if name in ("log.jsonl", "last.pt")] == 4 * ["last.pt", "log.jsonl"]     # at the start, epochs 2, 4, 5
    saved.clear()
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)       # two steps an epoch: a save between them
    assert train.main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert saved.count("last.pt") == 1 + 5 + 3 and same_run(tmp_path / "a", tmp_path / "b")
    assert "epoch   2/5  step 1/2  saved" in capsys.readouterr().out        # where no terminal shows the live line


def test_a_full_disk(tiny, tmp_path, monkeypatch, capsys):
    argv, out = [*tiny, "--epochs", "4"], tmp_path / "run"
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    write, saves = os.fsync, []

    def full(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith("last.pt.part"):
            saves.append(number)
            if len(saves) == 4:                         # the first is at the start
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(number)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert train.main([*argv, "--out", str(out)]) == 2
    _, line = capsys.readouterr().err.splitlines()      # after the warning that so few steps are too few
    assert "last.pt could not be written (No space left on device)" in line
    with pytest.raises(ltcl.InputError, match="last.pt could not be written"):
        ltcl.write_whole(tmp_path / "nowhere" / "last.pt", b"")
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 2 and not list(out.glob("*.part"))
    assert train.main(["--resume", "--out", str(out)]) == 0 and same_run(out, tmp_path / "whole")


KILLER = """
import os, random, signal, sys, threading, time
sys.path.insert(0, {here!r})
import ltcl, train
random.seed({seed})
write = os.fsync, os.replace
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def maybe(real, chance):
    return lambda *args: die() if random.random() < chance and "last.pt" in str(args) + where[0] else real(*args)
where = [""]
whole = ltcl.write_whole
def write_whole(path, content):
    where[0] = path.name
    if path.name == "last.pt" and random.random() < {chance}:
        with open(str(path) + ".part", "wb") as file:
            file.write(content[:random.randrange(len(content))])
        die()
    whole(path, content)
ltcl.write_whole = write_whole
os.fsync, os.replace = maybe(os.fsync, {chance}), maybe(os.replace, {chance})
timer = threading.Timer(random.uniform(0, {wait}), die)
timer.daemon = True  # or a finished run would wait for it
timer.start()
sys.exit(train.main(sys.argv[1:]))
"""


def test_kill(tiny, tmp_path):
    """kill -9, at any moment and within a save, as often as LTCL_KILLS says; then the run ends as if nothing had been."""
    kills = int(os.environ.get("LTCL_KILLS", 3))
    argv = [*tiny, "--queue", "12", "--ema", "0.9", "--epochs", str(max(30, 6 * kills))]
    assert train.main([*argv, "--quiet", "--out", str(tmp_path / "whole")]) == 0
    seconds = sum(epoch["seconds"] for epoch in log_of(tmp_path / "whole"))
    out, died, seed, epochs = tmp_path / "killed", 0, 0, []
    while died < kills:
        seed += 1
        assert seed < 20 * kills, "hardly any run is killed"
        chance = (0.0, 0.04)[seed % 2]                  # half of them anywhere, half of them within a save
        script = KILLER.format(here=str(HERE), seed=seed, wait=(2 * seconds / kills + 5, 1e6)[seed % 2], chance=chance)
        run = subprocess.run([sys.executable, "-c", script, *argv, "--resume", "--out", str(out)], capture_output=True, text=True)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        epochs.append(torch.load(out / "last.pt", weights_only=True)["epoch"] if (out / "last.pt").exists() else 0)
        if run.returncode == 0 and died < kills:        # it got through: from the beginning, to be killed again
            assert same_run(out, tmp_path / "whole")
            shutil.rmtree(out)
        died += run.returncode != 0
    assert train.main([*argv, "--resume", "--out", str(out)]) == 0
    assert same_run(out, tmp_path / "whole")
    print(f"survived {died} kills, after epochs {epochs}")


def test_a_second_ctrl_c_leaves_at_once(tiny, tmp_path):
    script = (f"import sys, time; sys.path.insert(0, {str(HERE)!r}); import ltcl, train\n"
              "ltcl.Trainer.step = lambda *_: (print('stepping', flush=True), time.sleep(60))\nsys.exit(train.main(sys.argv[1:]))")
    run = start([sys.executable, "-c", script, *tiny, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True)
    while "stepping" not in (line := run.stdout.readline()):
        assert line, "it ended before its first step"
    run.send_signal(signal.SIGINT)
    while "once more ends at once" not in (line := run.stderr.readline()):
        assert line, "it ended at the first"
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == -signal.SIGINT


class Unread(io.StringIO):
    """An output whose reader is gone as soon as a signal was met, or at once."""

    def __init__(self, at_once=False):
        super().__init__()
        self.at_once = at_once

    def write(self, text):
        if self.at_once or signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            raise BrokenPipeError
        return super().write(text)


@pytest.mark.parametrize("at", [0, 1])                  # within an epoch, in its last step
def test_ctrl_c_ends_the_outputs_reader_too(at, tiny, tmp_path, monkeypatch, capsys):        # as in `| tee log`
    interrupt(monkeypatch, {at})
    monkeypatch.setattr(sys, "stdout", Unread())
    assert train.main([*tiny, "--epochs", "2", "--out", str(tmp_path / "run")]) == 130
    assert "stopped, all is saved" in capsys.readouterr().err


def test_a_reader_that_has_enough(monkeypatch, capsys):     # as head
    monkeypatch.setattr(sys, "stdout", Unread(at_once=True))
    assert train.main(["--tables", str(HERE / "data" / "results.csv")]) == 141 and capsys.readouterr().err == ""


def test_ctrl_c_where_nothing_is_trained(monkeypatch, capsys):
    def interrupted(*_):                                # a signal might be ignored, as in a shell's background
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_all", interrupted)
    assert train.main([]) == 130 and capsys.readouterr().err == "stopped while no training was under way\n"


def test_resume_with_other_settings(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    interrupt(monkeypatch, {2})                         # after 3 of 6 steps
    assert train.main([*tiny, "--epochs", "3", "--seed", "4", "--out", str(out)]) == 130
    resume = ["--resume", "--out", out]
    for flags, words in ((["--lr", "0.3"], ["--lr is 0.3", "0.05"]), (["--seed", "5"], ["--seed is 5"]), (["--net", "resnet20"], ["--net"]),
                         (["--batch-size", "4"], ["--batch-size is 4"]), (["--method", "sc"], ["--method is 'sc'", "'dscl'"]),
                         (["--dataset", "shapes"], ["--dataset"]), (["--epochs", "1"], ["--epochs 1", "another learning rate"]),
                         (["--epochs", "30"], ["--epochs 30"]), (["--stage2-epochs", "9"], ["--stage2-epochs", "parabolic"])):
        refused(capsys, tmp_path, [*resume, *flags], *words)
    write_npz(tmp_path / "tiny.npz", **arrays(n=(11, 6, 3)))
    refused(capsys, tmp_path, resume, "training images are not those")
    write_npz(tmp_path / "tiny.npz")
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["elapsed"] > 0
    torch.save(state | dict(elapsed=1000.0), out / "last.pt")
    results = tmp_path / "results.csv"
    assert train.main([*map(str, resume), "--lr", "0.05", "--eval-every", "2", "--amp", "fp16",        # given again; no matter; rounding
                       "--results", str(results)]) == 0
    taken = [epoch["seconds"] for epoch in log_of(out)]
    assert taken[1] > 1000 > taken[2]                   # with those before the stop
    assert train.read_results(results)[0][10] == f"{sum(taken):.0f}"
    assert "note: --amp goes from auto to fp16: the numbers may differ" in capsys.readouterr().err
    assert train.main(["--eval", str(out), "--amp", "off"]) == 0
    monkeypatch.setattr(train, "RANKS", 2)
    refused(capsys, tmp_path, ["--eval", out], "one process")
    refused(capsys, tmp_path, ["--resume"], "--out")
    refused(capsys, tmp_path, ["--resume", "--eval", out, "--out", out], "--eval: not allowed with argument --resume")


def test_a_longer_run_where_the_schedule_allows_it(tiny, tmp_path, capsys):
    argv = [*tiny, "--method", "ce", "--warmup", "0"]
    assert train.main([*argv, "--epochs", "20", "--out", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, {8})
        assert train.main([*argv, "--epochs", "10", "--out", str(tmp_path / "run")]) == 130     # in epoch 5, before the first drop
    capsys.readouterr()
    refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run", "--epochs", "20", "--momentum", "0.8"], "--momentum is 0.8")
    refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run", "--curriculum", "linear"], "--curriculum has no meaning with --method ce")
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--epochs", "20"]) == 0
    shown = capsys.readouterr()
    assert "note: --epochs goes from 10 to 20" in shown.err and "; 4 of 20 epochs are done\n" in shown.out
    assert same_run(tmp_path / "run", tmp_path / "whole")
    refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run", "--epochs", "40"], "--epochs 40", "start a new run")
    for curriculum in ("constant", "parabolic"):        # whose contrast weight depends on --epochs
        a, b = (train.course(train.Config.of(method="sc", warmup=0, curriculum=curriculum, epochs=n), 5) for n in (10, 20))
        assert (a == b) == (curriculum == "constant")


def test_resume_where_nothing_is_saved(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*tiny, "--resume", "--out", str(out)]) == 0      # so that one command can be repeated
    (out / "last.pt").unlink()
    refused(capsys, tmp_path, ["--resume", "--out", out], "log.jsonl", "without its last.pt")
    refused(capsys, tmp_path, [*tiny, "--out", out], "log.jsonl", "without its last.pt")        # and not: resume it
    refused(capsys, tmp_path, [*tiny, "--resume", "--out", out], "log.jsonl")   # and would be overwritten


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    path = write_npz(folder / "tiny.npz", **arrays(n=(120, 60, 10), size=32), class_names=np.array(["dark", "grey", "bright"]))
    assert train.main(["--dataset", path, *TINY, "--epochs", "3", "--method", "ce", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_views_are_piled_from_head_to_tail(tmp_path):
    config = train.Config.of(dataset="t.npz", net="resnet8", batch_size=8, device="cpu")
    train.save_views(ltcl.Trainer(config, tiny_data(n=(10, 120, 60))), tmp_path / "views.png")
    tiles = ltcl.read_picture(tmp_path / "views.png")[0, 4:, 4:].unfold(0, 64, 68).unfold(1, 64, 68)       # [rows,classes,64,64]
    assert (tiles < 255).flatten(2).any(2).sum(0).tolist() == [8 + 3, 4 + 3, 1 + 3]         # and three views
    assert [round(level / 30) for level in tiles[7].float().mean((1, 2)).tolist()] == [3, 5, 1]        # each of its own class


class Code:
    def __reduce__(self):                               # what a pickle may do
        return sys.exit, ("code in a checkpoint was run",)


@pytest.mark.parametrize("make, words", [
    (lambda whole: whole[:len(whole) // 2], ["damaged"]),
    (lambda whole: whole[:-1], ["damaged"]),
    (lambda whole: b"", ["damaged"]),
    (lambda whole: b"hello", ["damaged"]),
    (lambda whole: saved([1, 2]), ["no checkpoint of this program"]),
    (lambda whole: saved(dict(net={}, epoch=3)), ["no checkpoint of this program"]),
    (lambda whole: saved(torch.nn.Linear(2, 2)), ["no checkpoint of this program"]),
    (lambda whole: saved(Code()), ["no checkpoint of this program"]),
    (lambda whole: changed(whole, config=dict(net="vgg")), ["don't fit", "settings"]),
    (lambda whole: changed(whole, config=dict(net="resnet8", colour="red")), ["don't fit", "settings"]),
    (lambda whole: changed(whole, net={}), ["fit"]),
])
def test_bad_checkpoints(make, words, a_run, tmp_path, capsys):
    path = tmp_path / "last.pt"
    path.write_bytes(make((a_run / "last.pt").read_bytes()))
    write_picture(tmp_path / "a.png")
    for argv in (["--eval", path], ["--predict", path, tmp_path / "a.png"], ["--resume", "--out", tmp_path]):
        line = refused(capsys, tmp_path, argv)
        assert any(word in line for word in words), line


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def changed(whole, **changes):
    return saved(torch.load(io.BytesIO(whole), weights_only=True) | changes)


# --- several processes -----------------------------------------------------------------------------

def on_each_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name, (net, loss, x) in gradient_cases().items():
        part = [t.chunk(2)[rank] for t in x]
        net = torch.nn.parallel.DistributedDataParallel(net)
        loss(net(part[0]).chunk(2, 1), net.module.prototypes, ltcl.gather(part[1]), ltcl.gather).backward()
        results[name] = {key: p.grad for key, p in net.module.named_parameters()}
    results["trainer"] = trainer_gradients(setattr)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class Embedder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.prototypes = torch.nn.Linear(6, 8, dtype=torch.float64), torch.nn.Parameter(unit(4, 4, seed=9))

    def forward(self, x):                               # [n,6] -> two views [n,8]; prototypes in use in every case
        return F.normalize(self.layer(x).view(-1, 2, 4), dim=2).flatten(1) + 0 * self.prototypes.sum()


def gradient_cases():
    x, y, queue = unit(12, 6, seed=5), torch.tensor([0, 1, 2, 0, 0, 3, 1, 1, 2, 0, 3, 3]), unit(5, 4, seed=6)

    def both(views, gather):
        return (gather(v) for v in views)

    def sc(views, p, y, gather):
        return ltcl.sc_loss(torch.cat([*both(views, gather)]), torch.cat([y, y]))

    def psc(views, p, y, gather):
        return ltcl.psc_loss(torch.cat([*both(views, gather)]), torch.cat([y, y]), p)

    def dscl(views, p, y, gather):
        return ltcl.dscl_loss(*both(views, gather), y, queue, torch.arange(5))

    def pbsd(views, p, y, gather):
        q, k = views
        return ltcl.pbsd_loss(q[:, None].roll(1, 2), q[:, None], torch.cat([gather(k).detach(), queue]))

    return {loss.__name__: (Embedder(), loss, (x, y)) for loss in (sc, psc, dscl, pbsd)}


def trainer_gradients(patch):
    """Of a whole step on images that don't change, each of several processes with its part of them."""
    patch(ltcl, "AUGMENTATIONS", {"crop": (lambda x, rng, size: x / 255,) * 4})
    trainer = tiny_trainer(pbsd=0.0, curriculum="constant")
    trainer.net.eval()                                  # BatchNorm sees a process's own part
    rows = torch.arange(16).view(2, 8).chunk(trainer.ranks, 1)[trainer.rank].flatten()
    x, y = trainer.x[rows], trainer.y[rows]             # for contrast, then for the classifier
    (x, x_ce), (y, y_ce) = x.chunk(2), y.chunk(2)
    (trainer.parallel or trainer.losses)(x, y, x_ce, y_ce)[0]["loss"].backward()
    return {key: p.grad for key, p in trainer.net.named_parameters() if p.grad is not None}


def test_gradients_of_two_processes_are_those_of_one(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(on_each_rank, (str(tmp_path),), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, (net, loss, (x, y)) in gradient_cases().items():
        loss(net(x).chunk(2, 1), net.prototypes, y, lambda t: t).backward()
        for key, p in net.named_parameters():
            assert name != "psc" or p.grad.abs().max() > 0
            for rank in ranks:                          # a millionth is asked for
                torch.testing.assert_close(rank[name][key], p.grad, rtol=0, atol=1e-12)
    alone = trainer_gradients(monkeypatch.setattr)
    assert {"early.0.weight", "experts.0.head.0.weight", "experts.0.classifier.weight"} < alone.keys()
    for rank in ranks:
        torch.testing.assert_close(rank["trainer"], alone, rtol=1e-3, atol=1e-5)


def test_the_batches_of_two_processes_are_those_of_one(monkeypatch):
    trainer, plans = tiny_trainer(method="sc"), []
    for trainer.rank, trainer.ranks in ((0, 1), (0, 2), (1, 2)):
        trainer.reseed(0)
        plans.append(trainer.batches(8, 2).view(2, 2, -1))                  # [steps, branch, n]
    assert torch.equal(plans[0], torch.cat(plans[1:], 2))
    draws = []
    for place in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)):    # epoch, step, process
        trainer.reseed(*place)
        draws.append(torch.rand(1, generator=trainer.rng).item())
    assert len(set(draws)) == 4 and draws[0] == draws[4]
    trainer.config.seed = 1
    trainer.reseed(0, 1, 0)
    assert torch.rand(1, generator=trainer.rng).item() not in draws
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(2))           # the other process has the same
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    places, reseed = [], trainer.reseed
    trainer.reseed = lambda *place: places.append(place) or reseed(*place)
    for epoch, (trainer.rank, trainer.ranks) in enumerate([(0, 1), (1, 2)]):
        places.clear()
        trainer.train_epoch()
        assert places == [(epoch,), (epoch, 1, trainer.rank), (epoch, 2, trainer.rank)]
    trainer.ranks, trainer.history = 2, [torch.arange(3.0)]
    trainer.agree()
    assert trainer.history[0].tolist() == [0, 1, 2]


def test_a_batch_that_two_processes_cannot_share(monkeypatch):
    for name, value in dict(is_initialized=True, get_rank=0, get_world_size=2).items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    for settings in (dict(batch_size=7), dict(curriculum="two-stage", stage2_batch=7)):
        with pytest.raises(ltcl.InputError, match="7 can't be shared by 2 processes"):
            tiny_trainer(**settings)
    with pytest.raises(ltcl.InputError, match="two images per process"):
        tiny_trainer(batch_size=2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ltcl.InputError, match="--batch-size 8"):
        tiny_trainer()
    unused = []
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel",
                        lambda *_, find_unused_parameters: unused.append(find_unused_parameters) or torch.nn.Module())
    assert tiny_trainer(batch_size=9).ranks == 3        # the unused second stage's 128 is no obstacle
    tiny_trainer(batch_size=9, curriculum="two-stage", stage2_batch=9)
    assert unused == [False, True]                      # a stage leaves weights without a gradient


def two_processes(argv, script=None, **more):
    """train.py as torchrun starts it, by hand so that one of the two can be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    program = ["-c", script] if script else [str(HERE / "train.py")]
    return [start([sys.executable, *program, *map(str, argv)], env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more) for rank in (0, 1)]


def test_two_processes_end_with_the_same_weights(tiny, tmp_path):
    argv = [*tiny, "--queue", "10", "--ema", "0.9", "--average", "0.9", "--epochs", "3", "--results", tmp_path / "results.csv"]
    script = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import torch, train\n"
              "end = train.print_result\n"
              f"train.print_result = lambda t, s: (torch.save(t.state_dict(), f'{tmp_path}/{{t.rank}}.pt'), end(t, s))\n"
              "sys.exit(train.main(sys.argv[1:]))")
    (out, err), (out1, err1) = [run.communicate(timeout=300) for run in two_processes([*argv, "--out", tmp_path / "run"], script)]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert "epoch   3/3" in out and out1 == "" and "broadcast_buffers" not in err + err1, (err, err1)    # torch 2.14's warning
    assert all(states_equal(a[key], b[key]) for key in ("net", "averaged", "queue", "queue_y", "optimizers", "evaluated"))
    assert (a["queue_y"] >= 0).all() and a["ranks"] == 2 and a["epoch"] == 3
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "last.pt", "log.jsonl", "views.png"]
    log = log_of(tmp_path / "run")
    row, = train.read_results(tmp_path / "results.csv")
    assert row[11].startswith("2 x ")
    assert [r["epoch"] for r in log] == [1, 2, 3] and all(math.isfinite(r[name]) for r in log for name in ("loss", "loss_pbsd", "spread"))


def test_two_processes_need_a_device_each(tiny, tmp_path):
    for run in two_processes([*tiny, "--device", "cuda:0", "--out", tmp_path / "run"]):
        err = run.communicate(timeout=300)[1]
        assert run.returncode == 2 and err.count("\n") == 1 and "--device cuda:0" in err and "its own GPU" in err


def until_epoch(run, epoch):
    while f"epoch {epoch:3}/" not in (line := run.stdout.readline()):
        assert line, run.stderr.read()


def test_two_processes_stop_go_on_and_end_together(tiny, tmp_path):
    out = tmp_path / "run"
    runs = two_processes([*tiny, "--epochs", "100000", "--timeout", "120", "--out", out])
    until_epoch(runs[0], 2)
    runs[1].send_signal(signal.SIGTERM)                 # one of them alone
    for run in runs:
        err = run.communicate(timeout=300)[1]
        assert run.returncode == 128 + signal.SIGTERM, err
        assert ("torchrun --nproc_per_node=2 train.py --resume --out" in err) == (run is runs[0])
    begun = torch.load(out / "last.pt", weights_only=True)["epoch"]
    assert begun >= 2
    runs = two_processes(["--resume", "--out", out])
    until_epoch(runs[0], begun + 2)
    runs[1].kill()
    err = runs[0].communicate(timeout=300)[1]
    assert runs[0].returncode == 1 and "another process of the run ended" in err.splitlines()[-1], err
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] > begun
    runs[1].communicate()


# --- using what was trained --------------------------------------------------------------------------

def write_picture(path, level=180, size=(50, 40), mode="RGB", **how):
    pixels = np.full((size[1], size[0], 3), level, np.uint8) + np.random.RandomState(0).randint(30, size=(size[1], size[0], 1), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **how)
    return str(path)


def test_eval(a_run, tmp_path, capsys):
    last = log_of(a_run)[-1]
    for run in (a_run, a_run / "last.pt"):
        capsys.readouterr()
        assert train.main(["--eval", str(run), "--per-class", "--workers", "0"]) == 0
        shown = capsys.readouterr().out
        table = [line.split() for line in shown.splitlines()]
        assert ["accuracy", "%", *(f"{last[name]:.2f}" for name in ("top1", "many", "medium", "few"))] in table
        accuracies = [float(row[1]) for row in table[-3:]]
        assert [row[0::2] for row in table[-3:]] == [["120", "dark"], ["60", "grey"], ["10", "bright"]]
        assert accuracies == pytest.approx(torch.load(a_run / "last.pt", weights_only=True)["evaluated"]["by_class"], abs=0.01)
    refused(capsys, tmp_path, ["--eval", tmp_path], "last.pt does not exist")
    refused(capsys, tmp_path, ["--eval", a_run, "--data", tmp_path], "--data has no meaning with --dataset")

    def locked(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:         # a colleague's run, which is not damaged
        patch.setattr(torch, "load", locked)
        refused(capsys, tmp_path, ["--eval", a_run], "Permission denied", "last.pt")

    refused(capsys, tmp_path, ["--eval", a_run, "--lr", "1"], "--lr")
    refused(capsys, tmp_path, ["--eval", a_run, "--dataset", tmp_path / "no.npz"], "no.npz")
    refused(capsys, tmp_path, ["--per-class"], "--eval")


def test_predict_takes_every_picture(a_run, tmp_path, capsys):
    pictures = [write_picture(tmp_path / f"{i}.{ext}", mode=mode, **how) for i, (ext, mode, how) in enumerate((
        ("png", "RGB", {}), ("jpg", "L", {}), ("png", "P", {}), ("png", "RGBA", {}), ("webp", "RGB", {}), ("png", "1", {}), ("gif", "P", {}),
        ("jpg", "CMYK", {}), ("png", "RGB", dict(size=(3, 70))), ("png", "RGB", dict(size=(1, 1)))))]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert train.main(["--predict", str(a_run), *pictures[:3], str(tmp_path / "bad.png"), "missing.png", *pictures[3:]]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == pictures
    assert shown.err.splitlines() == [f"warning: {tmp_path / 'bad.png'} is not a readable image: skipped", "warning: missing.png is no file: skipped"]
    net = ltcl.load(a_run, "cpu")
    likeliest = {path: net.class_names[net(net.preprocess(path)[None]).argmax()] for path in pictures}
    for line in lines:
        percents = [float(word) for word in line.split(": ")[1].split() if word[0].isdigit()]
        assert line.split(": ")[1].split()[0] == likeliest[line.split(": ")[0]]
        assert len(percents) == 3 and sum(percents) == pytest.approx(100, abs=0.2) and percents == sorted(percents, reverse=True)
    data = tiny_data(n=(4,) * 7)
    data.class_names = list("abcdefg")
    torch.save(ltcl.Trainer(train.Config.of(dataset="t.npz", net="resnet8", batch_size=8, device="cpu"), data).state_dict(), tmp_path / "7.pt")
    assert train.main(["--predict", str(tmp_path / "7.pt"), pictures[0]]) == 0
    assert capsys.readouterr().out.count(" %") == 5     # of seven classes the likeliest
    refused(capsys, tmp_path, ["--predict", a_run], "image files")
    refused(capsys, tmp_path, ["--predict", a_run, pictures[0], "--seed", "1"], "--seed")
    assert train.main(["--predict", str(a_run), str(tmp_path / "bad.png")]) == 2


def test_pictures_are_turned_and_transparent_ones_put_on_white(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6                                    # taken with the camera on its side
    Image.fromarray(pixels).save(tmp_path / "side.png", exif=exif)
    for damaged in (False, True):                       # a tag that PIL reads, but can't write again
        with pytest.MonkeyPatch.context() as patch:
            if damaged:
                patch.setattr(Image.Exif, "tobytes", lambda self, offset=8: struct.pack("<H", None))
            x = ltcl.read_picture(tmp_path / "side.png")
            assert x.shape == (3, 6, 4) and (x[:, :3] == 255).all() and (x[:, 3:] == 0).all()
            with Image.open(tmp_path / "side.png") as picture:
                assert (ltcl.read_picture(picture) == x).all() and picture.size == (6, 4)   # the user's own stays as it is
    (tmp_path / "cut.png").write_bytes((tmp_path / "side.png").read_bytes()[:-30])
    with pytest.raises(OSError):
        ltcl.read_picture(tmp_path / "cut.png")
    alpha = np.dstack([pixels * 0, np.where(pixels[..., :1] == 255, 0, 255)]).astype(np.uint8)
    Image.fromarray(alpha, "RGBA").save(tmp_path / "alpha.png")
    x = ltcl.read_picture(tmp_path / "alpha.png")
    assert (x[:, :, :3] == 255).all() and (x[:, :, 3:] == 0).all()
    Image.fromarray(pixels[..., 0]).convert("P").save(tmp_path / "palette.png", transparency=0)
    assert (ltcl.read_picture(tmp_path / "palette.png") == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255, 0, 255], "RGBA")          # a red that can't be seen, and green
    palette.putpixel((1, 0), 1)
    assert ltcl.read_picture(palette).tolist() == [[[255, 0]], [[255, 255]], [[255, 0]]]
    Image.fromarray((pixels[..., 0].astype(np.uint16) * 128)).save(tmp_path / "deep.png")
    assert ltcl.read_picture(tmp_path / "deep.png").unique().tolist() == [0, 127]
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "steps.png")
    assert ltcl.read_picture(tmp_path / "steps.png")[0].tolist() == [[0, 0, 1, 255]]
    Image.fromarray((pixels[..., 0].astype(np.uint16))).save(tmp_path / "dark.png")     # 255 of 65,535
    assert ltcl.read_picture(tmp_path / "dark.png").max() == 0
    (tmp_path / "steps.pgm").write_bytes(b"P5 3 1 65535\n" + np.array([0, 100, 255], ">u2").tobytes())
    for picture in (tmp_path / "steps.pgm", Image.open(tmp_path / "steps.pgm")):        # as dark, in another format
        assert ltcl.read_picture(picture)[0].tolist() == [[0, 0, 0]]
    Image.frombytes("I;16B", (6, 4), (pixels[..., 0].astype(np.uint16) * 128).astype(">u2").tobytes()).save(tmp_path / "big.tiff")
    assert ltcl.read_picture(tmp_path / "big.tiff").unique().tolist() == [0, 127]
    for most, grey in ((1, 1), (255, 255), (256, 1)):   # 32 bits: up to 255 as they are
        Image.fromarray(pixels[..., 0].astype(np.int32) * most // 255).save(tmp_path / "wide.tiff")
        assert ltcl.read_picture(tmp_path / "wide.tiff").unique().tolist() == [0, grey]
    for most, grey in ((255, 255), (510, 127), (2, 127), (127.5, 2)):       # white is 1.0, or there is none; white is 255
        Image.fromarray(pixels[..., 0].astype(np.float32) / most).save(tmp_path / "float.tiff")
        assert ltcl.read_picture(tmp_path / "float.tiff").unique().tolist() == [0, grey]


def test_load(a_run, tmp_path):
    net = ltcl.load(a_run, device="cpu")
    assert not net.training and net.class_names == ["dark", "grey", "bright"] and net.counts == [120, 60, 10]
    path = write_picture(tmp_path / "a.png", level=100, size=(32, 32))
    x = net.preprocess(path)
    assert torch.equal(x, net.preprocess(Image.open(path)))
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and 0.39 < x.min() < x.max() < 0.51
    data = ltcl.load_dataset(str(a_run.parent / "tiny.npz"))
    with torch.inference_mode():
        right = (net(data.x_test / 255).argmax(1) == data.y_test).double().mean()
    assert 100 * right == pytest.approx(log_of(a_run)[-1]["top1"])
    trained = ltcl.Trainer(train.saved(a_run)[1], data).net             # in Python, before it is saved
    assert torch.equal(trained.preprocess(path), x)
    assert (trained.class_names, trained.counts) == (net.class_names, net.counts)


def test_a_folders_run_evaluates_and_predicts(tmp_path, capfd, monkeypatch):
    sizes, forward = set(), ltcl.Hybrid.forward
    monkeypatch.setattr(ltcl.Hybrid, "forward", lambda net, x: sizes.add((*x.shape[2:],)) or forward(net, x))
    write_tree(tmp_path / "data", n=(6, 4), modes=("RGB",))
    argv = [*FOLDER, "--net", "resnet8", "--method", "ce", "--data", tmp_path / "data", "--out", tmp_path / "run"]
    assert train.main([str(a) for a in argv]) == 0
    picture = sorted((tmp_path / "data" / "val").rglob("*.png"))[0]
    assert train.main(["--eval", str(tmp_path / "run")]) == 0
    assert train.main(["--predict", str(tmp_path / "run"), str(picture)]) == 0
    assert sizes == {(64, 64)}                          # of those that were read at 73 x 73
    net = ltcl.load(tmp_path / "run", "cpu")
    x, _ = ltcl.ImageFiles([str(picture)], net.stored)[0]
    torch.testing.assert_close(net.preprocess(picture), torchvision.transforms.functional.center_crop(x, 64) / 255)


def test_preprocess_gives_a_picture_the_shape_of_the_training_images(tmp_path):
    net = ltcl.Hybrid("resnet8", 2, torch.zeros(3), torch.ones(3))
    net.stored = net.size = [24, 32]
    x = torch.randint(256, (3, 24, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "same.png")
    assert torch.equal(net.preprocess(tmp_path / "same.png"), x / 255)
    assert net.preprocess(write_picture(tmp_path / "other.png", size=(90, 40))).shape == (3, 24, 32)


def test_a_run_of_a_hundred_steps_warns_of_nothing(tiny, tmp_path, capsys):
    run = train.Run(train.Config.of(dataset=tiny[1], net="resnet8", batch_size=8, epochs=50, device="cpu", out=str(tmp_path / "run")), None)
    assert capsys.readouterr().err == "" and run.left(0.5, 30) == "49.5 min left"
    run.log, run.trainer.epoch = [dict(seconds=60)] * 10, 10
    assert run.left() == "40.0 min left"
    run.log, run.trainer.epoch = [dict(seconds=1)] * 10 + [dict(seconds=60)] * 10, 20       # the last ten count
    assert run.left() == "30.0 min left" and run.left(0.5, 30) == "29.5 min left"


def test_quiet(tiny, tmp_path, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(train, "keep_memory", lambda: kept.append(True))
    assert train.main([*tiny, "--quiet", "--out", str(tmp_path / "run")]) == 0 and kept     # as on every CPU
    shown = capsys.readouterr()
    assert "epoch " not in shown.out and "accuracy %" in shown.out and shown.err.count("\n") == 1    # a warning


def test_report(a_run, tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "other"
    assert train.main([*tiny, "--curriculum", "two-stage", "--stage2-epochs", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.axes import Axes
        bar, heights, whole = Axes.bar, [], (out / "last.pt").read_bytes()
        plot, curves = Axes.plot, []
        monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: curves.append((how["label"], x, y)) or plot(axes, x, y, **how))
        monkeypatch.setattr(Axes, "bar", lambda axes, x, height, **how: heights.append(height) or bar(axes, x, height, **how))
        (out / "last.pt").write_bytes(changed(whole, counts=[6, 3, 12], evaluated=dict(by_class=[20.0, 10, 30])))
        assert train.main(["--report", str(out), str(a_run)]) == 0
        assert heights[0] == [30, 20, 10]               # from the largest class to the smallest
        for run in (out, a_run):
            for label, name in (("loss", "loss"), ("contrast", "loss_contrast"), ("contrast weight", "contrast_weight"), ("few", "few")):
                log = [row for row in log_of(run) if row[name] is not None]
                assert (label, [row["epoch"] for row in log], [row[name] for row in log]) in curves
        assert len(curves) == 2 * 9
        (out / "last.pt").write_bytes(whole)
        assert str(out / "report.png") in capsys.readouterr().out and (out / "report.png").stat().st_size > 10000
        odd = shutil.copytree(a_run, tmp_path / os.fsdecode(b"caf\xe9"))       # not UTF-8
        assert train.main(["--report", str(out), str(odd)]) == 0
        refused(capsys, tmp_path, ["--report", out / "last.pt"], "folder")
        (out / "last.pt").write_bytes(changed((out / "last.pt").read_bytes(), log=[]))
        refused(capsys, tmp_path, ["--report", out], "no epoch")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(capsys, tmp_path, ["--report", out], "pip install matplotlib")


# --- results: seeds, rows, tables -------------------------------------------------------------------

def test_seeds_and_results(tiny, tmp_path, capsys, monkeypatch):
    results, argv = tmp_path / "results.csv", [*tiny, "--method", "sc", "--quiet", "--out", str(tmp_path / "run"), "--results", str(tmp_path / "results.csv")]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, {5})                           # in the second seed
        assert train.main([*argv, "--seeds", "0", "1"]) == 130
    assert "to go on: repeat the command" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, {1})
        assert train.main([*argv[:-3], str(tmp_path / "alone"), *argv[-2:], "--seed", "9"]) == 130
    assert capsys.readouterr().err.endswith(f"--out {tmp_path / 'alone'} --results {results}\n")
    assert len(results.read_text().splitlines()) == 2
    capsys.readouterr()
    assert train.main([*argv, "--seeds", "0", "1", "2"]) == 0
    shown = capsys.readouterr()
    assert "seed 0:" in shown.err and "it already" in shown.err and "seeds 0, 1, 2: mean ± standard deviation of top-1" in shown.out
    with open(results, newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == train.COLUMNS and [row[4] for row in rows] == ["0", "1", "2"]
    assert rows[0][1:4] == ["1", "sc", "--net resnet8 --batch-size 8 --lr 0.05"]
    last = log_of(tmp_path / "run-seed1")[-1]
    assert rows[1][6] == f"{last['top1']:.2f}" and rows[1][7] == "" and rows[1][9] == f"{last['few']:.2f}"
    head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout if shutil.which("git") else ""
    commit = rows[0][12]
    assert head.startswith(commit) and bool(commit) == bool(head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        trainer = tiny_trainer()
        trainer.evaluated = dict(top1=50.0, many=60.0, medium=None, few=20.0)
        named = dict(zip(train.COLUMNS, train.result_row(trainer, 90)))
        assert [named[name] for name in ("top-1", "many", "medium", "few", "seconds")] == ["50.00", "60.00", "", "20.00", "90"]
        assert "3 threads, torch " in (row := train.result_row(trainer, 1))[11] and not row[11].endswith("compiled")
        trainer.config.compile = "on"
        assert train.result_row(trainer, 1)[11] == row[11] + ", compiled"
    assert f"{torch.get_num_threads()} thread" in rows[0][11] and rows[0][11].endswith(f"torch {torch.__version__}, float32")
    assert train.main([*argv, "--seeds", "0", "1", "2"]) == 0           # nothing left to do
    assert train.main(["--resume", "--out", str(tmp_path / "run-seed1"), "--quiet", "--results", str(results)]) == 0
    assert train.read_results(results) == rows          # a run has one row
    assert train.main([*argv, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0 and not (tmp_path / "other").exists()
    assert train.main([*argv, "--seeds", "0", "0", "3", "3"]) == 0 and len(train.read_results(results)) == 4     # each once
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:4])[:-1])         # no end of line
    refused(capsys, tmp_path, [*argv, "--seeds", "0", "--results", str(tmp_path / "none" / "results.csv")], "no such folder")
    refused(capsys, tmp_path, [*argv, "--seeds", "1", "--tau", "0.2"], "--tau is 0.2, but the run in")   # never another's settings
    refused(capsys, tmp_path, [*(a for a in argv if a not in ("--lr", "0.05")), "--seeds", "1"], "--lr is 0.5, but the run in")
    with pytest.MonkeyPatch.context() as patch:         # a run beside it adds its row between reading and writing
        patch.setattr(train, "read_results", lambda path: [])
        train.add_results(results, [["shapes", "1", "ce", "", "9", *rows[0][5:]]])
    assert [row[4] for row in train.read_results(results)] == ["0", "1", "2", "9"]
    results.write_text("\ufeff" + results.read_text() + "\n\n", encoding="utf-8")      # a spreadsheet's doing
    assert [row[4] for row in train.read_results(results)] == ["0", "1", "2", "9"]
    for path, old in ((tmp_path / "new.csv", None), (tmp_path / "empty.csv", ""), (tmp_path / "blank.csv", "\ufeff\n")):
        if old is not None:
            path.write_text(old, encoding="utf-8")
        for part in ([], rows[:1], [], rows[1:]):
            train.add_results(path, part)
        assert train.read_results(path) == rows and path.read_text(encoding="utf-8").startswith((old or "") + "dataset,")
    refused(capsys, tmp_path, ["--tables", results, "--quiet"], "--quiet has no meaning with --tables")
    refused(capsys, tmp_path, [*argv, "--seeds", "0", "--seed", "1"], "--seed has no meaning with --seeds")
    refused(capsys, tmp_path, [*argv, "--seeds", "3", "--resume"], "--resume: not allowed with argument --seeds")
    refused(capsys, tmp_path, [*argv, "--seeds", "x"], "--seeds")
    for bad in ("a,b\n1,2\n", "\0", ",".join(train.COLUMNS) + "\n" + ",".join("x" * len(train.COLUMNS))):
        results.write_text(bad)
        refused(capsys, tmp_path, [*argv, "--seeds", "7"], "results.csv")
        refused(capsys, tmp_path, argv, "results.csv")  # before the training, not after it
        refused(capsys, tmp_path, ["--tables", results], "results.csv")
    results.write_text("\n".join(",".join(row) for row in (train.COLUMNS, ["1"] * 10 + ["", "", ""])))
    refused(capsys, tmp_path, ["--tables", results], "results.csv")     # no seconds
    results.write_text("\n".join(",".join(row) for row in (train.COLUMNS, ["1"] * 6 + ["nan"] + ["1"] * 6)))
    refused(capsys, tmp_path, ["--tables", results], "results.csv", "not finite")
    refused(capsys, tmp_path, ["--tables", tmp_path / "none.csv"], "does not exist")
    refused(capsys, tmp_path, ["--tables", results, "--lr", "3"], "--lr", "no meaning with --tables")
    refused(capsys, tmp_path, ["--report", tmp_path, "--results", results], "--results", "no meaning with --report")


def test_seeds_of_other_settings_have_other_folders(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*tiny, "--method", "ce", "--quiet", "--seeds", "0", "--results", "results.csv"]
    for more in ([], ["--momentum", "0.5"], ["--epochs", "1"]):
        assert train.main([*argv, *more]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == len(train.read_results("results.csv")) == 3
    assert train.main([*argv, "--results", "others.csv", "--amp", "bf16"]) == 0     # the finished run is found again
    assert len(list((tmp_path / "runs").iterdir())) == 3 and len(train.read_results("others.csv")) == 1
    assert train.main([*argv, "--out", "mine/", "--results", "others.csv", "--seeds", "1"]) == 0
    assert sorted(path.name for path in Path(".").glob("mine*")) == ["mine-seed1"]


def test_a_moved_npz_goes_on(tiny, tmp_path, capsys):
    argv = [*tiny, "--method", "ce", "--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, {2})
        assert train.main(argv) == 130
    moved = (tmp_path / "tiny.npz").rename(tmp_path / "moved.npz")
    refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run"], "tiny.npz does not exist")
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--dataset", str(moved)]) == 0
    other = write_npz(tmp_path / "other.npz", **arrays(seed=1))
    refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run", "--dataset", other], "training images are not those")


def test_other_pictures_are_another_run():
    trainer = tiny_trainer(method="ce")
    other = ltcl.Trainer(trainer.config, tiny_data(seed=1))
    assert torch.equal(trainer.y, other.y)              # of the same classes
    assert ltcl.fingerprint(trainer.x, trainer.y) != ltcl.fingerprint(trainer.x, trainer.y.flip(0))
    with pytest.raises(ltcl.InputError, match="training images are not those"):
        other.load_state_dict(trainer.state_dict())
    a, b = (train.Config.of(dataset="folder", data=name) for name in ("a", "b"))
    assert train.run_key(a) != train.run_key(b) and train.run_name(a) != train.run_name(b)
    one, moved, other = (ltcl.fingerprint(ltcl.ImageFiles([path]), trainer.y) for path in ("a/x.png", "b/x.png", "a/y.png"))
    assert one == moved != other
    a, b = (train.Config.of(lr=lr) for lr in (0.10000001, 0.10000002))
    assert train.run_key(a) != train.run_key(b)
    for same in (["a", "a/", "./a", "a//"], ["mine.npz", "./mine.npz"]):        # spelt otherwise it is the same run
        given = [dict(dataset=name) if name.endswith(".npz") else dict(dataset="folder", data=name, train_list=f"{name}/t.txt",
                                                                       test_list=f"{name}/v.txt") for name in same]
        assert len({train.run_key(train.Config.of(**one)) for one in given}) == 1
    assert train.Config.of(dataset="mine.npz", train_list="").train_list == ""          # not the folder "."


def test_runs_side_by_side_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train.Config.of(dataset="shapes")
    folders = [train.make_folder(config) for _ in range(3)]
    assert len({*folders}) == 3 and all(folder.is_dir() for folder in folders)
    shutil.rmtree("runs")
    Path("runs").symlink_to("nowhere")                  # a disk that isn't there
    with pytest.raises(ltcl.InputError, match="cannot be made"):
        train.make_folder(config)


def test_tables():
    rows = [["cifar100", "100", method, settings, str(seed), "200", str(top), "60", "", "20", "55", "", ""]
            for method, settings, tops in (("sc", "", (46, 47, 48)), ("dscl", "--pbsd 0", (50,))) for seed, top in enumerate(tops)]
    text = train.tables(rows)
    assert "| sc |  | 200 | 47.0 ± 1.0 | 60.0 ± 0.0 | n/a | 20.0 ± 0.0 | 3 |" in text
    assert "| sc |  | not run | not run | not run | 47.0 ± 1.0 | not run | not run |" in text
    assert "| dscl | `--pbsd 0` | not run | not run | not run | 50.0 | not run | not run |" in text
    own = train.tables([["folder", "1", *row[2:]] for row in rows])
    assert "200 epochs, top-1" not in own and "**folder, all images**" in own and "**cifar100, imbalance 100**" in text


@pytest.mark.parametrize("to, status, error", [(">&-", 0, ""), (">/dev/null 2>&-", 0, ""), (
    ">/dev/full", 2, "error: the output could not be written (No space left on device): make room\n")])
def test_output_that_goes_nowhere(to, status, error):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    script = f'exec "$0" train.py --tables data/tuning.csv {to}'
    run = subprocess.run(["sh", "-c", script, sys.executable], cwd=HERE, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (status, error)


@pytest.mark.parametrize("text", ["", "head\none,row\n", "head\none,row"])
def test_a_full_disk_leaves_no_half_row(tmp_path, text):
    path, rows = tmp_path / "results.csv", train.read_results(HERE / "data" / "tuning.csv")[:3]
    text = text and text.replace("head", ",".join(train.COLUMNS)).replace("one,row", ",".join([*rows[0][:11], "here", rows[0][12]]))
    path.write_text(text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(text) + 150, limits[1]))      # within the second of the rows
    try:
        with pytest.raises(ltcl.InputError, match="could not be written"):
            train.add_results(path, rows[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = [row[4:11] for row in rows[:1] if text]
    assert [row[4:11] for row in train.read_results(path)] == before
    train.add_results(path, rows[1:])
    assert [row[4:11] for row in train.read_results(path)] == before + [row[4:11] for row in rows[1:]]


def test_a_full_disk_leaves_the_rows_of_a_command_beside(tmp_path, monkeypatch):
    path, rows, writer = tmp_path / "results.csv", train.read_results(HERE / "data" / "tuning.csv")[:2], csv.writer
    train.add_results(path, [])

    class Full:
        def __init__(self, file, **how):
            self.file = file

        def writerows(self, ours):
            with open(path, "a", newline="") as beside:
                writer(beside, lineterminator="\n").writerows(rows)
            self.file.write(",".join(ours[0])[:20])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(csv, "writer", Full)
        with pytest.raises(ltcl.InputError, match="could not be written"):
            train.add_results(path, rows[:1])
    assert train.read_results(path) == rows


def test_a_second_header_is_no_row(tmp_path):
    path, rows = tmp_path / "results.csv", train.read_results(HERE / "data" / "tuning.csv")[:2]
    train.add_results(path, [])                         # of another command, which began at the same time
    head = path.read_text()
    path.write_text(head + head)
    train.add_results(path, rows)
    assert train.read_results(path) == rows


def test_the_readmes_tables_are_those_of_the_rows():
    readme = (HERE / "README.md").read_text()
    grid, tables, tuning = (readme.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- end of {name} -->")[0]
                            for name in ("grid", "tables", "tuning"))
    for name, text in (("results.csv", f"{tables}\n\n{grid}"), ("tuning.csv", tuning)):
        assert train.tables(train.read_results(HERE / "data" / name)).strip() == text
    methods = " ".join(f'"{method} {settings}'.rstrip() + '"' for method, settings in train.GRID)
    assert f"for method in {methods}; do" in readme     # the command that runs the grid runs all of the table's rows
    record = [row for row in train.read_results(HERE / "data" / "results.csv")
              if row[1:4] == ["100", "dscl", "--recipe record"] and row[5] == "200"]
    for dataset in ("cifar10", "cifar100"):             # the first lines' claim, and the first screen's
        top1 = train.mean_and_deviation([row[6] for row in record if row[0] == dataset])
        assert f"{top1} " in ltcl.__doc__.replace("\n", " ") and f"| {top1} |" in readme.partition("## Try it")[0]


# --- downloads, with torchvision's class stood in for ----------------------------------------

class StandIn:
    def __init__(self, root, train, download):
        a, part = arrays(), "train" if train else "test"
        assert download and Path(root).is_dir()
        (Path(root) / "archive.tar.gz").write_bytes(b"leftover")
        self.data, self.targets, self.classes = a["x_" + part], a["y_" + part].tolist(), ["x", "y", "z"]


def test_cifar_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", StandIn)
    first = ltcl.load_dataset("cifar100", tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["cifar100.npz"]
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", None)
    with pytest.raises(ltcl.InputError, match="is a file: name the folder"):
        ltcl.load_dataset("cifar100", tmp_path / "new" / "cifar100.npz")
    again = ltcl.load_dataset("cifar100", tmp_path / "new")
    assert torch.equal(first.x_train, again.x_train) and again.class_names == ["x", "y", "z"]
    assert (first.x_train.permute(0, 2, 3, 1).numpy() == arrays()["x_train"]).all()


def test_no_network(tmp_path, monkeypatch, capsys):
    class Offline:
        def __init__(self, root, **kwargs):
            (Path(root) / "half").write_bytes(b"")
            raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    for folder in (tmp_path, tmp_path / "new"):
        refused(capsys, tmp_path, ["--dataset", "cifar10", "--data", folder], "cifar10", str(folder / "cifar10.npz"))


# --- bad input: one line, status 2, nothing written ------------------------------------------

def refused(capsys, folder, argv, *words):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    status = train.main([str(a) for a in argv])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0], lines[0]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return lines[0]


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "cifar11"], ["cifar11", "shapes", "--dataset folder --data DIR"]),
    (["--data", "."], ["--data has no meaning with --dataset shapes (for image files take --dataset folder)"]),
    (["--dataset", "nowhere.npz"], ["nowhere.npz", "does not exist"]),
    (["--method", "simclr"], ["simclr", "dscl"]),
    (["--net", "vgg"], ["vgg", "resnet32"]),
    (["--curriculum", "steep"], ["steep", "parabolic"]),
    (["--schedule", "none"], ["none", "cosine"]),
    (["--amp", "fp8"], ["fp8", "bf16"]),
    (["--imb", "0.5"], ["--imb", "1"]),
    (["--imb", "nan"], ["--imb", "finite"]),
    (["--imb", "1000"], ["1000", "class 16", "300"]),
    (["--imb", "many"], ["--imb", "many"]),
    (["--epochs", "0"], ["--epochs", "1 or more"]),
    (["--epochs", "2.5"], ["--epochs", "2.5"]),
    (["--epochs", "9" * 401], ["--epochs", "1000000 or less"]),
    (["--dataset", "folder", "--size", "9" * 30], ["--size", "8192 or less"]),
    (["--size", "64"], ["--size", "--dataset shapes"]),
    (["--dataset", "cifar10", "--workers", "99"], ["--workers", "--dataset cifar10"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--batch-size", "1", "--device", "cpu"], ["--batch-size 1", "two images"]),
    (["--method", "ce", "--curriculum", "linear"], ["--curriculum", "--method ce"]),
    (["--batch-size", "100000"], ["--batch-size", "100000", "smaller"]),
    (["--lr", "0"], ["--lr", "above 0"]),
    (["--lr", "inf"], ["--lr", "finite"]),
    (["--lr", "1e39"], ["--lr", "1000000 or less"]),    # no float32 any more
    (["--weight-decay", "1e39"], ["--weight-decay", "1000000 or less"]),
    (["--tau", "-1"], ["--tau", "above 0"]),
    (["--alpha", "1.5"], ["--alpha", "1 or less"]),
    (["--momentum", "-0.1"], ["--momentum"]),
    (["--seed", "-1"], ["--seed"]),
    (["--device", "abacus"], ["abacus", "cpu"]),
    (["--method", "sc", "--queue", "8"], ["--queue", "--method sc"]),
    (["--ema", "1.1"], ["--ema"]),
    (["--method", "sc", "--ema", "0.9"], ["--ema", "--method sc"]),
    (["--pbsd", "-1"], ["--pbsd"]),
    (["--dim", "1"], ["--dim", "2 or more"]),
    (["--method", "ce", "--hidden", "64"], ["--hidden", "--method ce"]),
    (["--experts", "0"], ["--experts"]),
    (["--experts", "100000"], ["--experts", "100 or less"]),
    (["--seed", "99999999999999999999999"], ["--seed"]),
    (["--learning-rate", "1"], ["--learning-rate", "--help"]),
    (["--momentum", "1"], ["--momentum", "below 1"]),
    (["--train-list", "a.txt"], ["--train-list", "shapes"]),
    (["--holdout", "0.001", "--imb", "301"], ["301"]),
    (["--average", "2"], ["--average", "below 1"]),
    (["--recipe", "best"], ["best", "record"]),
    (["--logits", "quadratic"], ["quadratic", "cosine"]),
    (["--classifier", "none"], ["none", "logit-adjusted"]),
    (["--batchnorm", "sync", "--device", "cpu"], ["--batchnorm", "CUDA"]),
    (["--save-every", "0"], ["--save-every"]),
    (["--timeout", "0"], ["--timeout", "above 0"]),
    (["--ep", "1"], ["--ep"]),
    (["stray"], ["stray"]),
    (["--method", "ce", "--tau", "0.3"], ["--tau", "--method ce"]),
    (["--method", "sc", "--alpha", "0.5"], ["--alpha", "--method sc"]),
    (["--method", "ce", "--pbsd", "1.5"], ["--pbsd", "--method ce"]),
    (["--patch-size", "100000"], ["--patch-size", "1024"]),
    (["--pbsd", "0", "--patches", "7"], ["--patches", "--pbsd 0"]),
    (["--adjust", "1.5"], ["--adjust", "--classifier auto"]),
    (["--stage2-lr", "3"], ["--stage2-lr", "--curriculum parabolic"]),
    (["--dataset", "folder", "--train-list", "a.txt"], ["--test-list", "both"]),
    (["--resume"], ["holds no run"]),
    (["--resume", "--device", "cpu"], ["holds no run"]),        # a mistyped folder: no new run of the defaults
    (["--resume", "--out", "mistyped", "--epochs", "20"], ["'mistyped' holds no run"]),
    (["--data", "elsewhere"], ["--data", "--dataset shapes"]),
    (["--timeout", "5"], ["--timeout", "one process"]),
    (["--eval", ""], ["--eval"]),
    (["--results", ""], ["cannot be read", "--results"]),
])
def test_bad_flags(flags, words, tmp_path, capsys):
    refused(capsys, tmp_path, ["--out", tmp_path / "run", *flags], *words)


def test_above_zero_is_all_that_is_asked():
    assert train.Config(lr=1e-12, tau=1e-12).lr == 1e-12


def test_too_little_memory(tiny, tmp_path, capsys):
    def fails(*_):
        raise MemoryError                               # Python's own has no words

    assert train.main([*tiny, "--queue", "100000000000000", "--out", str(tmp_path / "run")]) == 2
    *_, last = capsys.readouterr().err.splitlines()     # after the warning that so many keys are too many
    assert "too little memory" in last and "--queue" in last and not (tmp_path / "run").exists()
    assert train.main([*tiny, "--queue", str(10 ** 15), "--dim", "65536", "--out", str(tmp_path / "run")]) == 2
    assert "too little memory" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltcl, "load_dataset", fails)
        refused(capsys, tmp_path, [*tiny, "--out", tmp_path / "run"], "too little memory")


def test_what_failed_in_its_first_step_begins_anew_with_other_settings(tiny, tmp_path, monkeypatch, capsys):
    def too_large(self, *_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    argv = [*tiny, "--method", "ce", "--seeds", "0", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(ltcl.Trainer, "step", too_large)
        assert train.main(argv) == 2
    assert "smaller --batch-size" in capsys.readouterr().err
    refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run-seed0", "--alpha", "0.7"], "--alpha", "--method ce")
    for flags in (["--method", "sc"], ["--recipe", "record"]):      # they stand for settings that the old run's would hide
        refused(capsys, tmp_path, ["--resume", "--out", tmp_path / "run-seed0", *flags], flags[0], "start a new run")
    assert train.main([*argv, "--batch-size", "4"]) == 0
    assert json.loads((tmp_path / "run-seed0" / "config.json").read_text())["batch_size"] == 4


def test_compiling_without_a_compiler(tiny, tmp_path, monkeypatch, capsys):
    inductor = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nowhere/g++"))
    assert train.main([*tiny, "--compile", "on", "--out", str(tmp_path / "run")]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: --compile on does not work here") and last.endswith("take --compile off")


def test_compiling_takes_both_encoders(monkeypatch):
    plain, compiled = tiny_trainer(ema=0.9), []
    monkeypatch.setattr(torch, "compile", lambda maps, **_: lambda x: (compiled.append(len(x)), maps(x))[1])
    trainer = tiny_trainer(ema=0.9, compile="on")
    assert trainer.train_epoch() == plain.train_epoch()
    assert compiled == [16, 8, 16] * 2                  # a step: query and classifier, keys, students


def test_batches_are_the_same_on_every_device():
    trainer, plans = tiny_trainer(method="sc"), []
    for state in (1, 2):                                # a device's own generator draws otherwise
        trainer.reseed(0)
        trainer.rng.manual_seed(state)
        plans.append(trainer.batches(8, 2))
    assert torch.equal(*plans)


def test_another_device_is_told(tiny, tmp_path, capsys):
    argv = [*tiny, "--method", "ce", "--epochs", "2", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save(state | dict(device="cuda"), tmp_path / "run" / "last.pt")
    for told in (True, False):                          # the run goes on here, and is then of here
        capsys.readouterr()
        assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
        assert ("note: the run was on cuda" in capsys.readouterr().err) == told


def test_an_unusable_device(tmp_path, capsys):
    if not torch.cuda.is_available():
        refused(capsys, tmp_path, ["--out", tmp_path / "run", "--device", "cuda"], "cuda", "--device cpu")
    refused(capsys, tmp_path, ["--out", tmp_path / "run", "--device", "meta"], "meta", "--device cpu")     # it has no values


A = arrays()


@pytest.mark.parametrize("changes, words", [
    (dict(x_test=None), ["x_test"]),
    (dict(y_train=None, y_test=None), ["y_test, y_train"]),
    (dict(x_train=A["x_train"].astype(np.float32)), ["x_train", "float32", "uint8"]),
    (dict(x_train=A["x_train"][..., :2]), ["x_train", "[21, 8, 8, 2]"]),
    (dict(x_test=A["x_test"][:, :4, :4]), ["differ in size"]),
    (dict(y_train=A["y_train"][:-1]), ["y_train", "[20]"]),
    (dict(y_train=A["y_train"].astype(float)), ["y_train", "float64"]),
    (dict(y_train=A["y_train"] - 1), ["training labels", "negative"]),
    (dict(y_test=A["y_test"] + 1), ["test label 3"]),
    (dict(y_train=A["y_train"] * 2, y_test=A["y_test"] * 2), ["class 1 has no training image"]),
    (dict(x_test=A["x_test"][:4], y_test=A["y_test"][:4]), ["class 2 has no test image"]),
    (dict(x_train=A["x_train"][:0], y_train=A["y_train"][:0]), ["training labels are none"]),
    (dict(y_train=A["y_train"] * 0, y_test=A["y_test"] * 0), ["one class"]),
    (dict(class_names=np.array(["a", "b"])), ["2 class_names", "3 classes"]),
    (dict(class_names=np.array("ab")), ["1 class_names", "3 classes"]),
    (dict(x_train=A["x_train"][:, :, :2], x_test=A["x_test"][:, :, :2]), ["8 x 2 pixels"]),
    (dict(class_names=np.array(["a", "b", None])), ["class_names", "savez"]),
])
def test_bad_npz(changes, words, tmp_path, capsys):
    path = write_npz(tmp_path / "bad.npz", **changes)
    refused(capsys, tmp_path, ["--dataset", path, *TINY, "--out", tmp_path / "run"], *words)


def test_broken_npz(tmp_path, capsys):
    whole = Path(write_npz(tmp_path / "whole.npz")).read_bytes()
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for name, content in (("cut", whole[:len(whole) // 2]), ("empty", b""), ("text", b"hello"), ("npy", single.getvalue())):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        line = refused(capsys, tmp_path, ["--dataset", path, *TINY, "--out", tmp_path / "run"], f"{name}.npz", "cannot be read")
        assert ("no .npz file" in line) == (name != "cut") and "pickle" not in line
    path = write_npz(tmp_path / "hollow.npz", x_train=None)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x_train.npy", b"")               # what was written when the disk was full
    refused(capsys, tmp_path, ["--dataset", path, *TINY, "--out", tmp_path / "run"], "x_train is", "images are uint8")


def test_an_out_that_holds_a_run(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*tiny, "--out", str(out)]) == 0
    kept = (out / "log.jsonl").read_bytes()
    refused(capsys, tmp_path, [*tiny, "--out", out], str(out), "already holds a run")
    assert (out / "log.jsonl").read_bytes() == kept
    refused(capsys, tmp_path, [*tiny, "--out", tmp_path / "tiny.npz"], "--out", "is a file")
    refused(capsys, tmp_path, [*tiny, "--out", tmp_path / "tiny.npz" / "run"], "--out", "cannot be made")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    refused(capsys, tmp_path, [*tiny, "--out", tmp_path / "theirs"], "config.json", "without its last.pt")
    (out / "last.pt").unlink()
    refused(capsys, tmp_path, [*tiny, "--out", out, "--resume"], "log.jsonl", "without its last.pt")
    out.rename(tmp_path / "run-seed0")
    refused(capsys, tmp_path, [*tiny, "--out", out, "--seeds", "0"], "log.jsonl", "without its last.pt")


@pytest.mark.parametrize("lr, seconds, method", [(1e30, 600, "sc"), (math.inf, 0, "ce")])      # found at the epoch's end, and at a save within it
def test_a_loss_that_turns_nan(lr, seconds, method, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ltcl, "learning_rate", lambda t, c: 0.01 if t <= 1 else lr)
    monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
    out = tmp_path / "run"
    assert train.main([*tiny, "--method", method, "--epochs", "3", "--out", str(out)]) == 2
    warning, line = capsys.readouterr().err.splitlines()
    assert "6 steps in all are too few" in warning and "epoch 2, step" in line
    assert "--lr" in line and ("--tau" in line) == (method != "ce")
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["epoch"] == 1 and all(t.isfinite().all() for t in saved["net"].values())


def test_a_torchvision_that_does_not_fit(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    run = subprocess.run([sys.executable, str(HERE / "train.py")], cwd=tmp_path, capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "nms" in run.stderr and "pip install" in run.stderr


# --- benchmark: python test_ltcl.py ----------------------------------------------------------

def seconds(*functions, repeats=7):
    """The median time of each, taken in turns so that all meet the same machine."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for f, taken in zip(functions, times):
            f()                                         # its memory is at hand, as in training
            start = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]    # the first is for warming up


def peak_bytes(f):
    """The most memory that f holds beyond what was there: the allocator's own events, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    live = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def backward(loss, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def benchmark_losses():
    print("\nlosses, forward and backward, float32, 128 dimensions   time   textbook's   ratio   memory   textbook's   ratio")

    def compare(name, ours, theirs):
        a, b = seconds(ours, theirs)
        m, n = peak_bytes(ours), peak_bytes(theirs)
        print(f"  {name:48} {1e3 * a:8.1f} ms {1e3 * b:8.1f} ms {b / a:7.2f} {m / 2**20:5.0f} MiB {n / 2**20:8.0f} MiB {n / m:7.2f}",
              flush=True)
        return a, m

    for n in (1024, 4096):
        z, y = unit(n, 128, dtype=torch.float32), torch.arange(n) % 100
        compare(f"sc, {n} rows", backward(lambda z, y=y: ltcl.sc_loss(z, y), z), backward(lambda z, y=y: textbook_sc(z, y), z))
    y = torch.arange(256) % 100
    q, k = unit(256, 128, dtype=torch.float32), unit(256, 128, seed=1, dtype=torch.float32)
    for K in (4096, 65536):
        m, my = unit(K, 128, seed=2, dtype=torch.float32), torch.arange(K) % 100
        compare(f"dscl, 256 anchors, queue of {K}", backward(lambda q, k, m=m, my=my: ltcl.dscl_loss(q, k, y, m, my), q, k),
                backward(lambda q, k, m=m, my=my: textbook_dscl(q, k, y, m, my), q, k))
    print("\ngrowth from 1024 to 4096 rows, as an exponent       time   memory")
    p = unit(100, 128, seed=3, dtype=torch.float32)
    for name, loss in (("sc", lambda z, y: ltcl.sc_loss(z, y)), ("psc, 100 classes", lambda z, y: ltcl.psc_loss(z, y, p))):
        runs = [backward(lambda z, n=n: loss(z, torch.arange(n) % 100), unit(n, 128, dtype=torch.float32)) for n in (1024, 4096)]
        (a, b), (m, n) = seconds(*runs), map(peak_bytes, runs)
        print(f"  {name:48} {math.log(b / a, 4):5.2f} {math.log(n / m, 4):8.2f}", flush=True)


def benchmark_memory():
    print("\nmemory of a loss, forward and backward, MiB        sc   psc: classes " + " ".join(f"{C:8,}" for C in (10, 100, 1000, 8142)))
    for n in (512, 1024, 2048, 4096):
        z, y = unit(n, 128, dtype=torch.float32), torch.arange(n)
        psc = [peak_bytes(backward(lambda z, p, y=y: ltcl.psc_loss(z, y % len(p), p), z, unit(C, 128, seed=1, dtype=torch.float32)))
               for C in (10, 100, 1000, 8142)]
        sc = peak_bytes(backward(lambda z, y=y: ltcl.sc_loss(z, y % 100), z))
        print(f"  {n:6,} rows {sc / 2**20:41.0f} " + " " * 14 + " ".join(f"{m / 2**20:8.0f}" for m in psc), flush=True)


def benchmark_views():
    from torchvision.transforms import v2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                            # as in a worker
    x = torch.randint(256, (512, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [v2.functional.to_pil_image(image) for image in x]
    rng = torch.Generator().manual_seed(0)

    def resized(x):
        return ltcl.random_jitter(ltcl.resized_view(x, rng, 32), rng)

    recipes = {"crop, flip, grayscale [H]": (lambda x: ltcl.crop_view(x, rng), [v2.RandomCrop(32, padding=4)], []),
               "resized crop, flip, jitter, grayscale": (resized, [v2.RandomResizedCrop(32)], [
                   v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)])}
    print("\nviews, 512 images of 32 x 32, one thread, 1/s  ours   torchvision v2 one by one   ratio   from PIL   ratio")
    for name, (ours, crop, jitter) in recipes.items():
        v = v2.Compose([*crop, v2.RandomHorizontalFlip(), *jitter, v2.RandomGrayscale(0.2), v2.ToImage(),
                        v2.ToDtype(torch.float32, scale=True)])
        a, b, c = seconds(lambda: ours(x), lambda: torch.stack([v(i) for i in x]), lambda: torch.stack([v(i) for i in pictures]))
        print(f"  {name:40} {512 / a:9,.0f} {512 / b:20,.0f} {b / a:13.1f} {512 / c:10,.0f} {c / a:7.1f}", flush=True)
    torch.set_num_threads(threads)


def benchmark_step(device):
    print("\na training step: images/s counts a batch's images once, whatever is made of them")
    speed = None
    if device == "cuda":                                # bytes/s read and written; resnet32 moves about 13.6 MB a view in bf16
        block = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
        speed = 2 * block.numel() / seconds(block.clone)[0]
    for net, size in (("resnet8", 512), ("resnet32", 512)) if device == "cuda" else (("resnet8", 128), ("resnet32", 64)):
        x = torch.randint(256, (2 * size, 3, 32, 32), dtype=torch.uint8)
        data = ltcl.Dataset(x, torch.arange(2 * size) % 2, x[:2], torch.arange(2), ["a", "b"])
        for name, settings in (("ce", dict(method="ce")), ("dscl, pbsd 0", dict(pbsd=0.0)), ("dscl", {})):
            for compiled in ("off", "on"):
                trainer = ltcl.Trainer(train.Config.of(dataset="cifar100", imb=1, net=net, batch_size=size, device=device,
                                                      compile=compiled, **settings), data)
                rows = trainer.batches(size, 1)[0]
                trainer.net.train()
                taken, = seconds(lambda t=trainer, r=rows: t.step(t.x[r], t.y[r], size, t.optimizers[0]), repeats=5)
                views = dict(zip(("ce", "dscl, pbsd 0", "dscl"), (1, 3, 4.25)))[name]   # 5 patches of a quarter
                share = f", {13.6e6 * views * size / taken / speed:.0%} of the memory's bandwidth" if speed and net == "resnet32" else ""
                print(f"  {net:9} batch {size:4} {name:13} compile {compiled:4} {1e3 * taken:8.1f} ms {size / taken:9,.0f} images/s"
                      + share, flush=True)


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}")
    benchmark_views()
    benchmark_losses()
    benchmark_memory()
    benchmark_step(where)
