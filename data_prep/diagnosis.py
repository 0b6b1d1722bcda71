"""Says in plain language what goes wrong in a run of `jetway prep`, why, and what to do about it.

Every finding names what fails, how much of it, the likely cause and the remedy. Nothing is said when all is well: a cause must
have cost `MIN_SAMPLES` samples and the share of the input that its rule names. The thresholds are set so that a usual crawl of an
old list (links that are gone, some dead hosts) brings one or two findings, not ten.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_prep.config import PrepConfig
from data_prep.heavy_hitters import ranked
from data_prep.reasons import explain, matches, stage_of
from data_prep.run_stats import PartStats, quantile
from data_prep.units import duration_text, share_text

MIN_SAMPLES = 20
"""A cause that cost fewer samples is chance."""
MIN_SAMPLES_EARLY = 100
"""The same while the run goes on: the first tasks may hold one odd corner of the input."""
LOW_SUCCESS = 0.5
"""Share kept below which the whole is commented on."""

HEALING = ("dns", "timeout", "connection", "circuit_open", "http_408", "http_429", "5xx", "wrong_length")
"""What may succeed on another day, as `jetway retry --reason` takes it. Not 404, not what a host refuses on purpose."""

RESOLVER_FAULTS = ("SERVFAIL", "name server refused", "name server timed out", "name server unreachable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that goes wrong."""

    code: str
    """Stable name: of two findings with the same one, people need only one."""
    num_samples: int
    """Samples that it cost."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A finding that needs no more than counting: `reasons` cost at least `share` of the input."""

    reasons: tuple[str, ...]
    share: float
    advice: str


_RULES = (
    _Rule(
        reasons=("http_404", "http_410"),
        share=0.3,
        advice="the links are gone, as in every old list; asking again brings nothing. Where the list has a newer edition, take that",
    ),
    _Rule(
        reasons=("5xx",), share=0.05, advice="the servers are overloaded or broken; lower download.per_host if they are few, and retry on another day"
    ),
    _Rule(
        reasons=("robots", "opt_out"),
        share=0.05,
        advice="their owners do not want it, and nothing needs mending; expect fewer samples than the list has rows",
    ),
    _Rule(
        reasons=("redirects",), share=0.05, advice="consent walls and moved sites redirect in circles; download.max_redirects is worth raising once"
    ),
    _Rule(
        reasons=("private_address",),
        share=0.02,
        advice="the list, or a name server, points into a private network; name the network in download.allowed_networks if it is yours",
    ),
    _Rule(
        reasons=("bad_url",),
        share=0.05,
        advice="the column may hold something else than addresses; check columns.url, and the list for missing https://",
    ),
    _Rule(
        reasons=("missing_file",),
        share=0.05,
        advice="files were moved or deleted, or the paths are not relative to the table's own folder; check a few from the ledger",
    ),
    _Rule(reasons=("unreadable",), share=0.02, advice="the file system refuses to read: check permissions and the health of the disk or mount"),
    _Rule(
        reasons=("missing_caption",),
        share=0.1,
        advice="check columns.caption (the name of the column or JSON key), or keep such samples with missing_caption=empty",
    ),
    _Rule(reasons=("bad_caption", "bad_json"), share=0.05, advice="the texts are not UTF-8 or not JSON; convert them first"),
    _Rule(
        reasons=("too_small",),
        share=0.2,
        advice="the addresses may lead to thumbnails; look for a column of the full-size ones, or lower limits.min_side",
    ),
    _Rule(reasons=("file_too_large", "too_many_pixels"), share=0.05, advice="raise limits.max_file_bytes or limits.max_pixels if they are wanted"),
    _Rule(reasons=("aspect_ratio",), share=0.1, advice="banners and rulers, as a rule; raise limits.max_aspect_ratio if they are wanted"),
    _Rule(
        reasons=("corrupt", "truncated", "wrong_length"),
        share=0.05,
        advice="files were cut off on the way; a proxy or an earlier incomplete copy does that. Check one of them from the ledger by hand",
    ),
    _Rule(reasons=("animated",), share=0.1, advice="image.animated=first_frame keeps the first picture of each"),
    _Rule(reasons=("unsupported_mode",), share=0.05, advice="convert them to 8-bit RGB first"),
)


