"""What people are told about a run: the terminal (live lines, one table), report.png and one Discord message.

All of it is made from the result of a run, the dict that the flow returns, so that terminal, picture and message
never disagree. Nothing here decides anything; nothing here may cost a trained model.
"""
import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import sys
import textwrap
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

from db import redact, setting

log = logging.getLogger("notify")

METRICS = {"r2": "R²", "same_genre_at_10": "same genre", "mae": "typical error", "baseline_mae": "guessing",
           "accuracy_new_artists": "new artists", "r2_new_artists": "new artists", "top3_accuracy": "top 3",
           "baseline_accuracy": "guessing", "same_genre_by_chance": "by chance",
           "same_artist_at_10": "same artist"}  # as people say them; others are shown as they are called
ALSO_SHOWN = ("accuracy_new_artists", "r2_new_artists", "top3_accuracy", "mae", "baseline_mae", "baseline_accuracy",
              "same_genre_by_chance", "same_artist_at_10")  # the second line of a panel, in this order
STATUS = {"trained": "trained", "held_back": "held back", "failed": "failed"}
STYLE = {"trained": "green", "completed": "green", "held_back": "yellow", "partial": "yellow", "failed": "red"}

# Terminal
PLAIN_WIDTH = 110          # columns of the table where there is no terminal to ask
LOG_EVERY = 0.25           # share of a CSV between two log lines where there is no terminal

# Picture. Okabe-Ito colours and cividis are told apart by colour-blind eyes; markers differ as well.
INCHES = 16                # at 100 dots per inch
COLOURS = 256              # in the PNG: a third of the size, and nobody sees it
ROW_INCHES, HEADER_INCHES = 4.3, 1.4
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dvp*X"
INK, GREY = "#222222", "#707070"
SIGNAL = {"completed": "#00795A", "trained": INK, "partial": "#A86400", "held_back": "#A86400", "failed": "#C03A00"}
RUNS_SHOWN = 30
CONFUSIONS_SHOWN, CLUSTERS_NAMED = 9, 8
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
         "WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAGothic", "Arial Unicode MS", "Hiragino Sans",
         "Microsoft YaHei", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
         "Noto Sans Thai", "Noto Emoji", "Symbola", "Unifont")  # those installed are used, first come first served

# Discord. Its limits count UTF-16 code units; breaking one is a 400 and loses the message.
TITLE, DESCRIPTION, FIELDS, NAME, VALUE, FOOTER, EMBEDS = 256, 4096, 25, 256, 1024, 2048, 6000
COLOUR = {"completed": 0x2ECC71, "partial": 0xF1C40F, "failed": 0xE74C3C}
SIGN = {"completed": "✅", "trained": "✅", "partial": "⚠️", "held_back": "⚠️", "failed": "❌"}
USER_AGENT = "ml-training-pipeline (https://discord.com/developers/docs/resources/webhook, 1.0)"  # urllib's: 403
TIMEOUT = 10               # seconds for one request
POST_SECONDS = 30          # for a whole message, waits and retries included
CHECK_SECONDS = 4
RETRY_DELAYS = (1, 2)      # seconds before the retries after a 5xx or a broken connection
RATE_LIMITED = 5           # how often a 429 is waited out
NO_CONNECTION, NO_ANSWER = 0, 1  # stand where an HTTP status would
COPY_IT = ('copy it again from Discord (channel settings, Integrations, Webhooks, "Copy Webhook URL") '
           "into DISCORD_WEBHOOK_URL")

# ---------------------------------------------------------------------------------------------------- words

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def plain(text, limit=10_000):
    """One line that can be shown anywhere: no secret, no control or direction character, `limit` characters at most."""
    text = " ".join(UNPRINTABLE.sub(" ", redact(str(text))).split())
    return text if len(text) <= limit else text[:limit - 1] + "…"


def number(value):
    """A metric as people read it: three digits that matter, thousands separated."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "not known"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds):
    """41.2 -> "41.2 s", 754 -> "12 min 34 s", 4000 -> "1 h 6 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count):
    """Bytes as "3.1 MB"; "" for none."""
    power = min(3, int(math.log(count, 1000))) if count else 0
    return f"{count / 1000 ** power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}" if count else ""


