"""Closed-set image classification: forget whole classes, or single images."""

from gsforget.tasks.classify.losses import (
    ASCENT_WEIGHT,
    FIRM_PULL,
    PULL_WEIGHT,
    PUSH_BOUND,
    PUSH_WEIGHT,
    SEPARABILITY_WEIGHT,
    Classification,
    ClassificationObjective,
    default_bound,
)

__all__ = [
    "ASCENT_WEIGHT",
    "FIRM_PULL",
    "PULL_WEIGHT",
    "PUSH_BOUND",
    "PUSH_WEIGHT",
    "SEPARABILITY_WEIGHT",
    "Classification",
    "ClassificationObjective",
    "default_bound",
]
