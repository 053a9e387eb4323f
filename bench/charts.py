"""Charts as small SVG files, without a library: what report.py shows of a work.

    bars(title, groups, unit)        groups: [(heading, [(label, [value per round], colour key)])], horizontal, whiskers min to max
    lines(title, series, …)          series: [(label, [(x, y, low, high)], colour key)], logarithmic axes when asked for
    percentiles(title, series)       series: [(label, [(percentile, ms)], colour key)], the x axis as HDR plots have it

They have no background: text and grid are of a grey that can be read on white and on black, and so can the colours.
"""

import math
import statistics
from xml.sax.saxutils import escape

WIDTH, SIZE = 840, 13
TEXT, GRID = "#737b85", "#8b949e"
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
COLOURS = {"mqtt2mongo": "#2f81f7", "bare": "#8b949e", "insert": "#a371f7", "python": "#d29922", "node": "#3fa34d"}
OTHERS = ("#db61a2", "#e36b3d", "#1f9ea8", "#8b6f47")
DASHES = ("", "7 4", "2 3", "9 3 2 3")


def number(value):
    """For people: three digits that matter, thousands separated."""
    if value is None:
        return "–"
    size = abs(value)
    if size != 0 and size < 0.01:
        return f"{value:.2g}"
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    return f"{value:,.{digits}f}"


def text_width(text):
    return len(text) * SIZE * 0.64  # of the widest of the fonts


def colour(key, keys):
    """The colour of its kind: those that the name begins with; others in turn."""
    for name, value in COLOURS.items():
        if key.startswith(name):
            return value
    unknown = [other for other in keys if not other.startswith(tuple(COLOURS))]
    return OTHERS[unknown.index(key) % len(OTHERS)]


def dash(key, keys):
    """Several of one colour differ in their dashes."""
    same = [other for other in keys if colour(other, keys) == colour(key, keys)]
    return DASHES[same.index(key) % len(DASHES)]


class Drawing:
    """Elements, and the text of the file they make."""

    def __init__(self, title, height):
        self.title, self.height, self.parts = title, height, []
        self.text(0, 16, title, size=15, weight="bold")

    def add(self, element, **attributes):
        written = " ".join(f'{name.replace("_", "-")}="{self._value(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{element} {written}/>")

    @staticmethod
    def _value(value):
        return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value), {'"': "&quot;"})

    def text(self, x, y, text, anchor="start", size=SIZE, weight="normal"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
                          f'fill="{TEXT}">{escape(text)}</text>')

    def line(self, x1, y1, x2, y2, stroke=GRID, width=1.0, opacity=1.0, dashes=""):
        extra = {"stroke_dasharray": dashes} if dashes else {}
        self.add("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), stroke=stroke, stroke_width=width,
                 stroke_opacity=opacity, **extra)

    def path(self, points, stroke, dashes=""):
        extra = {"stroke_dasharray": dashes} if dashes else {}
        self.add("path", d="M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points), fill="none", stroke=stroke, stroke_width=2,
                 stroke_linejoin="round", **extra)

    def __str__(self):
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -8 {WIDTH + 20} {self.height + 16}" '
            f'width="{WIDTH + 20}" height="{self.height + 16}" font-family="{FONT}" role="img">', f"<title>{escape(self.title)}</title>", *self.parts,
            "</svg>", ""])


def ticks(top, wanted=5):
    """Round numbers from 0 to at least `top`."""
    if not top > 0:
        return [0, 1]
    rough = top / wanted
    scale = 10 ** math.floor(math.log10(rough))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * scale >= rough * 0.999)
    return [step * count for count in range(math.ceil(top / step * 0.9999) + 1)]


def bars(title, groups, unit):
    """Horizontal bars: the median, its whisker from the least to the most, the median in numbers behind it."""
    keys = list(dict.fromkeys(key for _, entries in groups for _, _, key in entries))
    left = max(text_width(label) for _, entries in groups for label, _, _ in entries) + 12
    height = 50 + sum((22 if heading else 6) + 24 * len(entries) for heading, entries in groups) + 30
    drawing = Drawing(title, height)
    drawing.text(WIDTH, 16, unit, "end")
    steps = ticks(max(max(values) for _, entries in groups for _, values, _ in entries))
    scale = (WIDTH - left - 90) / steps[-1]
    for step in steps:
        drawing.line(left + step * scale, 30, left + step * scale, height - 28, opacity=0.35)
        drawing.text(left + step * scale, height - 10, number(step), "middle")
    y = 34
    for heading, entries in groups:
        if heading:
            drawing.text(0, y + 15, heading, weight="bold")
        y += 22 if heading else 6
        for label, values, key in entries:
            _bar(drawing, left, y, scale, label, values, colour(key, keys))
            y += 24
    return str(drawing)


def _bar(drawing, left, y, scale, label, values, fill):
    median, low, high = statistics.median(values), min(values), max(values)
    drawing.text(left - 8, y + 14, label, "end")
    drawing.add("rect", x=float(left), y=y + 3, width=float(max(median * scale, 1)), height=15, rx=2, fill=fill)
    if high > low:
        drawing.line(left + low * scale, y + 10.5, left + high * scale, y + 10.5, TEXT, 1.5)
        for end in (low, high):
            drawing.line(left + end * scale, y + 6.5, left + end * scale, y + 14.5, TEXT, 1.5)
    drawing.text(left + high * scale + 7, y + 15, number(median))


