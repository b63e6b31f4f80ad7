"""Attention kernels by hand: what they do, drawn. Nothing here needs a GPU."""

from .pictures import (
    Bar,
    Timeline,
    Traffic,
    Visit,
    bytes_moved,
    plot_bytes,
    plot_mask,
    plot_timeline,
    plot_visits,
    timeline,
    visits,
)

__all__ = [
    "Bar",
    "Timeline",
    "Traffic",
    "Visit",
    "bytes_moved",
    "plot_bytes",
    "plot_mask",
    "plot_timeline",
    "plot_visits",
    "timeline",
    "visits",
]
