"""Figures that several tasks are judged by, and their pictures."""

import numpy as np


def accuracy_and_f1(truth, guess):
    names = sorted(set(truth) | set(guess))
    f1 = []
    for name in names:
        right = sum(a == b == name for a, b in zip(truth, guess, strict=True))
        f1.append(2 * right / max(truth.count(name) + guess.count(name), 1))
    accuracy = np.mean([a == b for a, b in zip(truth, guess, strict=True)])
    return {"accuracy": float(accuracy), "f1_macro": float(np.mean(f1))}


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-30))


def ranks(values):
    """Ties get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def draw_confusion(axes, labels, truth, guess):
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)))
    for a, b in zip(truth, guess, strict=True):
        if a in place and b in place:
            counts[place[a], place[b]] += 1
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="predicted", ylabel="true", xticks=range(len(labels)), yticks=range(len(labels))
    )
    axes.set_xticklabels(labels, rotation=60, ha="right")
    axes.set_yticklabels(labels)
    if len(labels) <= 12:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, int(count), ha="center", va="center")