def _legend(drawing, entries, y=40):
    """Swatch and label of each series, as many in a line as fit: the y below it."""
    x = 0
    for label, stroke, dashes in entries:
        width = 34 + text_width(label) + 16
        if x and x + width > WIDTH:
            x, y = 0, y + 20
        drawing.line(x, y - 4, x + 26, y - 4, stroke, 3, dashes=dashes)
        drawing.text(x + 32, y, label)
        x += width
    return y + 14


def _legend_lines(labels):
    count, x = 1, 0
    for label in labels:
        width = 34 + text_width(label) + 16
        if x and x + width > WIDTH:
            count, x = count + 1, 0
        x += width
    return count


class _Axis:
    """From values to pixels, linear or logarithmic."""

    def __init__(self, low, high, start, end, logarithmic=False):
        self.logarithmic = logarithmic
        self.low, self.high = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
        self.start, self.end = start, end

    def __call__(self, value):
        place = math.log10(value) if self.logarithmic else value
        span = self.high - self.low or 1
        return self.start + (place - self.low) / span * (self.end - self.start)


def _powers(low, high):
    """1, 10, 100, … around the two; with 2 and 5 between them when there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        return [10.0 ** power for power in range(first, last + 1)]
    all_of_them = [factor * 10.0 ** power for power in range(first, last + 1) for factor in (1, 2, 5)]
    below = [value for value in all_of_them if value <= low * 1.0001][-1:]
    above = [value for value in all_of_them if value >= high * 0.9999][:1]
    return [value for value in all_of_them if below[0] <= value <= max(above[0], below[0] * 2)]


def _frame(title, labels, y_unit, height=400):
    """An empty chart: the drawing, and where the plot is in it (left, top, right, bottom)."""
    height += 20 * _legend_lines(labels)
    drawing = Drawing(title, height)
    drawing.text(WIDTH, 16, y_unit, "end")
    return drawing, (64, 46 + 20 * _legend_lines(labels), WIDTH - 24, height - 46)


def _y_axis(drawing, plot, values, logarithmic):
    left, top, right, bottom = plot
    marks = _powers(min(values), max(values)) if logarithmic else ticks(max(values))
    axis = _Axis(marks[0], marks[-1], bottom, top, logarithmic)
    for mark in marks:
        drawing.line(left, axis(mark), right, axis(mark), opacity=0.35)
        drawing.text(left - 8, axis(mark) + 4.5, number(mark), "end")
    return axis


def lines(title, series, x_label, y_unit, logarithmic=True, y_logarithmic=False):
    """A line with a point at each x, and a whisker from the least to the most."""
    keys = [key for _, _, key in series]
    drawing, plot = _frame(title, [label for label, _, _ in series], y_unit)
    left, _, right, bottom = plot
    _legend(drawing, [(label, colour(key, keys), dash(key, keys)) for label, _, key in series])
    values = [end for _, points, _ in series for _, _, low, high in points for end in (low, high)]
    y_axis = _y_axis(drawing, plot, values, y_logarithmic and min(values) > 0)
    places = sorted({x for _, points, _ in series for x, _, _, _ in points})
    x_axis = _Axis(places[0], places[-1], left + 20, right - 30, logarithmic and places[0] > 0)
    last = -math.inf
    for place in places:
        if x_axis(place) - last > text_width(number(place)) + 10:
            drawing.text(x_axis(place), bottom + 19, number(place), "middle")
            last = x_axis(place)
    drawing.text((left + right) / 2, bottom + 40, x_label, "middle")
    for _, points, key in series:
        stroke = colour(key, keys)
        drawing.path([(x_axis(x), y_axis(y)) for x, y, _, _ in points], stroke, dash(key, keys))
        for x, y, low, high in points:
            drawing.line(x_axis(x), y_axis(low), x_axis(x), y_axis(high), stroke, 1.5)
            drawing.add("circle", cx=float(x_axis(x)), cy=float(y_axis(y)), r=3.5, fill=stroke)
    return str(drawing)


def percentiles(title, series):
    """Latency by percentile: each step to the right, 90 % to 99 % to 99.9 %, is as wide as the one before."""
    keys = [key for _, _, key in series]
    drawing, plot = _frame(title, [label for label, _, _ in series], "ms")
    left, _, right, bottom = plot
    _legend(drawing, [(label, colour(key, keys), dash(key, keys)) for label, _, key in series])
    curves = [sorted((share, ms) for share, ms in curve if share < 100) for _, curve, _ in series]
    heights = [ms for curve in curves for _, ms in curve if ms > 0]
    logarithmic = max(heights) > 20 * min(heights)
    y_axis = _y_axis(drawing, plot, heights, logarithmic)
    last = max(share for curve in curves for share, _ in curve)
    nines = max(1, math.ceil(-math.log10(1 - last / 100) - 1e-9))
    x_axis = _Axis(1, 10.0 ** nines, left, right - 10, True)
    for mark in [0, 50] + [round(100 - 100 / 10.0 ** power, 9) for power in range(1, nines + 1)]:
        place = x_axis(1 / (1 - mark / 100))
        drawing.line(place, plot[1], place, bottom, opacity=0.35)
        drawing.text(place, bottom + 19, f"{mark:g} %", "middle")
    drawing.text((left + right) / 2, bottom + 40, "of the messages are not slower", "middle")
    floor = min(heights)
    for curve, key in zip(curves, keys):
        points = [(x_axis(1 / (1 - share / 100)), y_axis(max(ms, floor))) for share, ms in curve]
        drawing.path(points, colour(key, keys), dash(key, keys))
    return str(drawing)
