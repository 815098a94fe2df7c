"""Writes what was measured as Markdown tables, each value with its ratio to sidebearer's."""

SHAPES = ["plain", "h1", "h2", "tunnel"]
BASE = "sidebearer"


class Column:
    def __init__(self, title, what, digits=0, ratio=True, busy=None):
        self.title, self.what, self.digits, self.ratio, self.busy = title, what, digits, ratio, busy

    def cell(self, samples, contender):
        value = samples.median(contender, self.what)
        if value is None:
            return "-"
        text = f"{value:,.{self.digits}f}"
        if self.busy and (busy := samples.median(contender, self.busy)) is not None:
            text += f" ({busy:.0%} busy)"
        return text + self.compared(samples, contender, value)

    def compared(self, samples, contender, value):
        base = samples.median(BASE, self.what)
        # Against nothing, or of what is a difference that can be negative, a ratio says nothing.
        if not self.ratio or contender == BASE or not base or base <= 0 or value <= 0:
            return ""
        return f" ({value / base:.2f} x)"


TABLES = {
    "CPU ms of the proxy per 1,000 requests (user + system)": [
        Column(title, f"cpu.{shape}", 1) for title, shape in zip(["plain", "intercepted h1", "intercepted h2", "tunnel"], SHAPES)
    ],
    "Requests/s at saturation; where the proxy's core was not busy all the time, the other core was the limit": [
        Column(title, f"rate.{shape}", busy=f"busy.{shape}", ratio=False)
        for title, shape in zip(["plain", "intercepted h1", "intercepted h2", "tunnel"], SHAPES)
    ],
    "Latency in µs that is added to direct's at 200 requests/s; of direct, the latency itself": [
        Column(f"{shape} {name}", f"added_{name}.{shape}") for shape in ("h1", "h2") for name in ("p50", "p99")
    ],
    "Memory": [
        Column("RSS idle, MiB", "rss.idle", 1),
        Column("RSS after load, MiB", "rss.load", 1),
        Column("RSS with idle intercepted connections, MiB", "rss.connections", 1),
        Column("KiB per connection", "rss.connection", 1),
    ],
    "Start": [
        Column("to listening, ms", "start.ready", 1),
        Column("to the first 200 with the token, ms", "start.first", 1),
    ],
    "A new connection: CONNECT, TLS, first request": [
        Column("same host, p50 µs", "new_p50.same"),
        Column("CPU ms", "new_cpu.same", 2),
        Column("distinct hosts, p50 µs", "new_p50.distinct"),
        Column("CPU ms", "new_cpu.distinct", 2),
    ],
    "Bulk: CPU s per GiB": [Column(shape, f"bulk_cpu.{shape}", 2) for shape in ("h1", "h2", "tunnel")],
    "Bulk: MiB/s": [Column(shape, f"bulk_rate.{shape}") for shape in ("h1", "h2", "tunnel")],
}


def write(samples, contenders):
    """All tables, and below them what did not work."""
    parts = [table(title, columns, samples, contenders) for title, columns in TABLES.items()]
    return "\n\n".join([*parts, *problems(samples, contenders)])


def table(title, columns, samples, contenders):
    lines = [
        "| " + " | ".join([title, *(column.title for column in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, its_title in contenders.items():
        cells = [column.cell(samples, name) for column in columns]
        if set(cells) == {"-"}:
            if name not in samples.problems:
                continue
            cells[0] = "did not run: " + next(reversed(samples.problems[name].values()))[:80]
        lines.append("| " + " | ".join([its_title, *cells]) + " |")
    return "\n".join(lines)


def problems(samples, contenders):
    lines = [
        f"- {contenders[name]}: {what}: {reason}"
        for name, its in samples.problems.items()
        for what, reason in its.items()
    ]
    return ["\n".join(["Did not run:", "", *lines])] if lines else []
