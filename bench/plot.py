"""Draw the result of `bench.serve`: tokens per second by load and server, and how long the first token takes."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.load import LOADS
from bench.peers import PEERS

_BARS = ("#1b6ca8", "#b8b8b8", "#7a7a7a", "#d98e32", "#3a8f5c", "#8c564b")
COLOURS = dict(zip((peer.name for peer in PEERS), _BARS, strict=True))
PANELS = (
    ("tokens_per_second", "tokens per second (more is better)"),
    ("first_token_p50_ms", "median time to first token, ms (less is better)"),
)
BAR_SPACE = 0.8
"""Of the distance from one group of bars to the next."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG with one group of bars for each load."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(len(PANELS), 1)
    for panel, (name, label) in zip(panels, PANELS, strict=True):
        _bars(panel, result, name)
        panel.set_title(label, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_formatter("{x:,.0f}")
    panels[1].yaxis.set_minor_formatter("")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _bars(panel: Axes, result: dict[str, Any], name: str) -> None:
    known = {(each["load"], each["peer"]): each["median"] for each in result["loads"] if each["median"]}
    loads = [load for load in LOADS if any(load.name == measured for measured, _ in known)]
    peers = [peer for peer in PEERS if any(peer.name == measured for _, measured in known)]
    width = BAR_SPACE / (len(peers) or 1)
    for number, peer in enumerate(peers):
        bars = [
            (place, known[load.name, peer.name][name])
            for place, load in enumerate(loads)
            if (load.name, peer.name) in known
        ]
        places = [place + (number - (len(peers) - 1) / 2) * width for place, _ in bars]
        drawn = panel.bar(places, [height for _, height in bars], width, label=peer.title, color=COLOURS[peer.name])
        panel.bar_label(drawn, fmt="%.0f", fontsize=7)
    panel.set_xticks(range(len(loads)), [load.title.replace(", ", "\n") for load in loads], fontsize=8)
