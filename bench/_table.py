"""Measured rows as a table on the terminal: one block a case, one line a provider, the three modes side by side."""

from collections.abc import Sequence

from _results import LossRow

MODES = ("forward", "backward", "both")
OUT_OF_MEMORY = "out of memory"


def loss_table(rows: Sequence[LossRow]) -> str:
    """Blocks in the order of the rows."""
    blocks: dict[tuple[object, ...], dict[str, dict[str, LossRow]]] = {}
    for row in rows:
        case = (row.case, row.relations, row.B, row.N, row.heads, row.d_t, row.d_s, row.dtype)
        blocks.setdefault(case, {}).setdefault(row.provider, {})[row.mode] = row
    return "\n\n".join(_block(providers) for providers in blocks.values())


def _block(providers: dict[str, dict[str, LossRow]]) -> str:
    some = next(iter(next(iter(providers.values())).values()))
    title = (
        f"{some.case}   {some.relations}   B={some.B} N={some.N}   {some.heads} heads, d {some.d_t}/{some.d_s}   "
        f"{some.dtype}"
    )
    floors = {row.mode: row.floor_ms for modes in providers.values() for row in modes.values() if row.floor_ms}
    if floors:
        title += "   floor in ms: " + ", ".join(f"{mode} {floors[mode]:.3g}" for mode in MODES if mode in floors)
    head = [
        "",
        *(f"{mode} ms" for mode in MODES),
        "20 to 80 %",
        "MiB",
        "of floor",
        "x eager",
        "x compile",
        "rel. error",
    ]
    lines = [head, *(_line(name, modes) for name, modes in providers.items())]
    used = [i for i in range(len(head)) if i < 4 or any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    notes = [" ".join(sorted({row.note for row in modes.values() if row.note})) for modes in providers.values()]
    text = [
        "  " + "  ".join(line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in used)
        for line in lines
    ]
    return "\n".join(
        [title, text[0], *(f"{line}  {note}".rstrip() for line, note in zip(text[1:], notes, strict=True))]
    )


def _line(name: str, modes: dict[str, LossRow]) -> list[str]:
    """Behind the three times everything is about forward + backward, the error about the worst of the modes."""
    both = modes.get("both")
    times = [_time(modes.get(mode)) for mode in MODES]
    errors = [row.rel_error for row in modes.values() if row.rel_error is not None]
    error = f"{max(errors, key=lambda e: (e != e, e)):.1e}" if errors else ""
    if both is None or both.ms_p50 is None:
        return [name, *times, "", "", "", "", "", error]
    return [
        name,
        *times,
        f"{both.ms_p20:.3g} to {both.ms_p80:.3g}",
        _number(both.peak_mib, ".1f"),
        _number(both.pct_of_floor, ".0f", "%"),
        _number(both.speedup_vs_eager, ".2f"),
        _number(both.speedup_vs_compile, ".2f"),
        error,
    ]


def _time(row: LossRow | None) -> str:
    if row is None:
        return ""
    if row.ms_p50 is not None:
        return f"{row.ms_p50:.3f}"
    return "OOM" if row.note == OUT_OF_MEMORY else "-"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def ratios(rows: Sequence[LossRow]) -> str:
    """How many times faster fused is than eager, forward + backward: a line for the lengths of a case in a dtype."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.provider == "fused" and row.mode == "both" and row.speedup_vs_eager:
            name = f"{row.case}, {row.heads} heads, {row.dtype}"
            lines.setdefault(name, []).append(f"N={row.N} {row.speedup_vs_eager:.2f}x")
    if not lines:
        return ""
    width = max(map(len, lines))
    found = [f"  {name.ljust(width)}  {', '.join(times)}" for name, times in lines.items()]
    return "\n".join(["fused over eager, forward + backward, medians:", *found])
