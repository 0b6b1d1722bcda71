"""Why a sample is not in the data set: the stable codes that ledger, statistics and `jetway retry --reason` share."""

import re

REASONS = {
    # The input and its text.
    "bad_caption": "caption file that is not UTF-8 text",
    "bad_json": "JSON file that is not an object",
    "bad_url": "address that is no http, https or s3 URL",
    "caption_too_long": "caption above limits.max_caption_bytes or filters.max_caption_words",
    "caption_too_short": "caption below filters.min_caption_chars or filters.min_caption_words",
    "language": "caption in none of filters.languages",
    "missing_caption": "no caption for this image",
    "missing_file": "no such image file",
    "unreadable": "the file system refused to read the file",
    # The lists that the user gave.
    "blocked_domain": "domain on filters.blocked_domains",
    "blocked_text": "caption matches filters.blocked_text",
    "blocked_url": "address on filters.blocked_urls",
    "takedown": "on a takedown list, by address, content hash or perceptual hash",
    # The network.
    "circuit_open": "the host failed too often in a row and was left alone",
    "connection": "the connection was refused, reset or broken off",
    "dns": "the host name did not resolve",
    "opt_out": "the response opts out of machine learning (X-Robots-Tag, TDM-Reservation)",
    "private_address": "the host is a loopback, private or link-local address",
    "protocol": "the response is not valid HTTP",
    "redirects": "too many redirects, or a redirect to nowhere",
    "robots": "robots.txt disallows the address",
    "timeout": "no whole answer within download.timeout_s",
    "tls": "the certificate or the TLS handshake was refused",
    "wrong_length": "fewer bytes arrived than announced",
    # The image.
    "animated": "several frames or pages",
    "aspect_ratio": "longer side / shorter side above limits.max_aspect_ratio",
    "corrupt": "the decoder found an error in the file",
    "file_too_large": "file above limits.max_file_bytes",
    "not_an_image": "no known image format",
    "too_many_pixels": "width x height above limits.max_pixels, or more to decode than limits.max_decode_bytes",
    "too_small": "shorter side below limits.min_side",
    "truncated": "the file ends too early",
    "unsupported_mode": "pixel type without a defined 8-bit meaning",
    "blank": "contrast below filters.min_contrast",
    "border": "constant border wider than filters.max_border",
    "low_quality": "estimated JPEG quality below filters.min_jpeg_quality",
    "upscaled": "detail below filters.min_detail: enlarged from a smaller picture",
    "score": "a score outside the bounds of filters.scores",
    # Other samples.
    "duplicate": "the same bytes as an earlier sample",
    "eval_caption": "near-duplicate of a caption of dedup.evaluation",
    "eval_image": "near-duplicate of an image of dedup.evaluation",
    "near_duplicate_caption": "near-duplicate of an earlier caption",
    "near_duplicate_image": "near-duplicate of an earlier image",
}
"""Every reason but the HTTP statuses, which are `http_` and the number. The names are stable: people select on them."""

STAGES = {
    "input": ["bad_caption", "bad_json", "bad_url", "missing_caption", "missing_file", "unreadable"],
    "lists": ["blocked_domain", "blocked_text", "blocked_url", "takedown"],
    "network": [
        "circuit_open",
        "connection",
        "dns",
        "opt_out",
        "private_address",
        "protocol",
        "redirects",
        "robots",
        "timeout",
        "tls",
        "wrong_length",
    ],
    "image": ["animated", "corrupt", "file_too_large", "not_an_image", "too_many_pixels", "truncated", "unsupported_mode"],
    "filters": [
        "aspect_ratio",
        "blank",
        "border",
        "caption_too_long",
        "caption_too_short",
        "language",
        "low_quality",
        "score",
        "too_small",
        "upscaled",
    ],
    "duplicates": ["duplicate", "eval_caption", "eval_image", "near_duplicate_caption", "near_duplicate_image"],
}
"""Where on the way from input to data set a sample can be lost, for statistics; the HTTP statuses are `network`."""

CAN_HEAL = ("circuit_open", "connection", "dns", "timeout", "wrong_length", "http_408", "http_429", "5xx")
"""What `jetway retry` tries again unless told otherwise: the network's failures of the day, not its verdicts."""

_STATUS = re.compile(r"http_(\d{3})$")


class Drop(Exception):  # noqa: N818 - a verdict about one sample, not an error of the program
    """This sample cannot be used; `reason` is a key of `REASONS` or `http_` and a status."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def explain(reason: str) -> str:
    """One line for people; empty for a code that this version does not know."""
    status = _STATUS.match(reason)
    return f"the server answered {status.group(1)}" if status else REASONS.get(reason, "")


def stage_of(reason: str) -> str:
    """The key of `STAGES` that a reason belongs to; `other` for a code that this version does not know."""
    if _STATUS.match(reason):
        return "network"
    return next((stage for stage, reasons in STAGES.items() if reason in reasons), "other")


def is_reason(text: str) -> bool:
    """Whether `text` is a reason or a group of them (`4xx`, `5xx`)."""
    return text in REASONS or bool(_STATUS.match(text)) or text in ("4xx", "5xx")


def matches(reason: str, wanted: frozenset[str]) -> bool:
    """Whether a reason is among those wanted; `5xx` stands for every `http_5..`, `4xx` for every `http_4..`."""
    status = _STATUS.match(reason)
    return reason in wanted or bool(status and f"{status.group(1)[0]}xx" in wanted)
