"""s3:// addresses, against a real S3 server of this process."""

import importlib.util
import os
from collections import Counter

import pytest

from configs.errors import UserError
from data_prep.download.budget import BASE_BYTES
from data_prep.download.objects import failure_of
from data_prep.download.retry import Failed
from data_prep.reasons import Drop
from tests.data_prep.download.conftest import fetch_all, fetch_one, reason


@pytest.fixture(scope="module")
def objects(s3_url: str) -> dict[str, bytes]:
    """Address -> content."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    contents = {
        "small.jpg": b"small",
        "a key with spaces + #?.jpg": b"odd",
        "exact.jpg": bytes(BASE_BYTES),
        "large.jpg": os.urandom(3 * BASE_BYTES + 17),
    }
    for key, data in contents.items():
        client.put_object(Bucket="bucket", Key=f"images/{key}", Body=data)
    return {f"s3://bucket/images/{key}": data for key, data in contents.items()}


def test_objects_are_read_whole(objects: dict[str, bytes]) -> None:
    answers = fetch_all(objects)
    assert [answer.data for answer in answers] == list(objects.values())
    assert [answer.num_bytes for answer in answers] == [len(data) for data in objects.values()]
    assert {answer.num_attempts for answer in answers} == {1}


def test_objects_are_judged_by_their_beginning(objects: dict[str, bytes]) -> None:
    asked = []

    def judge(prefix: bytes, size: int | None) -> None:
        asked.append((len(prefix), size))
        raise Drop("too_small", "1x1")

    answers = fetch_all(objects, judge=judge, header_bytes=4096)
    assert Counter(map(reason, answers)) == {"too_small": 4}
    assert sorted(asked) == sorted((min(len(data), 4096), len(data)) for data in objects.values())
    assert answers[3].num_bytes == BASE_BYTES, "the rest was left where it is"


def test_what_is_not_there_or_too_large(objects: dict[str, bytes]) -> None:
    missing, no_bucket, large = fetch_all(
        ["s3://bucket/images/nothing.jpg", "s3://no-such-bucket/x.jpg", "s3://bucket/images/large.jpg"], max_file_bytes=2 * BASE_BYTES
    )
    assert (reason(missing), missing.num_attempts) == ("missing_file", 1)
    assert reason(no_bucket) == "missing_file"
    assert reason(large) == "file_too_large"


def test_a_store_that_does_not_answer(objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    answer = fetch_one("s3://bucket/images/small.jpg", retries=0, timeout_s=20.0)
    assert reason(answer) in ("connection", "timeout")


def test_one_object_at_a_time_may_exceed_the_memory(objects: dict[str, bytes]) -> None:
    answers = fetch_all(list(objects) * 3, memory_bytes=BASE_BYTES, max_file_bytes=2**20)
    assert [answer.data for answer in answers] == list(objects.values()) * 3


def test_a_store_without_a_client_ends_the_job_only_where_it_is_what_was_asked_for(objects: dict[str, bytes]) -> None:
    pytest.importorskip("s3fs")
    if importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gs:// can be opened here")
    urls = ["gs://bucket/one.jpg", *objects]
    with pytest.raises(UserError, match="cannot open gs://"):
        fetch_all(urls)
    assert [reason(answer) for answer in fetch_all(urls, needs_stores=False)] == ["unreadable", *[""] * 4]


def test_what_an_error_means() -> None:
    class NoCredentialsError(Exception):
        pass

    class ReadTimeoutError(Exception):
        pass

    verdicts = [failure_of(error, "s3://b/k") for error in (FileNotFoundError(), PermissionError("no"), ReadTimeoutError(), ConnectionResetError())]
    assert [verdict.reason for verdict in verdicts if isinstance(verdict, Failed)] == ["missing_file", "http_403", "timeout", "connection"]
    assert isinstance(failure_of(NoCredentialsError(), "s3://b/k"), UserError)
    bug = KeyError("x")
    assert failure_of(bug, "s3://b/k") is bug