def metric_and_change(model):
    """("accuracy 0.713", "+0.004") of one model of the result; "first" when nothing came before, "" when it failed."""
    if not model.get("metrics"):
        return "", ""
    name, value = next(iter(model["metrics"].items()))
    previous = model.get("previous")
    change = "first" if previous is None else f"{value - previous:+.3f}"
    return f"{METRICS.get(name, plain(name))} {number(value)}", change


def facts(result):
    """["89,740 songs of spotify_songs", "41.2 s in all", ...]: what there is to say besides the models."""
    kind = "made-up songs" if result.get("demo") else "songs"
    songs = f"{result['rows']:,} {kind} of " if result.get("rows") else "table "
    found = [songs + plain(result["table"], 80)] if result.get("table") else []
    found += [f"{duration(result['read_seconds'])} to read"] if result.get("read_seconds") else []
    found += [f"{duration(result['seconds'])} in all"] if result.get("seconds") else []
    found += [f"peak memory {result['peak_mb']:,.0f} MB"] if result.get("peak_mb") else []
    return found + ([f"on {plain(result['host'], 80)}"] if result.get("host") else [])


def csv_line(result):
    """What became of the rows of the CSV, or ""."""
    csv = result.get("csv")
    if not csv:
        return ""
    reasons = "; ".join(f"{plain(reason, 80)}: {count:,}" for reason, count in csv["rejected"].items())
    return (f"CSV: {csv['read']:,} rows read, {csv['loaded']:,} songs loaded, {csv['repeated']:,} repeated, "
            f"{sum(csv['rejected'].values()):,} rejected" + (f" ({reasons})" if reasons else ""))


def when(result):
    """The start of the run as "2026-11-23 03:00 UTC"; "" where it is not known."""
    started = result.get("started_at")
    return f"{datetime.fromisoformat(started).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC" if started else ""


# ------------------------------------------------------------------------------------------------- terminal

