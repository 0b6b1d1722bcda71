"""Numbers as people read them: bytes, durations, shares."""


def bytes_text(number: float) -> str:
    """`1.3 GiB`; three significant digits, binary units."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1000 or unit == "TiB":
            return f"{number:,.0f} {unit}" if unit == "bytes" or abs(number) >= 99.95 else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `6.5 days`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{seconds / 86_400:.1f} days"


def count_text(number: float) -> str:
    """`950`, `12.3 k`, `4.1 M`, `5.9 G`: three significant digits."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 1000 or unit == " T":
            return f"{number:,.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


def share_text(part: float, whole: float) -> str:
    """`62 %`; one decimal below 10 %, and `<0.1 %` rather than a zero for something that was there."""
    if not whole:
        return "0 %"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "<0.1 %"
    if part < whole and share > 99.5:
        return f"{min(share, 99.99):.2f} %"
    return f"{share:.1f} %" if 0 < share < 9.95 else f"{share:.0f} %"
