"""Pictures of what was computed: block maps, densities, accuracy, benchmarks and calibrations."""

from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from sparse_patch.call import PHASES, Phase
from sparse_patch.errors import SparsePatchError, one_line, short
from sparse_patch.files.writing import write_file
from sparse_patch.plans import Plan, SparsePlan
from sparse_patch.report import SparsityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Captured = dict[int, list[tuple[Phase, Plan]]]


def plot_sparsity(
    report: SparsityReport, plans: Captured, path: str | Path, heads: Sequence[tuple[int, int]] | None = None
) -> None:
    """Write one PNG: the density of every layer and head, and the block maps of a few heads.

    Args:
        report: the result of `sparsity_report`.
        plans: the result of `capture_plans`; the last prefill plan of each layer is drawn.
        path: picture to write.
        heads: (layer, query head) pairs to draw; by default six heads from the sparsest to the densest.

    Raises:
        SparsePatchError: matplotlib is not installed, no prefill was sparse, or a head does not exist.
    """
    figure_class, colors = require_matplotlib()
    sparse_plans = {layer: plan for layer in plans if (plan := last_sparse_plan(plans[layer])) is not None}
    if not sparse_plans:
        raise SparsePatchError(f"plot: no sparse prefill was captured: {_why_dense(report)}")
    chosen = _spread_of_heads(sparse_plans) if heads is None else _pairs(heads)
    columns = 1 + -(-len(chosen) // 2)
    figure = figure_class(figsize=(3.1 * columns + 1, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, columns)
    density = figure.add_subplot(grid[:, 0])
    draw_density(density, report)
    for number, (layer, head) in enumerate(chosen):
        axes = figure.add_subplot(grid[number % 2, 1 + number // 2])
        draw_blocks(axes, sparse_plans, layer, head, colors)
    _save(figure, path)


def plot_accuracy(result: dict[str, Any], path: str | Path) -> None:
    """Draw the mean score against the computed share of dense attention: one panel per length, one line per method.

    For tasks that compare with dense attention, it is the mean KL divergence; a result with both kinds has two rows of
    panels.

    The share is prefill density. For configurations without a prefill method, it is the number of keys read per decoded
    token, relative to the dense row.

    Args:
        result: the JSON of `sparse-patch eval`.
        path: picture to write.

    Raises:
        SparsePatchError: matplotlib is not installed.
    """
    figure_class, _ = require_matplotlib()
    lengths = list(dict.fromkeys(row["length"] for row in result["rows"]))
    figures = [name for name in _FIGURES if any(row.get(name) is not None for row in result["rows"])]
    figure = figure_class(figsize=(1 + 3.6 * len(lengths), 3.8 * len(figures)), layout="constrained")
    panels = figure.subplots(len(figures), len(lengths), sharey="row", squeeze=False)
    for name, row in zip(figures, panels, strict=True):
        for length, axes in zip(lengths, row, strict=True):
            _draw_lines(axes, _lines(result, length, name))
            axes.set(title=f"{length} tokens", xlabel="share of dense attention", xscale="log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3, which="both")
        row[0].set_ylabel(_FIGURES[name])
        if name == "kl":
            row[0].set_yscale("symlog", linthresh=1e-4)
            row[0].set_ylim(bottom=0)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3 * len(lengths)))
    _save(figure, path)


_FIGURES = {"score": "score, mean over tasks", "kl": "KL from dense, nats a token"}


def _draw_lines(axes: "Axes", lines: dict[str, list[tuple[float, float, str]]]) -> None:
    for method, points in lines.items():
        points.sort()
        shares, values, labels = zip(*points, strict=True)
        axes.plot(shares, values, marker="o", label=method)
        for share, value, label in {points[0], points[-1]}:
            name = _short(label, labels)
            axes.annotate(name, (share, value), xytext=(3, -10), textcoords="offset points", fontsize=7)


def _short(label: str, labels: Sequence[str]) -> str:
    """A label without the words that begin all labels of its line."""
    words = label.split("-")
    while len(labels) > 1 and len(words) > 1 and all(other.startswith(f"{words[0]}-") for other in labels):
        words, labels = words[1:], [other.partition("-")[2] for other in labels]
    return "-".join(words)


def plot_bench(result: dict[str, Any], path: str | Path) -> None:
    """Draw the speed-up over the fastest dense kernel against the length: one line per kernel, density and method.

    Args:
        result: the JSON of `sparse-patch bench prefill`.
        path: picture to write.

    Raises:
        SparsePatchError: matplotlib is not installed.
    """
    figure_class, _ = require_matplotlib()
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"dense": ":", "blocks": "--", "method": "-"}
    for kind, style in styles.items():
        for label in dict.fromkeys(row["label"] for row in result["rows"] if row["kind"] == kind):
            mine = [row for row in result["rows"] if row["label"] == label and row["speedup"] is not None]
            axes.plot([row["length"] for row in mine], [row["speedup"] for row in mine], style, marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens", ylabel="speed-up over the fastest dense kernel", title=result["machine"]["device"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_layers(result: dict[str, Any], path: str | Path) -> None:
    """Draw what every layer finds in the lists of earlier layers, and each layer's worth as a re-selecting layer.

    Args:
        result: the JSON of `sparse-patch calibrate layers`.
        path: picture to write.

    Raises:
        SparsePatchError: matplotlib is not installed.
    """
    figure_class, _ = require_matplotlib()
    figure = figure_class(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers, mass = result["layers"], torch.tensor(result["mass_shared"])
    mass = mass.masked_fill(torch.ones_like(mass, dtype=torch.bool).tril(-1), torch.nan)
    image = left.imshow(mass.numpy(), vmin=0, vmax=1)
    ticks = range(0, len(layers), -(-len(layers) // 16))
    left.set_xticks(ticks, [layers[tick] for tick in ticks])
    left.set_yticks(ticks, [layers[tick] for tick in ticks])
    left.set(xlabel="layer", ylabel="lists of layer", title="attention mass on the list of another layer")
    figure.colorbar(image, ax=left)
    rows = result["measured"]["candidates"]
    labels = {"mass": "mass, mean of the sparse layers", "worst_layer": "mass, worst sparse layer", "jump": "1 - cos"}
    for key, label in labels.items():
        right.plot([row["layer"] for row in rows], [row[key] for row in rows], marker="o", label=label)
    for layer in result["select"][1:]:
        right.axvline(layer, color="black", linewidth=0.8, linestyle=":")
    right.set_xticks([layers[tick] for tick in ticks])
    right.set(xlabel="re-selecting layer", ylim=(0, 1), title=f"full {result['full']}, select {result['select']}")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    _save(figure, path)


def plot_spans(result: dict[str, Any], path: str | Path) -> None:
    """Draw what each KV head keeps at every length, and the loss of head schedules against what they keep.

    Args:
        result: the JSON of `sparse-patch calibrate moa`.
        path: picture to write.

    Raises:
        SparsePatchError: matplotlib is not installed.
    """
    figure_class, _ = require_matplotlib()
    lengths = list(result["spans"])
    figure = figure_class(figsize=(2.2 * len(lengths) + 8.5, 4.2), layout="constrained")
    widths = [*[1.0] * len(lengths), 1.8, 1.8]
    *maps, predicted, validated = figure.subplots(1, len(widths), width_ratios=widths)
    for length, axes in zip(lengths, maps, strict=True):
        shares = torch.tensor(result["spans"][length]) / int(length)
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(0, shares.shape[1], -(-shares.shape[1] // 8)))
        axes.set_yticks(range(len(result["layers"])), result["layers"])
        axes.set(title=f"{length} tokens", xlabel="KV head")
    maps[0].set_ylabel("layer")
    figure.colorbar(image, ax=maps, label="share of the keys that is kept")
    lines = dict(result["frontier"])
    densities = lines.pop("density")
    for name, values in lines.items():
        predicted.plot(
            densities, [float("nan") if value is None else value for value in values], marker="o", label=name
        )
    predicted.set(xlabel="density", ylabel=f"influence of what is lost, {lengths[-2]} tokens", yscale="log")
    for one in (*result["plans"], *result["baselines"]):
        if one["loss"] is not None:
            validated.plot(one["densities"][-1], one["loss"], marker="o", linestyle="", label=one["name"])
    validated.axhline(result["dense"], color="black", linewidth=0.8, label="dense")
    validated.set(xlabel="density", ylabel=f"cross-entropy of answers, {lengths[-1]} tokens", xlim=(0, 1))
    for axes in (predicted, validated):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


def _lines(result: dict[str, Any], length: int, figure: str) -> dict[str, list[tuple[float, float, str]]]:
    """Method -> (share, mean of the figure, configuration) of each of its configurations."""
    rows = [row for row in result["rows"] if row["length"] == length and row.get(figure) is not None]
    dense = [row for row in rows if row["config"] == "dense"]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for label in dict.fromkeys(row["config"] for row in rows):
        config = result["configs"][label]
        method = "+".join(dict.fromkeys(config[phase]["method"] for phase in PHASES if phase in config))
        mine = [row for row in rows if row["config"] == label]
        if "prefill" in config:
            share = fmean(row["density"] for row in mine)
        else:
            share = fmean(row["attended"] or 0 for row in mine) / fmean(row["attended"] or 0 for row in dense)
        lines.setdefault(method, []).append((share, fmean(row[figure] for row in mine), label))
    return lines


def _why_dense(report: SparsityReport) -> str:
    """Why prefills were not sparse, from the report; the three most frequent reasons."""
    phases = [layer.prefill for layer in report.layers]
    reasons = Counter(reason for phase in phases for reason in {**phase.dense, **phase.fallbacks})
    total = len(report.layers)
    said = [
        f"{f'all {total}' if number == total else f'{number} of {total}'} layers were dense: {reason}"
        for reason, number in reasons.most_common(3)
    ]
    return "; ".join(said) or "run a prompt in `with capture_plans(model)` of a model with a prefill method"


def last_sparse_plan(plans: Sequence[tuple[Phase, Plan]]) -> SparsePlan | None:
    """The last sparse prefill plan of a layer; None if there is none."""
    found = [plan for phase, plan in plans if phase == "prefill" and isinstance(plan, SparsePlan)]
    return found[-1] if found else None


def draw_density(axes: "Axes", report: SparsityReport) -> None:
    """Draw the prefill density of each layer (rows) and query head (columns) as a heat map."""
    width = max((len(layer.prefill.density_by_head) for layer in report.layers), default=0) or 1
    rows = [
        layer.prefill.density_by_head or [1.0 if layer.prefill.density is None else layer.prefill.density] * width
        for layer in report.layers
    ]
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set(xlabel="query head", ylabel="layer", title=f"density, mean {report.density() or 0:.2f}")
    axes.get_figure().colorbar(image, ax=axes, orientation="horizontal", label="share of the causal triangle")  # type: ignore[union-attr]


def draw_blocks(axes: "Axes", plans: dict[int, SparsePlan], layer: int, head: int, colors: Any) -> None:
    """Draw the blocks that one head of the batch's first row computes: queries downwards, keys to the right.

    A block counts if one of its queries reads one of its keys.
    """
    if layer not in plans or not 0 <= head < plans[layer].density().shape[1]:
        raise SparsePatchError(f"plot: there is no sparse layer {layer} with a head {head}; layers {sorted(plans)}")
    plan = plans[layer]
    blocks, causal = plan.block_map(head)
    axes.imshow(
        torch.where(causal, 1 + blocks.float(), 0.0).numpy(),
        cmap=colors(["#ffffff", "#dfe3ee", "#1f4e9c"]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
    )
    density = float(plan.density()[0, head])
    axes.set(title=f"layer {layer}, head {head}: {density:.2f}", xlabel="key block", ylabel="query block")


def _pairs(heads: Any) -> list[tuple[int, int]]:
    """Check the (layer, head) pairs that a caller named."""
    pairs = list(heads) if isinstance(heads, Iterable) else [heads]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or [type(number) for number in pair] != [int, int]:
            raise SparsePatchError(f"plot: heads: expected pairs (layer, head), as in [(0, 1)], got {short(pair)}")
    return pairs


def _spread_of_heads(plans: dict[int, SparsePlan], number: int = 6) -> list[tuple[int, int]]:
    """(layer, head) pairs spread evenly from the sparsest to the densest head."""
    ranked = sorted(
        (density, layer, head)
        for layer, plan in plans.items()
        for head, density in enumerate(plan.density()[0].tolist())
    )
    steps = torch.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().int().tolist()
    return [(ranked[step][1], ranked[step][2]) for step in steps]


def check_picture(path: Path | None) -> None:
    """Raise, before a long run, if its picture cannot be drawn.

    Raises:
        SparsePatchError: matplotlib is not installed, or cannot draw files with this ending.
    """
    if path is not None:
        figure_class, _ = require_matplotlib()
        known = figure_class().canvas.get_supported_filetypes()
        if _format(path) not in known:
            raise SparsePatchError(f"{one_line(path)}: cannot be drawn: expected one of .{', .'.join(sorted(known))}")


def _save(figure: "Figure", path: str | Path) -> None:
    check_picture(Path(path))
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format=_format(Path(path)))
    write_file(Path(path), picture.getvalue())


def _format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def require_matplotlib() -> tuple["type[Figure]", Any]:
    """Return matplotlib's figure class and colour maps; raise SparsePatchError if matplotlib is not installed."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SparsePatchError('plot: matplotlib is missing; pip install "sparse_patch[plots]"') from error
    return Figure, ListedColormap