def diagnose(stats: PartStats, config: PrepConfig) -> list[str]:
    """Plain-language findings about a finished run, those that cost most first; empty when all is well."""
    return [finding.text for finding in findings(stats, config)]


def findings(stats: PartStats, config: PrepConfig, *, min_samples: int = MIN_SAMPLES) -> list[Finding]:
    """`diagnose`, with a stable code to each text; the advice to retry comes last."""
    checks: tuple[Callable[[PartStats, PrepConfig], Iterator[Finding]], ...] = (
        *(_dns, _too_many_requests, _forbidden, _timeouts, _tls, _connections, _circuits),
        *(_web_pages, _copies, _filters, _simple),
    )
    found = [finding for check in checks for finding in check(stats, config) if finding.num_samples >= min_samples]
    found.sort(key=lambda finding: (-finding.num_samples, finding.code))
    for last in (_low_success(stats, found), _retry(stats, config)):
        if last is not None and last.num_samples >= min_samples:
            found.append(last)
    return found


class Watch:
    """Findings while a run goes on, each of them once."""

    def __init__(self, config: PrepConfig) -> None:
        self._config = config
        self._told: set[str] = {"retry"}  # that advice is for the end

    def new(self, stats: PartStats) -> list[str]:
        """What the statistics up to now say that no earlier call has said."""
        fresh = [one for one in findings(stats, self._config, min_samples=MIN_SAMPLES_EARLY) if one.code not in self._told]
        self._told.update(one.code for one in fresh)
        return [one.text for one in fresh]