def print_summary(result, file=None):
    """Print the table of a run: in colour on a terminal, plain text without escape codes anywhere else."""
    from rich.console import Console
    file = file or sys.stdout
    tty = file.isatty()
    out = Console(file=file if tty else io.StringIO(), width=None if tty else PLAIN_WIDTH, force_terminal=tty,
                  markup=False, emoji=False, highlight=False)
    if result.get("models"):
        out.print(summary_table(result, tty))
    for text, style in summary_lines(result):
        out.print(text, style=style if tty else None, soft_wrap=True)
    if not tty:
        encoding = getattr(file, "encoding", None) or "utf-8"
        lines = [line.rstrip() for line in out.file.getvalue().splitlines()]
        file.write("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    file.flush()


def summary_table(result, tty=True):
    """One row per model: a rich table that fits 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text
    table = Table(box=box.SIMPLE_HEAD if tty else None, pad_edge=False, padding=(0, 2, 0, 0) if not tty else (0, 1))
    for column in ("model", "status", "metric", "change", "time", "size"):
        table.add_column(column, justify="right" if column in ("change", "time", "size") else "left", no_wrap=True)
    for name, model in result["models"].items():
        metric, change = metric_and_change(model)
        style = STYLE[model["status"]]
        table.add_row(Text(plain(name, 20), "bold"), Text(STATUS[model["status"]], style), Text(metric), Text(change),
                      Text(duration(model["seconds"]) if model.get("seconds") else ""), Text(size(model.get("bytes"))))
    return table


def summary_lines(result):
    """[(text, rich style)]: what stands below the table: errors in plain words, the command that finishes the job."""
    lines = [(plain(result.get("message") or STATUS.get(result["status"], result["status"])),
              "bold " + STYLE[result["status"]])]
    if result.get("error") and plain(result["error"]) not in lines[0][0]:
        lines.append((plain(result["error"]), "red"))
    lines += [(f"{plain(name)} {STATUS[model['status']]}: {plain(model['error'])}", STYLE[model["status"]])
              for name, model in (result.get("models") or {}).items() if model.get("error")]
    lines += [(f"warning: {plain(warning)}", "yellow") for warning in result.get("warnings") or ()]
    lines += [(text, "") for text in (csv_line(result), ", ".join(facts(result))) if text]
    if any(model.get("path") for model in (result.get("models") or {}).values()) and result.get("models_dir"):
        lines.append((f"models in {plain(result['models_dir'])}", ""))
    if result.get("finish_command"):
        lines.append((f"to finish the job: {plain(result['finish_command'])}", "bold"))
    return lines


def _console(file):
    from rich.console import Console
    return Console(file=file or sys.stderr, markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def _logs_above(console, drop=None):
    """Let every handler that logs to a terminal write above what is live on `console`, less what `drop` filters out."""
    from rich.file_proxy import FileProxy
    known = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    handlers = {handler for logger in known for handler in getattr(logger, "handlers", ())
                if isinstance(handler, logging.StreamHandler) and handler.stream and handler.stream.isatty()}
    before = [(handler, handler.stream, getattr(handler, "console", None)) for handler in handlers]
    try:
        for handler, stream, own_console in before:
            handler.setStream(FileProxy(console, stream))
            if own_console:  # a handler that prints through rich looks past the proxy
                handler.console = console
            if drop:
                handler.addFilter(drop)
        yield
    finally:
        for handler, stream, own_console in before:
            handler.setStream(stream)
            if own_console:
                handler.console = own_console
            if drop:
                handler.removeFilter(drop)


@contextlib.contextmanager
def live_status(models, file=None):
    """A line per model on a terminal while the block runs; nothing elsewhere. Fed by log records, see LiveStatus."""
    console = _console(file)
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    from rich.live import Live
    status = LiveStatus(models)
    with _logs_above(console, status.is_shown), Live(get_renderable=status.table, console=console, transient=True,
                                                     redirect_stdout=False, redirect_stderr=False):
        logging.getLogger().addHandler(status)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(status)


class LiveStatus(logging.Handler):
    """Takes records logged with extra={"model": "genre", "phase": "fitting"} and shows the last one of each model.

    The line shows the message without its "genre: "; the phase gives the sign and ends the clock when it begins with
    done, failed or held. Records from warning upwards appear in the log as well: a retry's reason must not vanish.
    """
    SIGNS = {"waiting": ("·", "dim"), "done": ("✓", "green"), "held": ("!", "yellow"), "failed": ("✗", "red"),
             "retrying": ("↻", "yellow")}

    def __init__(self, models):
        super().__init__()
        self.lines = {name: ("waiting", "waiting", None, None) for name in models}  # phase, text, begun, ended

    def is_shown(self, record):
        """A logging filter: False for records that the live lines show already."""
        return record.levelno >= logging.WARNING or getattr(record, "model", None) not in self.lines

    def emit(self, record):
        name, phase = getattr(record, "model", None), str(getattr(record, "phase", ""))
        if name in self.lines and phase:
            begun = self.lines[name][2] or (time.monotonic() if not phase.startswith("waiting") else None)
            ended = time.monotonic() if phase.startswith(("done", "failed", "held")) else None
            self.lines[name] = phase, plain(record.getMessage()).removeprefix(f"{name}: "), begun, ended

    def table(self):
        from rich.table import Table
        from rich.text import Text
        table = Table.grid(padding=(0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, (phase, text, begun, ended) in self.lines.items():
            sign, style = self.SIGNS.get((phase.split() or [""])[0].rstrip(":,"), ("▶", "cyan"))
            clock = f"{(ended or time.monotonic()) - begun:4.0f} s" if begun else "      "
            table.add_row(Text(sign, style), Text(name, "bold"), Text(clock, "dim"), Text(text, style))
        return table


@contextlib.contextmanager
def load_progress(file=None):
    """Gives progress(done_bytes, total_bytes): a bar on a terminal, a log line per quarter elsewhere."""
    console = _console(file)
    if not console.is_terminal or console.is_dumb_terminal:
        logged = [0]

        def progress(done, total):
            if total and done / total >= logged[0] + LOG_EVERY:
                logged[0] = done / total // LOG_EVERY * LOG_EVERY
                log.info("loading the CSV: %.0f %% of %s", 100 * logged[0], size(total))
        yield progress
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    columns = TextColumn("loading the CSV"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with _logs_above(console), Progress(*columns, console=console, transient=True,
                                        redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


# -------------------------------------------------------------------------------------------------- picture

def draw_report(result, history, path):
    """Write the picture of a run, a PNG 1600 pixels wide, to `path`; the old one stays until the new is whole.

    `history`: the lines of history.jsonl as dicts, oldest first. Raises OSError when `path` cannot be written.
    """
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        canvas = FigureCanvasAgg(report_figure(result, history))
        canvas.draw()
        image = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
        image = image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def report_figure(result, history):
    """The matplotlib Figure behind draw_report: a panel per model of this run, the metric history, a headline."""
    from matplotlib.figure import Figure  # without pyplot: no global state, so any thread may draw
    models = result.get("models") or {}
    columns = 3 if len(models) > 3 else 2
    rows = len(models) // columns + 1
    height = HEADER_INCHES + ROW_INCHES * rows + (1.5 if rows == 1 else 0)
    figure = Figure(figsize=(INCHES, height), facecolor="white")
    grid = figure.add_gridspec(rows, columns, left=0.068, right=0.925, bottom=0.6 / height, hspace=0.5,
                               top=1 - (HEADER_INCHES + 0.75) / height, wspace=0.28 if columns == 3 else 0.2)
    for place, (name, model) in enumerate(models.items()):
        _draw_model(figure.add_subplot(grid[place // columns, place % columns]), name, model)
    if not models:
        _say(figure.add_subplot(grid[0, 0]), result.get("error") or "no model was trained", "failed")
    _draw_history(figure.add_subplot(grid[-1, (len(models) or 1) % columns:]), result, history)
    _headline(figure, result, height)
    return figure


@functools.lru_cache(maxsize=1)
def _fonts():
    """(families to draw with, the code points that they can draw in regular and in bold)."""
    from matplotlib import font_manager
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = [name for name in FONTS if name in installed]
    drawable = set()
    for family in families:
        faces = (font_manager.findfont(font_manager.FontProperties(family=family, weight=weight))
                 for weight in ("normal", "bold"))
        drawable |= set.intersection(*(set(font_manager.get_font(face).get_charmap()) for face in faces))
    return families, frozenset(drawable)


def _drawable(text, width=1000):
    """`text` in `width` characters that some font has; those that none has are escaped, not drawn as empty boxes."""
    drawable = _fonts()[1]
    text = "".join(c if ord(c) in drawable else "" if unicodedata.category(c) in ("Cf", "Mn")
                   else c.encode("unicode_escape").decode() for c in unicodedata.normalize("NFC", plain(text)))
    return text if len(text) <= width else text[:width - 1] + "…"


def _label(text, width=1000):
    """The same for matplotlib, which would take what stands between two dollars for mathematics."""
    return _drawable(text, width).replace("$", r"\$")


def _write(axes, x, y, text, width=1000, lines=1, **style):
    """Text at x, y (shares of the axes unless `transform` says otherwise), wrapped to `lines` lines of `width`."""
    wrapped = textwrap.wrap(_drawable(text), width, max_lines=lines, placeholder=" …") or [""]
    style = {"transform": axes.transAxes if hasattr(axes, "transAxes") else None, "family": _fonts()[0],
             "color": INK, "va": "bottom"} | style
    style = {key: value for key, value in style.items() if value is not None}
    return axes.text(x, y, "\n".join(wrapped).replace("$", r"\$"), **style)


def _headline(figure, result, height):
    """What happened, when, on how many songs; warnings below."""
    _write(figure, 0.015, 1 - 0.62 / height, result.get("message") or result["status"], 80, size=25, weight="bold",
           color=SIGNAL[result["status"]])
    _write(figure, 0.015, 1 - 0.95 / height, " · ".join([when(result), *facts(result)]).strip(" ·"), 145, size=14)
    warnings = result.get("warnings") or []
    if warnings:
        more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
        _write(figure, 0.015, 1 - 1.25 / height, f"warning: {plain(warnings[0], 110)}{more}", 150, size=13.5,
               color=SIGNAL["partial"])


def _say(axes, text, status="trained"):
    """A panel that has words instead of a drawing."""
    axes.set_axis_off()
    _write(axes, 0, 0.95, text, 44, 10, size=15, va="top", color=SIGNAL[status])


def _draw_model(axes, name, model):
    """One panel: a headline with metric and change, a line of further figures, the drawing."""
    metric, change = metric_and_change(model)
    words = [f"{plain(name, 20)}:", metric, f"({change})" if change else ""]
    if model["status"] != "trained":
        words = [f"{plain(name, 20)}:", STATUS[model["status"]] + (" at" if metric else ""), metric]
    words = " ".join(filter(None, words))
    _write(axes, 0, 1.13, words, 60, size=17 if len(words) < 34 else 14.5, weight="bold", color=SIGNAL[model["status"]])
    if model["status"] == "failed":
        return _say(axes, model.get("error") or "no reason was given", "failed")
    detail = ", ".join(f"{METRICS[key]} {number(model['metrics'][key])}" for key in ALSO_SHOWN
                       if key in model["metrics"])
    _write(axes, 0, 1.015, model.get("error") or detail, 60, 2, size=10.5, color=GREY, linespacing=1.05)
    draw = {"matrix": _draw_matrix, "confusions": _draw_confusions, "points": _draw_clusters,
            "density": _draw_density, "same_genre_at": _draw_similar}
    for key, function in draw.items():
        if model.get("plot", {}).get(key):
            return function(axes, model["plot"])
    _say(axes, "nothing to draw")


def _draw_matrix(axes, plot):
    """Few genres: the confusion matrix, shares of the actual genre."""
    labels = [_label(name, 10) for name in plot["matrix"]["labels"]]
    axes.imshow(plot["matrix"]["rows"], cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, shares in enumerate(plot["matrix"]["rows"]):
        for column, share in enumerate(shares):
            _write(axes, column, row, f"{share:.0%}"[:-1 if len(labels) > 5 else None], transform=axes.transData,
                   ha="center", va="center", color="white" if share < 0.55 else "black",
                   size=15 if len(labels) < 6 else 10 if len(labels) < 9 else 8)
    axes.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) < 4 else 35, family=_fonts()[0],
                    ha="center" if len(labels) < 4 else "right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels, family=_fonts()[0])
    _axes_names(axes, "predicted" if len(labels) < 4 else "", "")
    axes.tick_params(labelsize=11 if len(labels) < 4 else 9)


def _draw_confusions(axes, plot):
    """Many genres: which are most often taken for which, as bars with their names on them."""
    shown = plot["confusions"][:CONFUSIONS_SHOWN]
    shares = [share for _, _, _, share in shown]
    axes.barh(range(len(shown)), shares, color="#A9CCE3", height=0.82)
    for row, (actual, predicted, count, share) in enumerate(shown):
        _write(axes, 0.012, row, f"{_drawable(actual, 15)} → {_drawable(predicted, 15)}",
               transform=axes.get_yaxis_transform(), va="center", size=11.5)
        _write(axes, 0.99, row, f"{share:.0%} ({count:,})", transform=axes.get_yaxis_transform(), va="center",
               ha="right", size=12, color=GREY)
    axes.set(xlim=(0, max(0.01, max(shares)) * 1.35), ylim=(CONFUSIONS_SHOWN - 0.5, -0.5), yticks=[], xticks=[])
    axes.spines[:].set_visible(False)
    _axes_names(axes, "actual → predicted, share of the actual genre (songs)", "")


def _draw_clusters(axes, plot):
    """The songs on their first two principal components, coloured and numbered by cluster."""
    x, y, cluster = zip(*plot["points"])
    sizes = plot.get("sizes") or [cluster.count(i) for i in range(max(cluster) + 1)]
    for i, label in enumerate(plot.get("labels") or [""] * len(sizes)):
        mine = [k for k in range(len(cluster)) if cluster[k] == i]
        name = _label(f"{i + 1} {label}", 21) + f" {sizes[i] / max(1, sum(sizes)):.0%}"
        axes.scatter([x[k] for k in mine], [y[k] for k in mine], s=9, alpha=0.6, linewidths=0,
                     color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)],
                     label=name if i < CLUSTERS_NAMED else None)
        if mine:
            middle = [sorted(values[k] for k in mine)[len(mine) // 2] for values in (x, y)]
            _write(axes, *middle, str(i + 1), transform=axes.transData, ha="center", va="center", size=14,
                   weight="bold",
                   bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "boxstyle": "circle,pad=0.2"})
    low, high = axes.get_ylim()
    legend_lines = math.ceil(min(len(sizes), CLUSTERS_NAMED) / 2)
    axes.set(xticks=[], yticks=[], ylim=(low - (high - low) * 0.1 * legend_lines, high))
    _axes_names(axes, "first principal component", "second")
    axes.legend(loc="lower left", ncols=2, frameon=False, borderaxespad=0.1, markerscale=2.5, handletextpad=0.1,
                columnspacing=0.4, handlelength=1.2, prop={"family": _fonts()[0], "size": 10})


def _draw_density(axes, plot):
    """Predicted against actual: how many songs, on a logarithmic colour scale; the dashed line is a right guess."""
    from matplotlib.colors import LogNorm
    low, high, _ = plot["edges"]
    counts = [[count or math.nan for count in row] for row in plot["density"]]
    most = max((count for row in plot["density"] for count in row), default=0)
    image = axes.imshow(counts, origin="lower", extent=(low, high, low, high), cmap="cividis", aspect="auto",
                        norm=LogNorm(1, max(2, most)))
    axes.plot([low, high], [low, high], color=PALETTE[3], linestyle="--", linewidth=2)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.set_label("songs", color=GREY, size=11)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    _axes_names(axes, "predicted", "actual")


def _draw_similar(axes, plot):
    """How many of the neighbours at each rank share the song's genre, against chance."""
    shares, chance = plot["same_genre_at"], plot["by_chance"]
    ranks = range(1, len(shares) + 1)
    axes.plot(ranks, shares, color=PALETTE[0], marker="o", linewidth=2.5, markersize=8)
    axes.axhline(chance, color=PALETTE[3], linestyle="--", linewidth=2)
    _write(axes, len(shares), chance, f"by chance {chance:.1%}", transform=axes.transData, ha="right", size=13,
           color=SIGNAL["failed"])
    axes.set(ylim=(0, min(1.05, max(*shares, chance) * 1.25 + 0.01)), xticks=list(ranks))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y", color="#DDDDDD")
    axes.spines[["top", "right"]].set_visible(False)
    _axes_names(axes, "rank of the neighbour", "of the song's own genre")


def _axes_names(axes, x, y):
    axes.set_xlabel(x, color=GREY, size=12)
    axes.set_ylabel(y, color=GREY, size=12)
    axes.tick_params(labelsize=11, colors=INK)


def _draw_history(axes, result, history):
    """The primary metric of every model over the last runs; a line breaks where a run failed or was held back."""
    points = {(row["run"], row["model"]): (row["status"], row.get("value")) for row in history}
    for name, model in (result.get("models") or {}).items():
        value = next(iter(model["metrics"].values())) if model.get("metrics") else None
        points[result["started_at"], name] = (model["status"], value)
    runs = sorted({run for run, _ in points})[-RUNS_SHOWN:]
    ends = []
    for i, name in enumerate(dict.fromkeys(name for run, name in points if run in runs)):
        style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
        mine = [(at, *points[run, name]) for at, run in enumerate(runs) if (run, name) in points]
        good = [value if status == "trained" and value is not None else math.nan for _, status, value in mine]
        last = next((value for value in reversed(good) if value == value), None)
        if last is not None:
            axes.plot([at for at, _, _ in mine], good, linewidth=2, markersize=6, **style)
            ends.append((last, name, style["color"]))
        before = next((value for value in good if value == value), 0)
        for (at, status, _), value in zip(mine, good):
            before = value if value == value else before
            if value != value:
                axes.plot(at, before, marker="x", color=style["color"], markersize=10, markeredgewidth=2.5)
    _write(axes, 0, 1.05, f"last {len(runs)} runs" if len(runs) > 1 else "first run", size=18, weight="bold")
    if any(status != "trained" for (run, _), (status, _) in points.items() if run in runs):
        _write(axes, 1, 1.05, "× failed or held back", size=12, color=GREY, ha="right")
    _end_labels(axes, ends)
    axes.set_xlim(-0.5, max(len(runs) - 0.5, 0.5))
    ticks = sorted({round(k * (len(runs) - 1) / 4) for k in range(5)}) if runs else []
    axes.set_xticks(ticks, [_label(runs[at][5:10]) for at in ticks])
    axes.grid(axis="y", color="#DDDDDD")
    axes.spines[["top", "right"]].set_visible(False)
    _axes_names(axes, "", "")


def _end_labels(axes, ends):
    """Names at the right ends of the lines, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    gap, at = (high - low) / 12, -math.inf
    for value, name, color in sorted(ends):
        at = max(value, at + gap)
        _write(axes, 1.01, at, plain(name, 14), transform=axes.get_yaxis_transform(), va="center", size=13,
               weight="bold", color=color)


# -------------------------------------------------------------------------------------------------- Discord

def webhook_url():
    """DISCORD_WEBHOOK_URL from the environment, else from .env; None when unset or empty: nothing is posted then."""
    return setting("DISCORD_WEBHOOK_URL").strip() or None


def fit(text, limit):
    """`text` cut to `limit` UTF-16 code units, with an ellipsis, never within a character or an escape."""
    if len(text.encode("utf-16-le")) <= 2 * limit:
        return text
    cut = text.encode("utf-16-le")[:2 * max(0, limit - 1)].decode("utf-16-le", "ignore")
    return cut.rstrip("\\") + "…" if limit > 0 else ""


def escape(text):
    """`text` as Discord shows it literally: no markdown, no mention, no link."""
    text = re.sub(r"([\\*_~`|\[\]<])", r"\\\1", plain(text)).replace("@", "@\u200b").replace("://", ":\u200b//")
    return re.sub(r"^([#>+-]|\d+(?=\.))", "\u200b\\1", text)


def discord_payload(result):
    """The JSON of the message: one embed, green, yellow or red, a field per model, within all limits of Discord."""
    models = result.get("models") or {}
    status = result["status"]
    if status == "completed" and (result.get("warnings") or any(m["status"] != "trained" for m in models.values())):
        status = "partial"
    title = fit(f"{SIGN[status]} {escape(result.get('message') or result['status'])}", TITLE)
    footer = fit(", ".join(facts(result)).replace("@", "@\u200b") or "ml-training-pipeline", FOOTER // 8)
    shown = list(models.items())[:FIELDS]
    room = min(VALUE, (EMBEDS - 2 * TITLE - FOOTER // 8) // max(1, len(shown)) - 80)  # leaves the description some
    fields = [{"name": fit(f"{SIGN[model['status']]} {escape(name)}", 64),
               "value": fit(_field(model), room), "inline": model["status"] == "trained"} for name, model in shown]
    lines = [escape(result["error"])] if result.get("error") else []
    lines += [f"⚠️ {escape(warning)}" for warning in result.get("warnings") or ()]
    lines += [escape(csv_line(result))] if result.get("csv") else []
    if result.get("finish_command"):
        command = plain(result["finish_command"]).replace("`", "'").replace("@", "@\u200b")
        lines.append(f"to finish the job: `{command}`")
    used = sum(len(text.encode("utf-16-le")) // 2 for text in
               [title, footer, *(part for field in fields for part in (field["name"], field["value"]))])
    embed = {"title": title, "color": COLOUR[status], "fields": fields, "footer": {"text": footer},
             "description": fit("\n".join(lines), min(DESCRIPTION, EMBEDS - used))}
    if result.get("started_at"):
        embed["timestamp"] = result["started_at"]
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def _field(model):
    """Metric, change and seconds of a model, or what went wrong; never empty, which Discord refuses."""
    metric, change = metric_and_change(model)
    figures = f"{escape(metric)} ({change})" if metric else ""
    reason = f"{STATUS[model['status']]}: {escape(model['error'])}" if model.get("error") else ""
    return "\n".join(filter(None, [figures, reason, duration(model.get("seconds") or 0)]))


def post_discord(result, url, picture=None, seconds=POST_SECONDS):
    """Post one message about the run, with `picture` (path of a PNG) if given; True when Discord took it.

    Never raises and never takes longer than `seconds`, whatever the network does: a message must not cost a model.
    """
    def post():
        try:
            return _post(result, url, picture, time.monotonic() + seconds)
        except Exception as error:
            log.warning("Discord was not told: %s: %s", type(error).__name__, _scrub(error, url))
            return False
    if not url:
        return False
    told = _within(seconds, post)
    if told is None:
        log.warning("Discord was not told: no answer within %.0f s", seconds)
    return bool(told)


def check_webhook(url):
    """(fine, sentence) after a GET of the webhook, which posts nothing."""
    if not url:
        return True, "DISCORD_WEBHOOK_URL is not set: nothing is posted"
    if _malformed(url):
        return False, _malformed(url)
    status, _, body = _within(CHECK_SECONDS, lambda: _request(url, None, {}, CHECK_SECONDS)) or (NO_ANSWER, {}, "")
    return (True, "the Discord webhook answers") if status == 200 else (False, _scrub(_reason(status, body), url))


def _within(seconds, function):
    """What `function` returns, or None when it takes longer: looking up a name knows no timeout of its own."""
    answer = []
    thread = threading.Thread(target=lambda: answer.append(function()), daemon=True, name="discord")
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def _malformed(url):
    """The sentence to log when `url` cannot be a webhook, else None; the url may hold the secret and is not quoted."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if good and url.isascii() and url.isprintable() and " " not in url:
        return None
    return f"DISCORD_WEBHOOK_URL is not a web address (https://discord.com/api/webhooks/...): {COPY_IT}"


def _scrub(text, url):
    """`text` without the webhook's secret, wherever it stands."""
    text = plain(text, 600)
    for secret in [url, *(part for part in re.split(r"[/?&=]", url)[3:] if len(part) > 8 and part != "webhooks")]:
        text = text.replace(secret, "***")
    return text


def _post(result, url, picture, deadline):
    if problem := _malformed(url):
        log.warning("%s", problem)
        return False
    payload, image = discord_payload(result), None
    try:
        image = Path(picture).read_bytes() if picture else None
    except OSError as error:
        log.warning("the Discord message goes without the picture: %s", plain(error))
    status, body = _send(url, *_encode(payload, image), deadline)
    if image and status in (400, 413):
        log.warning("Discord refused the picture (%d), trying without: %s", status, _scrub(body, url))
        status, body = _send(url, *_encode(payload, None), deadline)
    if 200 <= status < 300:
        return True
    log.warning("Discord was not told: %s", _scrub(_reason(status, body), url))
    return False


def _encode(payload, image):
    """(body, headers): JSON alone, or multipart with the picture, to which the embed refers."""
    if not image:
        return json.dumps(payload).encode(), {"Content-Type": "application/json"}
    embeds = [payload["embeds"][0] | {"image": {"url": "attachment://report.png"}}]
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name='
    text = json.dumps(payload | {"embeds": embeds})
    body = (f'{head}"payload_json"\r\nContent-Type: application/json\r\n\r\n{text}\r\n'
            f'{head}"files[0]"; filename="report.png"\r\nContent-Type: image/png\r\n\r\n').encode()
    return (body + image + f"\r\n--{boundary}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def _send(url, data, headers, deadline):
    """(status, body) of a POST, after obeying 429 and retrying what may heal as long as `deadline` allows."""
    failures = limited = 0
    while True:
        remaining = deadline - time.monotonic()
        status, reply, body = _request(url, data, headers, max(0.1, min(TIMEOUT, remaining)))
        if status == 429 and limited < RATE_LIMITED:
            limited, wait = limited + 1, _retry_after(reply, body)
        elif (status == NO_CONNECTION or status >= 500) and failures < len(RETRY_DELAYS):
            failures, wait = failures + 1, RETRY_DELAYS[failures]
        else:
            return status, body
        if time.monotonic() + wait >= deadline:
            return status, body
        log.info("Discord: %s; next try in %.1f s", _scrub(_reason(status, body), url), wait)
        time.sleep(wait)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """None: urllib would turn the POST into a GET, lose the message and call it a success."""


def _request(url, data, headers, timeout):
    """(status, headers, first 2,000 characters of the body) of one request; no exception for what networks do."""
    request = urllib.request.Request(url, data, {"User-Agent": USER_AGENT} | headers)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as reply:
            return reply.status, reply.headers, reply.read(2000).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read(2000).decode("utf-8", "replace")
    except TimeoutError:  # after sending: the message may have arrived, so it is not sent twice
        return NO_ANSWER, {}, f"no answer within {timeout:.0f} s"
    except (OSError, urllib.error.URLError) as error:
        return NO_CONNECTION, {}, str(getattr(error, "reason", error))


def _retry_after(headers, body):
    """Seconds to wait after a 429: from the body, else the header, else one; at least a little."""
    try:
        wait = float(json.loads(body)["retry_after"])
    except (ValueError, KeyError, TypeError):
        wait = float(headers.get("Retry-After") or 1) if str(headers.get("Retry-After") or 1).isdigit() else 1.0
    return max(0.2, wait) if wait == wait else 1.0


def _reason(status, body):
    """The sentence for a reply that is not a success."""
    known = {NO_CONNECTION: "no connection", NO_ANSWER: "no answer in time",
             401: f"the webhook's token is wrong; {COPY_IT}",
             404: f"the webhook is gone (404); make a new one and {COPY_IT}", 429: "too many messages (429)"}
    return f"{known.get(status, f'the server answered {status}')}" + (f": {body}" if body and status != 404 else "")
