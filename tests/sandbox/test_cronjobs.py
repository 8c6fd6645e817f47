"""CronJobs: when they are due, what is made then, and a live one whose minute has come."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from test_controllers_live import control_plane as control_plane, until, world

from sandbox.client import JOBS, ApiError
from sandbox.controllers import cron
from sandbox.controllers.catalog import CRONJOBS
from sandbox.controllers.cronjob import due, job_of


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "after", "following"),
    [
        ("*/15 * * * *", "2026-01-01 00:00", "2026-01-01 00:15"),
        ("0 3 * * *", "2026-01-01 03:00", "2026-01-02 03:00"),
        ("30 2 1 * *", "2026-01-01 02:30", "2026-02-01 02:30"),
        ("0 0 29 feb *", "2026-01-01 00:00", "2028-02-29 00:00"),
        ("0 9-17/4 * * mon-fri", "2026-01-02 18:00", "2026-01-05 09:00"),
        ("0 0 13 * fri", "2026-01-01 00:00", "2026-01-02 00:00"),  # the 13th, or a Friday
        ("0 0 */2 * mon", "2026-01-01 00:00", "2026-01-05 00:00"),  # an odd day, and a Monday
        ("5,10 1 * * *", "2026-01-01 01:05", "2026-01-01 01:10"),
        ("@hourly", "2026-01-01 00:59", "2026-01-01 01:00"),
    ],
)
def test_the_next_time(schedule: str, after: str, following: str) -> None:
    assert cron.parse(schedule).next(at(after)) == at(following)


def test_zones_and_days_that_never_come() -> None:
    nightly = cron.parse("0 2 * * *")
    assert nightly.next(at("2026-01-01 12:00"), "Europe/Berlin") == at("2026-01-02 01:00")
    assert cron.parse("30 2 * * *").next(at("2026-03-28 12:00"), "Europe/Berlin") == at("2026-03-30 00:30"), (
        "there is no 02:30 on the day the clocks go forward"
    )
    assert cron.parse("0 0 30 2 *").next(at("2026-01-01 00:00")) is None


@pytest.mark.parametrize("wrong", ["* * * *", "60 * * * *", "5-1 * * * *", "a * * * *", "*/0 * * * *", "@sometimes"])
def test_what_is_no_schedule(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"expected|above|beyond|parse|positive|unrecognized"):
        cron.parse(wrong)


def test_of_several_missed_times_only_the_last_is_made_up_for() -> None:
    hourly = cron.parse("@hourly")
    last = "2026-01-01T00:00:00Z"
    assert due(hourly, {}, last, at("2026-01-01 05:30")) == at("2026-01-01 05:00")
    assert due(hourly, {}, last, at("2026-01-01 00:30")) is None
    assert due(hourly, {"startingDeadlineSeconds": 600}, last, at("2026-01-01 05:30")) is None
    assert due(hourly, {"startingDeadlineSeconds": 2000}, last, at("2026-01-01 05:30")) == at("2026-01-01 05:00")


def test_a_job_is_named_by_its_time() -> None:
    cronjob = {"metadata": {"name": "n", "namespace": "x", "uid": "u"}, "spec": {"jobTemplate": {"spec": {"a": 1}}}}
    made = job_of(cronjob, at("2026-01-01 05:00"))
    assert made["metadata"]["name"] == f"n-{int(at('2026-01-01 05:00').timestamp()) // 60}"
    assert made["metadata"]["annotations"] == {
        "batch.kubernetes.io/cronjob-scheduled-timestamp": "2026-01-01T05:00:00Z"
    }


def test_a_cronjob_whose_time_has_come_starts_a_job(control_plane: tuple[str, str, str]) -> None:
    """No minute is waited for: it looks as if the last time had been an hour ago."""

    async def scene() -> None:
        async with world(control_plane, "cron") as w:
            container = {"name": "main", "image": "x", "args": ["true"]}
            pod = {"spec": {"containers": [container], "restartPolicy": "Never", "nodeSelector": {"no": "where"}}}
            template = {"metadata": {"labels": {"a": "b"}}, "spec": {"template": pod}}
            spec = {"schedule": "* * * * *", "concurrencyPolicy": "Forbid", "jobTemplate": template, "suspend": True}
            await w.make(CRONJOBS, "nightly", **spec)
            hour_ago = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
            await w.api.patch(CRONJOBS, "nightly", {"status": {"lastScheduleTime": hour_ago}}, w.space, sub="status")
            await w.api.patch(CRONJOBS, "nightly", {"spec": {"suspend": False}}, w.space)

            async def jobs() -> list[dict[str, object]]:
                return (await w.api.list(JOBS, w.space))[0]

            (job,) = await until(jobs, bool, "a job")
            assert job["metadata"]["labels"]["a"] == "b"  # type: ignore[index]

            async def active() -> list[dict[str, object]]:
                status = (await w.api.get(CRONJOBS, "nightly", w.space)).get("status") or {}
                return status.get("active") or []

            (ref,) = await until(active, bool, "its job in the status")
            assert ref["uid"] == job["metadata"]["uid"]  # type: ignore[index]
            await w.api.delete(CRONJOBS, "nightly", w.space, propagation="Background")
            await until(jobs, lambda found: not found, "its job gone with it")
            with pytest.raises(ApiError, match="expected exactly 5 fields, found 1"):
                await w.make(CRONJOBS, "wrong", **{**spec, "schedule": "daily"})

    asyncio.run(scene())