def _dns(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number = stats.dropped.get("dns", 0)
    if not number or number < 0.02 * stats.read:
        return
    details = stats.failed_details.get("dns", {})
    resolver = {name: details[name] for name in RESOLVER_FAULTS if name in details}
    if sum(resolver.values()) >= 0.5 * number:
        name, most = ranked(resolver.items())[0]
        text = (
            f"{share_text(most, stats.num_dropped)} of the failures are DNS {name} ({_of_all(number, stats)} did not resolve): the resolver "
            "gives up under this many questions. Run a caching one on this machine (unbound or knot-resolver) and name it in /etc/resolv.conf, "
            f"or lower download.max_concurrency ({config.download.max_concurrency} now)"
        )
        yield Finding(code="dns-resolver", num_samples=number, text=text)
    elif number >= 0.2 * stats.read:
        cause = f", most of them {next(iter(details))}" if details else ""
        text = (
            f"the host names of {_of_all(number, stats)} do not resolve{cause}: the domains are gone, as in every old list, "
            "or this machine's resolver filters. Compare one of them from the ledger with `dig @9.9.9.9 NAME`"
        )
        yield Finding(code="dns-gone", num_samples=number, text=text)


def _too_many_requests(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number = stats.dropped.get("http_429", 0)
    if number >= 0.01 * stats.read:
        text = (
            f"{_of_all(number, stats)} were refused with 429, too many requests{_mostly_from(stats, 'http_429')}: "
            f"lower download.per_host ({config.download.per_host} now) or raise download.max_retry_after_s "
            f"({config.download.max_retry_after_s:g} now), or shuffle the list so that hosts mix, and retry later"
        )
        yield Finding(code="http-429", num_samples=number, text=text)


def _forbidden(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number = stats.dropped.get("http_403", 0) + stats.dropped.get("http_401", 0)
    hosts = ranked(stats.failed_hosts.get("http_403", {}).items(), 1)
    if number >= 0.02 * stats.read and hosts and hosts[0][1] >= 0.3 * number:
        host, most = hosts[0]
        text = (
            f"{host} refuses: {share_text(most, number)} of the {number:,} answers 403 and 401 are its own. It wants a login, checks the referring "
            "page, or has blocked this network. Ask its owner, or list it in filters.blocked_domains to save the requests"
        )
        yield Finding(code=f"http-403-{host}", num_samples=number, text=text)
    elif number >= 0.1 * stats.read:
        text = (
            f"{_of_all(number, stats)} were refused with 403 or 401, by many hosts: this network's addresses may be on a block list, as those of "
            "most data centres are"
            + ("" if config.download.contact else ", and download.contact is empty, which operators take for abuse")
            + ". Try the same rows from another network to see"
        )
        yield Finding(code="http-403", num_samples=number, text=text)


def _timeouts(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number = stats.dropped.get("timeout", 0)
    if number < 0.05 * stats.read:
        return
    download, times = config.download, stats.histograms.get("download_s", ())
    slow = quantile("download_s", times, 0.9) if any(times) else 0.0
    what = f"{_of_all(number, stats)} timed out"
    if slow >= 0.25 * download.timeout_s:
        text = (
            f"{what}, and the slowest tenth of the good downloads takes {duration_text(slow)} too: more is being asked for than the link carries. "
            f"Lower download.max_concurrency ({download.max_concurrency} now) or the number of tasks (ray.num_cpus), or raise "
            f"download.timeout_s ({download.timeout_s:g} now)"
        )
        yield Finding(code="timeout-link", num_samples=number, text=text)
    else:
        text = (
            f"{what}{_mostly_from(stats, 'timeout')}, although the good downloads are quick: dead hosts or a firewall that drops packets. A lower "
            f"download.connect_timeout_s ({download.connect_timeout_s:g} now) loses less time on them; retry on another day"
        )
        yield Finding(code="timeout-hosts", num_samples=number, text=text)


def _tls(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number, details = stats.dropped.get("tls", 0), stats.failed_details.get("tls", {})
    if number < 0.03 * stats.read:
        return
    prefix = "certificate verify failed"
    if details.get(f"{prefix}: unknown issuer", 0) >= 0.5 * number:
        cause = (
            "this machine does not know the issuers. Update its CA bundle (the packages ca-certificates and certifi), then retry with --reason tls"
        )
    elif details.get(f"{prefix}: expired", 0) >= 0.5 * number:
        cause = "the certificates count as expired. Check this machine's clock first; otherwise the hosts neglect theirs, and nothing is to be done"
    elif details.get(f"{prefix}: self-signed", 0) >= 0.5 * number:
        cause = "self-signed certificates. A proxy that opens TLS looks like this: add its certificate to the CA bundle (SSL_CERT_FILE)"
    else:
        cause = f"{next(iter(details), 'no cause given')}. Old hosts are usual; if well-known ones are among them, update the CA bundle and OpenSSL"
    yield Finding(code="tls", num_samples=number, text=f"the TLS handshake of {_of_all(number, stats)} failed{_mostly_from(stats, 'tls')}: {cause}")


def _connections(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number, details = stats.dropped.get("connection", 0), stats.failed_details.get("connection", {})
    if files := details.get("too many open files", 0):
        text = (
            f"{_of_all(files, stats)} failed because this process may not open more files: raise the limit (`ulimit -n 65536`), "
            f"or lower download.max_concurrency ({config.download.max_concurrency} now)"
        )
        yield Finding(code="open-files", num_samples=files, text=text)
    if details.get("Network is unreachable", 0) >= 0.5 * number and number >= 0.02 * stats.read:
        text = f"{_of_all(number, stats)} found no route: this machine lacks a network, or IPv6 that its name server promises. Check `ip route`"
        yield Finding(code="no-route", num_samples=number, text=text)
    elif number >= 0.1 * stats.read:
        cause = f" ({next(iter(details))})" if details else ""
        text = (
            f"the connections of {_of_all(number, stats)} broke{cause}{_mostly_from(stats, 'connection')}: dead hosts, or a firewall or NAT table "
            f"that cannot hold as many connections as there are. Try a lower download.max_concurrency ({config.download.max_concurrency} now)"
        )
        yield Finding(code="connection", num_samples=number, text=text)


def _circuits(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number, hosts = stats.dropped.get("circuit_open", 0), ranked(stats.failed_hosts.get("circuit_open", {}).items(), 5)
    if number < 0.02 * stats.read:
        return
    few = ", ".join(host for host, _ in hosts)
    where = f" of {few}" if hosts and sum(most for _, most in hosts) >= 0.5 * number else ""
    text = (
        f"{_of_all(number, stats)}{where} were not asked for, because their hosts had failed {config.download.host_failures} times in a row: "
        "they are down or block this network. Retry on another day"
    )
    yield Finding(code="circuit-open", num_samples=number, text=text)


def _web_pages(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    number, details = stats.dropped.get("not_an_image", 0), stats.failed_details.get("not_an_image", {})
    if number < 0.03 * stats.read:
        return
    if details.get("HTML page", 0) >= 0.5 * number:
        what = "web pages, not images: login forms, consent walls and notices that the picture is gone"
    else:
        what = "no images of a known format"
    remedy = "List such hosts in filters.blocked_domains to save the requests" if stats.num_fetched else "Look at some of them: the ledger names all"
    text = f"{_of_all(number, stats)} are {what}{_mostly_from(stats, 'not_an_image')}. {remedy}"
    yield Finding(code="web-pages", num_samples=number, text=text)


def _copies(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    for reason in ("duplicate", "near_duplicate_image"):
        number, hosts = stats.dropped.get(reason, 0), ranked(stats.failed_hosts.get(reason, {}).items(), 1)
        if hosts and hosts[0][1] >= 0.02 * stats.read and hosts[0][1] >= 0.3 * number:
            host, most = hosts[0]
            text = (
                f"{_of_all(most, stats)} from {host} are copies of one another: it probably answers with a placeholder picture. "
                "Look at the one that was kept, and list the host in filters.blocked_domains or the picture in filters.takedown"
            )
            yield Finding(code=f"copies-{host}", num_samples=most, text=text)


def _filters(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    """A filter that the user asked for may drop much, but half of everything looks like a wrong bound."""
    for reason, number in stats.dropped.items():
        if stage_of(reason) == "filters" and reason not in ("too_small", "aspect_ratio") and number >= 0.5 * stats.read:
            text = (
                f"{_of_all(number, stats)} fall to one filter ({reason}: {explain(reason)}): look at a few in the ledger before you keep that bound"
            )
            yield Finding(code=f"filter-{reason}", num_samples=number, text=text)


def _simple(stats: PartStats, config: PrepConfig) -> Iterator[Finding]:
    for rule in _RULES:
        by_reason = {reason: number for reason, number in stats.dropped.items() if matches(reason, frozenset(rule.reasons))}
        number = sum(by_reason.values())
        if number and number >= rule.share * stats.read:
            first = ranked(by_reason.items())[0][0]
            text = f"{_of_all(number, stats)} were dropped for {_names(by_reason)} ({explain(first)}){_mostly_from(stats, first)}: {rule.advice}"
            yield Finding(code=rule.reasons[0], num_samples=number, text=text)


def _low_success(stats: PartStats, found: list[Finding]) -> Finding | None:
    if stats.kept >= LOW_SUCCESS * stats.read or sum(finding.num_samples for finding in found) >= 0.5 * stats.num_dropped:
        return None  # all is well, or said already
    main = ", ".join(f"{reason} {share_text(number, stats.read)}" for reason, number in ranked(stats.dropped.items(), 4))
    text = (
        f"only {share_text(stats.kept, stats.read)} of {stats.read:,} samples are kept ({main}): no single cause stands out; "
        "the ledger names the reason of every one"
    )
    return Finding(code="low-success", num_samples=stats.num_dropped, text=text)


def _retry(stats: PartStats, config: PrepConfig) -> Finding | None:
    healing = {name: sum(number for reason, number in stats.dropped.items() if matches(reason, frozenset((name,)))) for name in HEALING}
    if "NXDOMAIN" in (details := stats.failed_details.get("dns", {})):
        healing["dns"] -= details["NXDOMAIN"]  # such a name does not come back
    healing = {name: number for name, number in healing.items() if number > 0}
    number = sum(healing.values())
    if number < 0.01 * stats.read:
        return None
    wanted = ",".join(name for name, _ in ranked(healing.items()))
    text = f"{_of_all(number, stats)} may succeed on another day: `jetway retry {config.output or 'DATASET'} --reason {wanted}`"
    return Finding(code="retry", num_samples=number, text=text)


def _of_all(number: int, stats: PartStats) -> str:
    return f"{number:,} samples ({share_text(number, stats.read)})"


def _mostly_from(stats: PartStats, reason: str) -> str:
    """`, mostly by a.org and b.com` where at most three hosts hold half of them."""
    number, hosts = stats.dropped.get(reason, 0), ranked(stats.failed_hosts.get(reason, {}).items(), 3)
    if not hosts or sum(most for _, most in hosts) < 0.5 * number:
        return ""
    return f", mostly from {_names(host for host, _ in hosts)}"


def _names(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
