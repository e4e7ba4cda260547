"""Every atomic operation alone: what it does, what it refuses, and that a repeat after a lost reply changes nothing.

Over 400 lines: one class of tests for each script.
"""

from __future__ import annotations

import msgspec
import pytest

from protocol import messages
from protocol.errors import Conflict, Fenced, NotFound, Overloaded, StoreFailed
from protocol.messages import CommitRow, Hint, HintRow, Job, NewSequence, Plan, Terminal, decode_rows, pack_ids
from protocol.records import Limits
from protocol.sampling import SamplingParams
from tests.bus import Bus
from tests.conftest import leaked_keys
from tests.protocol.stage import CAPACITY, Stage, frame, terminal
from tests.waits import eventually

A, B, END = frame(1, "a"), frame(2, "b"), frame(3, "c", "stop")


def row(rid: str, cursor: int, frames: bytes, placement: int = 1, choice: int = 0, **fields) -> CommitRow:
    return CommitRow(rid, choice, placement, cursor, frames, **fields)


async def fenced(call) -> str:
    with pytest.raises(Fenced) as caught:
        await call
    return caught.value.cause


# ---------------------------------------------------------------- accept


class TestAccept:
    async def test_writes_the_request_its_route_and_its_inbox_entry(self, stage: Stage) -> None:
        before = await stage.bus.server_ms()
        rid = await stage.accept(Job(prompt=["x", "y"], sampling=SamplingParams(n=2), timeout_s=60), reply_to="gw")
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert (record.open, record.placements, record.ends) == (4, [0] * 4, [None] * 4)
        assert (record.seed, record.prompts, record.cancel, record.attempts) == (None, [], None, 0)
        assert before <= record.created_ms <= await stage.bus.server_ms()
        assert record.deadline_ms == record.created_ms + 60_000
        assert await stage.bus.scan_live() == {rid: ["gw"]}
        assert stage.entries("jobs") == [{b"rid": rid.encode()}]

    async def test_repeated_with_its_own_rid_is_accepted_once(self, stage: Stage) -> None:
        rid = messages.new_rid()
        for _ in range(2):
            accepted = await stage.bus.accept(Job(prompt="x"), rid=rid, idempotency="key")
            assert (accepted.rid, accepted.joined) == (rid, False)
        assert len(stage.entries("jobs")) == 1

    async def test_an_idempotency_key_joins_the_same_body_and_refuses_another(self, stage: Stage) -> None:
        first = await stage.bus.accept(Job(prompt="x"), rid=messages.new_rid(), idempotency="key", reply_to="a")
        second = await stage.bus.accept(Job(prompt="x"), rid=messages.new_rid(), idempotency="key", reply_to="b")
        assert (second.rid, second.joined, second.attached) == (first.rid, True, 1)
        assert await stage.bus.scan_live() == {first.rid: ["a", "b"]}
        with pytest.raises(Conflict):
            await stage.bus.accept(Job(prompt="y"), rid=messages.new_rid(), idempotency="key")
        # where the answer goes and how it is rendered are no part of the body; another tenant's key is another key
        same = Job(prompt="x", view={"created": 5})
        assert (await stage.bus.accept(same, rid=messages.new_rid(), idempotency="key")).joined
        other = Job(prompt="y", tenant="other")
        assert not (await stage.bus.accept(other, rid=messages.new_rid(), idempotency="key")).joined
        assert len(stage.entries("jobs")) == 2

    async def test_the_fifth_listened_channel_is_refused_and_a_deaf_one_makes_room(self, stage: Stage) -> None:
        subscriptions = [stage.bus.subscribe(f"c{i}") for i in range(4)]
        for subscription in subscriptions:
            await subscription.start()
        for i in range(4):
            await stage.bus.accept(Job(prompt="x"), rid=messages.new_rid(), idempotency="key", reply_to=f"c{i}")
        with pytest.raises(Overloaded):
            await stage.bus.accept(Job(prompt="x"), rid=messages.new_rid(), idempotency="key", reply_to="c4")
        await subscriptions[1].close()
        await eventually(lambda: stage.raw.pubsub_numsub(stage.key("out:c1"))[0][1] == 0)
        await stage.bus.accept(Job(prompt="x"), rid=messages.new_rid(), idempotency="key", reply_to="c4")
        assert list((await stage.bus.scan_live()).values()) == [["c0", "c2", "c3", "c4"]]
        for subscription in subscriptions:
            await subscription.close()

    @pytest.mark.parametrize(
        ("limits", "depth", "tokens", "taken"),
        [
            (Limits(requests=5), {"requests": 4}, 0, True),
            (Limits(requests=5), {"requests": 5}, 0, False),
            (Limits(requests=1), {"requests": 5}, 0, False),
            (Limits(tokens=100), {"tokens": 90}, 10, True),
            (Limits(tokens=100), {"tokens": 91}, 10, False),
            (Limits(tokens=100), {"tokens": 0}, 500, True),  # alone it may be as long as it likes
            (Limits(tenant_requests=2), {"requests:default": 2}, 0, False),
            (Limits(tenant_requests=2), {"requests:other": 2, "requests": 9}, 0, True),
            (Limits(tenant_tokens=50), {"tokens:default": 45}, 10, False),
            (Limits(), {"requests": 10**9, "tokens": 10**9}, 10**6, True),
        ],
    )
    async def test_bounds(self, stage: Stage, limits: Limits, depth: dict, tokens: int, taken: bool) -> None:
        await stage.bus.write_depth(stage.epoch, depth)
        if taken:
            await stage.accept(limits=limits, prompt_tokens=tokens)
        else:
            with pytest.raises(Overloaded):
                await stage.accept(limits=limits, prompt_tokens=tokens)
            assert stage.entries("jobs") == []
            assert await stage.bus.scan_live() == {}

    async def test_the_inbox_counts_as_waiting(self, stage: Stage) -> None:
        for _ in range(3):
            await stage.accept(limits=Limits(requests=3))
        with pytest.raises(Overloaded):
            await stage.accept(limits=Limits(requests=3))

    @pytest.mark.parametrize(
        ("tokens", "rate", "low", "high"), [(1000, 100, 9, 11), (10, 1000, 1, 1), (10**9, 1, 60, 60), (5000, 0, 1, 1.1)]
    )
    async def test_retry_after_is_waiting_tokens_over_rate(self, stage, tokens, rate, low, high) -> None:
        await stage.bus.write_depth(stage.epoch, {"requests": 9, "tokens": tokens, "rate": float(rate)})
        with pytest.raises(Overloaded) as caught:
            await stage.accept(limits=Limits(requests=1))
        assert low <= caught.value.retry_after <= high

    async def test_a_wrong_type_under_the_idempotency_key_fails_this_accept_alone(self, stage: Stage) -> None:
        stage.raw.lpush(stage.bus.keys.idempotency("default", "key"), "x")
        with pytest.raises(StoreFailed):
            await stage.bus.accept(Job(prompt="x"), rid=messages.new_rid(), idempotency="key")
        assert stage.entries("jobs") == []


# ---------------------------------------------------------------- admit, reject


class TestAdmit:
    async def test_stores_prompts_and_seed_once_and_empties_the_inbox(self, stage: Stage) -> None:
        rid = await stage.accept()
        assert await stage.admit(rid) == ("new", rid)
        assert stage.raw.xlen(stage.key("jobs")) == 0
        assert stage.raw.xpending(stage.key("jobs"), "scheduler")["pending"] == 0
        again = await stage.bus.admit(stage.epoch, stage.names[rid], rid=rid, prompts=[pack_ids([9])], seed=9)
        assert again == ("repeat", rid)
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert (record.seed, record.prompts) == (5, [pack_ids([1, 2, 3])])

    async def test_is_fenced(self, stage: Stage) -> None:
        rid = await stage.accept()
        (entry,) = await stage.bus.read_jobs("term", 10, 0)
        old = stage.epoch
        await stage.lead("other")
        call = stage.bus.admit(old, entry.entry_id, rid=rid, prompts=[b""], seed=1)
        assert await fenced(call) == "epoch"
        assert stage.raw.xlen(stage.key("jobs")) == 1

    async def test_a_request_cancelled_before_keeps_its_entry_for_finish(self, stage: Stage) -> None:
        rid = await stage.accept(Job(prompt="x", results="res"))
        await stage.bus.cancel(rid, "default")
        assert await stage.admit(rid) == ("cancelled", rid)
        assert stage.raw.xlen(stage.key("jobs")) == 1
        ended = row(rid, 0, frame(None, "", "abort"), placement=0, finish="abort", result=terminal(rid, "abort"))
        for _ in range(2):
            assert await stage.bus.finish(stage.epoch, [ended], entry_id=stage.names[rid]) == "l"
        assert stage.raw.xlen(stage.key("jobs")) == 0
        assert len(stage.entries("results:res")) == 1
        assert await stage.admit(rid) == ("gone", rid)

    async def test_a_request_that_is_not_there_is_gone(self, stage: Stage) -> None:
        rid = await stage.accept()
        stage.raw.delete(stage.bus.keys.request(rid))
        assert await stage.admit(rid) == ("gone", rid)
        assert stage.raw.xlen(stage.key("jobs")) == 0
        assert await stage.bus.scan_live() == {}

    async def test_a_wrong_type_under_the_request_keeps_the_entry(self, stage: Stage) -> None:
        rid = await stage.accept()
        stage.raw.set(stage.bus.keys.request(rid), "x")
        with pytest.raises(StoreFailed):
            await stage.admit(rid)
        assert stage.raw.xlen(stage.key("jobs")) == 1

    async def push(self, stage: Stage, job: Job, rid: str, entry_id: str | None = None) -> tuple[str, str, str]:
        if entry_id is None:
            entry_id = await stage.bus.push(messages.encode(job))
            await stage.bus.read_jobs("term", 10, 0)
        verdict, owner = await stage.bus.admit(
            stage.epoch, entry_id, rid=rid, prompts=[pack_ids([1, 2])], seed=3, job=job
        )
        return verdict, owner, entry_id

    async def test_a_push_becomes_a_request(self, stage: Stage) -> None:
        subscription = stage.bus.subscribe("me")
        await subscription.start()
        job = Job(prompt="x", id="mine", tenant="t", timeout_s=5, reply_to="me", results="res")
        rid = messages.new_rid()
        verdict, owner, entry_id = await self.push(stage, job, rid)
        assert (verdict, owner) == ("new", rid)
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert (record.tenant, record.job, record.seed) == ("t", job, 3)
        assert record.created_ms == int(entry_id.split("-")[0])
        assert record.deadline_ms == record.created_ms + 5000
        assert await stage.bus.find_request("t", "mine") == rid
        rows = await anext(aiter(subscription))
        assert [(r.rid, r.choice, r.id) for r in rows] == [(rid, -1, "mine")]
        assert msgspec.msgpack.decode(rows[0].frames) == [2]
        await subscription.close()

        other = messages.new_rid()
        assert await self.push(stage, job, other, entry_id) == ("repeat", rid, entry_id)
        verdict, owner, _ = await self.push(stage, job, other)
        assert (verdict, owner) == ("duplicate", rid)
        assert list(await stage.bus.scan_live()) == [rid]
        assert stage.raw.xlen(stage.key("jobs")) == 0

    async def test_an_id_of_another_body_is_a_conflict_and_leaves_the_entry(self, stage: Stage) -> None:
        rid = messages.new_rid()
        job = Job(prompt="x", id="mine", results="res")
        assert (await self.push(stage, job, rid))[:2] == ("new", rid)
        other = Job(prompt="y", id="mine", results="res")
        verdict, owner, entry_id = await self.push(stage, other, messages.new_rid())
        assert (verdict, owner) == ("conflict", rid)
        assert stage.raw.xlen(stage.key("jobs")) == 1
        error = {"code": "idempotency_conflict", "message": "used", "param": "id"}
        for _ in range(2):  # safe to repeat
            await stage.bus.reject(
                stage.epoch, entry_id, payload_hash="h", error=error, tenant="default", id="mine", results="res",
            )  # fmt: skip
        ((_, result),) = await stage.bus.read_results("res")
        assert (result.id, result.rid, result.error) == ("mine", "", error)
        assert await stage.bus.find_request("default", "mine") == rid
        assert list(await stage.bus.scan_live()) == [rid]
        assert stage.raw.xlen(stage.key("jobs")) == 0
        assert len(stage.entries("dead")) == 1

    async def test_a_push_without_an_id_goes_by_its_entry(self, stage: Stage) -> None:
        rid = messages.new_rid()
        verdict, _, entry_id = await self.push(stage, Job(prompt="x"), rid)
        assert verdict == "new"
        assert await stage.bus.find_request("default", entry_id) == rid
        assert stage.field(rid, "id") == entry_id

    async def test_a_deposed_leaders_read_is_claimed_and_a_lost_read_is_read_again(
        self, stage: Stage, redis_url
    ) -> None:
        first, second = await stage.accept(), await stage.accept()
        lost = Bus(redis_url, "test/model")
        assert [e.rid for e in await lost.read_jobs("deposed", 1, 0)] == [first]
        assert [e.rid for e in await stage.bus.read_jobs("term", 9, 0)] == [second]
        assert [e.rid for e in await stage.bus.claim_jobs("term", 9)] == [first]
        assert await stage.bus.claim_jobs("term", 9) == []  # its own are not offered again
        # the same consumer after a reply that never came: another bus stands for the process's next connection
        again = Bus(redis_url, "test/model")
        assert [e.rid for e in await again.read_jobs("term", 9, 0)] == [first, second]
        assert await again.read_jobs("term", 9, 0) == []
        await again.close()
        await lost.close()

    async def test_claiming_passes_over_entries_that_were_deleted(self, stage: Stage, redis_url) -> None:
        rids = [await stage.accept() for _ in range(5)]
        other = Bus(redis_url, "test/model")
        entries = await other.read_jobs("deposed", 9, 0)
        stage.raw.xdel(stage.key("jobs"), entries[0].entry_id, entries[1].entry_id)
        claimed: list[str | None] = []
        while part := await stage.bus.claim_jobs("term", 2):
            claimed += [e.rid for e in part]
        assert claimed == rids[2:]
        await other.close()


class TestWeighing:
    async def test_requests_are_weighed_without_their_bodies_and_nothing_foreign_weighs(self, stage: Stage) -> None:
        rid = await stage.accept()
        stage.raw.set(stage.bus.keys.request("foreign"), "not a hash")
        weights = await stage.bus.weigh_requests([rid, "nobody", "foreign"])
        tenant, size, deadline_ms, cancelled = weights[rid]
        assert size == len(stage.raw.hget(stage.bus.keys.request(rid), "body"))
        assert (tenant, deadline_ms, cancelled) == (
            stage.field(rid, "tenant"),
            int(stage.field(rid, "deadline")),
            False,
        )
        assert weights["nobody"] == weights["foreign"] == ("", 0, 0, False)
        await stage.bus.cancel(rid, tenant)
        assert (await stage.bus.weigh_requests([rid]))[rid][3]

    async def test_a_push_is_read_again_while_it_is_there(self, stage: Stage) -> None:
        entry = await stage.bus.push(b"payload")
        assert await stage.bus.read_push(entry) == b"payload"
        stage.raw.xdel(stage.key("jobs"), entry)
        assert await stage.bus.read_push(entry) is None

    async def test_a_lost_read_is_found_behind_many_that_are_not(self, stage: Stage, redis_url: str) -> None:
        handed_out = [await stage.accept() for _ in range(5)]
        assert [e.rid for e in await stage.bus.read_jobs("term", 9, 0)] == handed_out
        lost = await stage.accept()
        other = Bus(redis_url, "test/model")  # stands for a connection whose reply never came
        assert [e.rid for e in await other.read_jobs("term", 1, 0)] == [handed_out[0]]
        await other.read_jobs("term", 9, 0)
        await other.read_jobs("term", 9, 0)
        await other.close()
        stage.bus._missed_jobs = True
        assert [e.rid for e in await stage.bus.read_jobs("term", 2, 0)] == [lost]


class TestReject:
    ERROR = {"code": "invalid_request", "message": "v must be 1", "param": "v"}  # noqa: RUF012

    async def test_a_dead_letter_and_one_error_result(self, stage: Stage) -> None:
        subscription = stage.bus.subscribe("me")
        await subscription.start()
        entry = await stage.bus.push(b"garbage")
        for _ in range(2):
            await stage.bus.reject(
                stage.epoch, entry, payload_hash="h", error=self.ERROR,
                tenant="t", id="mine", reply_to="me", results="res",
            )  # fmt: skip
        (dead,) = stage.entries("dead")
        assert (dead[b"hash"], dead[b"code"], dead[b"id"]) == (b"h", b"invalid_request", b"mine")
        ((_, result),) = await stage.bus.read_results("res")
        assert (result.id, result.finish_reason, result.error) == ("mine", "error", self.ERROR)
        (published,) = await anext(aiter(subscription))
        assert (published.id, published.choice) == ("mine", 0)
        (error,) = messages.decode_frames(published.frames)
        assert (error.finish, error.extra) == ("error", self.ERROR)
        await subscription.close()
        # the id is taken, and goes with time
        assert await stage.bus.find_request("t", "mine") is None
        entry = await stage.bus.push(b"garbage")
        await stage.bus.reject(
            stage.epoch, entry, payload_hash="h", error=self.ERROR, tenant="t", id="mine", results="res"
        )
        assert len(await stage.bus.read_results("res")) == 1
        assert len(stage.entries("dead")) == 2
        with pytest.raises(Conflict):
            await stage.bus.accept(Job(prompt="x", tenant="t"), rid=messages.new_rid(), idempotency="mine")
        assert leaked_keys(stage.raw) == []

    async def test_a_job_that_was_refused_is_told_once_and_another_under_its_id_too(self, stage: Stage) -> None:
        for hash in ("x", "x", "y"):
            entry = await stage.bus.push(b"garbage")
            await stage.bus.reject(
                stage.epoch, entry, payload_hash=hash, error=self.ERROR, tenant="default", id="mine", results="res"
            )
        assert len(await stage.bus.read_results("res")) == 2
        assert len(stage.entries("dead")) == 3
        # the first again, now that it could run: it was told its end
        job = Job(prompt="x", id="mine")
        for hash, expected in (("x", "duplicate"), ("z", "conflict")):
            entry = await stage.bus.push(b"garbage")
            verdict, _ = await stage.bus.admit(
                stage.epoch, entry, rid=messages.new_rid(), prompts=[b""], seed=1, job=job, payload_hash=hash
            )
            assert verdict == expected

    async def test_a_wrong_type_under_the_id_is_no_duplicate(self, stage: Stage) -> None:
        stage.raw.lpush(stage.bus.keys.idempotency("t", "mine"), "x")
        entry = await stage.bus.push(b"garbage")
        await stage.bus.reject(
            stage.epoch, entry, payload_hash="h", error=self.ERROR, tenant="t", id="mine", results="res"
        )
        assert len(await stage.bus.read_results("res")) == 1

    async def test_without_a_tenant_there_is_only_the_dead_letter(self, stage: Stage) -> None:
        entry = await stage.bus.push(b"garbage")
        await stage.bus.reject(stage.epoch, entry, payload_hash="h", error=self.ERROR)
        assert len(stage.entries("dead")) == 1
        assert stage.raw.xlen(stage.key("jobs")) == 0

    async def test_is_fenced(self, stage: Stage) -> None:
        entry = await stage.bus.push(b"garbage")
        call = stage.bus.reject(stage.epoch + 1, entry, payload_hash="h", error=self.ERROR)
        assert await fenced(call) == "epoch"
        assert stage.raw.xlen(stage.key("jobs")) == 1


# ---------------------------------------------------------------- the lead


class TestLead:
    async def test_compare_and_set(self, stage: Stage) -> None:
        seen = await stage.bus.read_leader()
        assert (seen.epoch, seen.owner) == (1, "me")
        await stage.bus.renew_lead(1, "me")
        assert await stage.bus.lead("other", seen) is None  # it was alive after all
        seen = await stage.bus.read_leader()
        assert await stage.bus.lead("other", seen) == 2
        assert await stage.bus.lead("other", seen) == 2  # repeated after a lost reply
        assert await stage.bus.lead("third", seen) is None
        assert await fenced(stage.bus.renew_lead(1, "me")) == "epoch"
        assert await fenced(stage.bus.renew_lead(2, "me")) == "epoch"
        now = await stage.bus.server_ms()
        assert now <= await stage.bus.renew_lead(2, "other") <= now + 60_000

    async def test_release_hands_over(self, stage: Stage) -> None:
        assert not await stage.bus.release(stage.epoch, "other")
        assert await stage.bus.release(stage.epoch, "me")
        seen = await stage.bus.read_leader()
        assert (seen.epoch, seen.owner) == (1, "")
        assert await fenced(stage.bus.renew_lead(1, "me")) == "epoch"
        assert await stage.bus.lead("other", seen) == 2

    async def test_an_inbox_of_a_wrong_type_is_told_and_changes_nothing(self, bus: Bus, raw) -> None:
        raw.set(bus.keys.jobs, "x")
        with pytest.raises(StoreFailed):
            await bus.lead("me", await bus.read_leader())
        assert (await bus.read_leader()).epoch == 0

    async def test_depth_is_replaced_as_a_whole(self, stage: Stage) -> None:
        await stage.bus.write_depth(stage.epoch, {"requests": 3, "requests:a": 3, "rate": 12.5})
        await stage.bus.write_depth(stage.epoch, {"requests": 0})
        assert stage.raw.hgetall(stage.key("depth")) == {b"requests": b"0"}
        await stage.bus.write_depth(stage.epoch, {})
        assert not stage.raw.exists(stage.key("depth"))
        assert await fenced(stage.bus.write_depth(stage.epoch + 1, {"requests": 3})) == "epoch"

    async def test_trim_is_fenced_and_includes_the_id(self, stage: Stage) -> None:
        await stage.register("w1")
        first, second = await stage.bus.read_events("0-0", 10, 0)
        assert await fenced(stage.bus.trim_events(second.event_id, epoch=9)) == "epoch"
        await stage.bus.trim_events(first.event_id, epoch=stage.epoch)
        assert [e.event_id for e in await stage.bus.read_events("0-0", 10, 0)] == [second.event_id]
        await stage.bus.trim_events(second.event_id)
        assert await stage.bus.read_events("0-0", 10, 0) == []
        assert await stage.bus.last_event_id() == second.event_id

    async def test_the_last_event_of_no_stream(self, bus: Bus) -> None:
        assert await bus.last_event_id() == "0-0"


# ---------------------------------------------------------------- workers


class TestWorkers:
    async def test_register_draws_ever_new_gens_and_drops_old_plans(self, stage: Stage) -> None:
        await stage.place()
        (old,) = await stage.bus.read_plans("w0", "0-0", 0)
        gens = [stage.gen, await stage.register(), await stage.register("w1"), await stage.register()]
        assert len(set(gens)) == 4
        assert gens == sorted(gens)
        assert await stage.bus.read_plans("w0", "0-0", 0) == []
        await stage.place()
        (new,) = await stage.bus.read_plans("w0", old[0], 0)  # ids stay monotone
        assert new[1].gen == gens[-1]
        kinds = [(e.kind, e.wid, e.gen) for e in await stage.bus.read_events("0-0", 10, 0)]
        assert kinds == [
            ("worker", "w0", gens[0]),
            ("worker", "w0", gens[1]),
            ("worker", "w1", gens[2]),
            ("worker", "w0", gens[3]),
        ]
        assert [w.wid for w in await stage.bus.list_workers()] == ["w0", "w1"]

    async def test_a_heartbeat_beats_and_tells_a_change_of_state_once(self, stage: Stage) -> None:
        gen = await stage.bus.register("w1", None, "loading")
        start = await stage.bus.last_event_id()
        for state in ("loading", "warming", "warming", None):
            assert await stage.bus.heartbeat("w1", gen, state) == stage.epoch
        await stage.bus.heartbeat("w1", gen, "serving", CAPACITY)
        await stage.bus.heartbeat("w1", gen, "warming")  # a late repeat
        worker = (await stage.bus.list_workers())[1]
        assert (worker.state, worker.beat, worker.capacity, worker.wire) == ("serving", 6, CAPACITY, messages.WIRE)
        assert [e.wid for e in await stage.bus.read_events(start, 10, 0)] == ["w1", "w1"]
        assert await fenced(stage.bus.heartbeat("w1", gen - 1)) == "gen"
        assert await fenced(stage.bus.heartbeat("nobody", gen)) == "gen"

    async def test_retire_fences_drops_plans_and_counts_a_death_once(self, stage: Stage) -> None:
        rid, bystander = await stage.running(), await stage.running()
        assert await fenced(stage.bus.retire(stage.epoch + 1, "w0", stage.gen)) == "epoch"
        for _ in range(2):
            await stage.bus.retire(stage.epoch, "w0", stage.gen, [rid, "unknown"])
        assert stage.field(rid, "attempts") == "1"
        assert stage.field(bystander, "attempts") == "0"
        assert not stage.raw.exists(stage.bus.keys.request("unknown"))
        assert await stage.bus.list_workers() == []
        assert stage.raw.ttl(stage.bus.keys.plans("w0")) > 0
        assert await fenced(stage.bus.heartbeat("w0", stage.gen)) == "gen"
        assert await fenced(stage.commit()) == "gen"
        assert await fenced(stage.place()) == "gen"
        old = stage.gen
        assert await stage.register() > old + 1
        assert stage.raw.ttl(stage.bus.keys.plans("w0")) == -1
        await stage.place()
        await stage.bus.retire(stage.epoch, "w0", old, [rid, bystander])  # late: the new session is untouched
        assert len(await stage.bus.read_plans("w0", "0-0", 0)) == 1
        assert (await stage.bus.list_workers())[0].gen == stage.gen


class TestPlan:
    async def test_what_has_begun_is_placed_only_at_its_fingerprint(self, stage: Stage) -> None:
        rid = await stage.accept()
        await stage.admit(rid)

        async def placed(fingerprint: str, placement: int, cursor: int) -> bool:
            stage.step += 1
            new = [NewSequence(0, rid, 0, placement, b"", 3, SamplingParams(), 5, cursor, b"", 0)]
            plan = Plan(stage.epoch, stage.gen, stage.step, new=new)
            await stage.bus.plan(stage.epoch, "w0", stage.gen, plan, fingerprint=fingerprint)
            return stage.field(rid, "p0") == str(placement)

        assert await placed("a" * 64, 1, 0)
        assert await placed("b" * 64, 2, 0), "no token yet: it may run anywhere"
        row = CommitRow(rid, 0, 2, 0, frame(7), None)
        assert await stage.commit(row) == "l"
        cursor = len(frame(7))
        assert not await placed("a" * 64, 3, cursor)
        assert await placed("b" * 64, 4, cursor)
        assert await placed("", 5, cursor), "an older worker does not tell"
        assert not await placed("a" * 64, 6, cursor)
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert record.fingerprint == "b" * 64

    async def test_records_placements_and_beats_for_the_leader(self, stage: Stage) -> None:
        rid = await stage.accept(Job(prompt="x", sampling=SamplingParams(n=2)))
        await stage.admit(rid)
        beat = (await stage.bus.read_leader()).beat
        await stage.place(rid, "0" * 32, choice=1, placement=3)
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert record.placements == [0, 3]
        assert not stage.raw.exists(stage.bus.keys.request("0" * 32))
        assert (await stage.bus.read_leader()).beat == beat + 1

    async def test_a_repeated_step_is_sent_once(self, stage: Stage) -> None:
        for step in (1, 2, 2, 1, 3):
            await stage.bus.plan(stage.epoch, "w0", stage.gen, Plan(stage.epoch, stage.gen, step))
        assert [p.step for _, p in await stage.bus.read_plans("w0", "0-0", 0)] == [1, 2, 3]
        await stage.lead("other")
        await stage.bus.plan(stage.epoch, "w0", stage.gen, Plan(stage.epoch, stage.gen, 1))
        assert [p.step for _, p in await stage.bus.read_plans("w0", "0-0", 0)] == [1, 2, 3, 1]

    async def test_fences(self, stage: Stage) -> None:
        plan = Plan(stage.epoch, stage.gen, 1)
        assert await fenced(stage.bus.plan(stage.epoch + 1, "w0", stage.gen, plan)) == "epoch"
        assert await fenced(stage.bus.plan(stage.epoch, "w0", stage.gen + 1, plan)) == "gen"
        assert await fenced(stage.bus.plan(stage.epoch, "nobody", stage.gen, plan)) == "gen"
        assert await stage.bus.read_plans("w0", "0-0", 0) == []


# ---------------------------------------------------------------- commit


class TestCommit:
    async def test_appends_in_order_and_ends(self, stage: Stage) -> None:
        rid = await stage.running(Job(prompt="x", results="res"))
        assert await stage.commit(row(rid, 0, A)) == "l"
        assert (
            await stage.commit(row(rid, len(A), B), row(rid, len(A + B), END, finish="stop", result=terminal(rid)))
            == "ll"
        )
        assert stage.journal(rid) == A + B + END
        assert (stage.field(rid, "open"), stage.field(rid, "e0")) == ("0", "stop")
        assert len(stage.entries("results:res")) == 1
        assert await stage.bus.scan_live() == {}
        assert leaked_keys(stage.raw) == []

    async def test_fences_write_nothing(self, stage: Stage) -> None:
        rid = await stage.running()
        assert await fenced(stage.commit(row(rid, 0, A), epoch=stage.epoch + 1)) == "epoch"
        assert await fenced(stage.commit(row(rid, 0, A), gen=stage.gen + 1)) == "gen"
        assert stage.journal(rid) == b""
        assert [e.kind for e in await stage.bus.read_events("0-0", 9, 0)] == ["worker"]

    async def test_a_repeat_finds_its_own_bytes(self, stage: Stage) -> None:
        rid = await stage.running(Job(prompt="x", results="res"), reply_to="gw")
        subscription = stage.bus.subscribe("gw")
        await subscription.start()
        rows = [row(rid, 0, A), row(rid, len(A), END, finish="stop", result=terminal(rid))]
        for _ in range(3):
            assert await stage.commit(*rows) == "ll"
        assert stage.journal(rid) == A + END
        assert stage.field(rid, "open") == "0"
        assert len(stage.entries("results:res")) == 1
        stage.raw.publish(stage.key("out:gw"), b"")  # behind all that was published
        messages_seen = []
        async for rows_seen in subscription:
            if not rows_seen:
                break
            messages_seen.append([r.cursor for r in rows_seen])
        assert messages_seen == [[0, len(A)]]
        await subscription.close()

    async def test_another_placement_is_stale(self, stage: Stage) -> None:
        rid = await stage.running(placement=2)
        for placement in (0, 1, 3):
            assert await stage.commit(row(rid, 0, A, placement=placement)) == "s"
        assert await stage.commit(row(rid, 0, A, placement=2)) == "l"
        # equal lengths hide a foreign token, equal bytes a foreign placement
        assert await stage.commit(row(rid, 0, A, placement=1)) == "s"

    async def test_another_cursor_is_stale(self, stage: Stage) -> None:
        rid = await stage.running()
        await stage.commit(row(rid, 0, A))
        assert await stage.commit(row(rid, 0, B)) == "s"
        assert await stage.commit(row(rid, 1, A)) == "s"
        assert await stage.commit(row(rid, len(A) + 1, B)) == "s"
        assert stage.journal(rid) == A

    async def test_closed_and_missing(self, stage: Stage) -> None:
        rid = await stage.running()
        await stage.commit(row(rid, 0, END, finish="stop"))
        assert await stage.commit(row(rid, len(END), A)) == "c"
        assert await stage.commit(row("0" * 32, 0, A)) == "c"
        assert not stage.raw.exists(stage.bus.keys.journal("0" * 32, 0))
        stage.raw.delete(stage.bus.keys.request(rid), stage.bus.keys.journal(rid, 0))  # as by expiry
        assert await stage.commit(row(rid, 0, END, finish="stop")) == "c"
        assert leaked_keys(stage.raw) == []

    async def test_choices_end_one_by_one(self, stage: Stage) -> None:
        rid = await stage.accept(Job(prompt=["x", "y"], sampling=SamplingParams(n=2), results="res"), idempotency="key")
        await stage.admit(rid)
        for choice in range(4):
            await stage.place(rid, choice=choice)
        for choice in range(3):
            await stage.commit(row(rid, 0, END, choice=choice, finish="stop", result=terminal(rid, choice=choice)))
            assert stage.raw.ttl(stage.bus.keys.request(rid)) == -1
            assert list(await stage.bus.scan_live()) == [rid]
        await stage.commit(row(rid, 0, A, choice=3))
        await stage.commit(row(rid, len(A), END, choice=3, finish="length", result=terminal(rid, choice=3)))
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert (record.open, record.ends) == (0, ["stop", "stop", "stop", "length"])
        assert record.ended_ms > 0
        assert [t.choice for _, t in await stage.bus.read_results("res")] == [0, 1, 2, 3]
        assert leaked_keys(stage.raw) == []

    async def test_one_bad_key_fails_its_row_alone(self, stage: Stage) -> None:
        bad_journal, bad_record, good = [await stage.running(Job(prompt="x", results="res")) for _ in range(3)]
        stage.raw.lpush(stage.bus.keys.journal(bad_journal, 0), "x")
        stage.raw.set(stage.bus.keys.request(bad_record), "x")
        assert await stage.commit(row(bad_journal, 0, A), row(bad_record, 0, A), row(good, 0, A)) == "ccl"
        assert stage.journal(good) == A
        # what can never be written any more is closed, so that nobody waits for it
        assert stage.field(bad_journal, "e0") == "error"
        assert list(await stage.bus.scan_live()) == [good]
        ((_, result),) = await stage.bus.read_results("res")
        assert (result.rid, result.finish_reason, (result.error or {})["code"]) == (
            bad_journal,
            "error",
            "store_failed",
        )
        assert [letter[b"rid"].decode() for letter in stage.entries("dead")] == [bad_journal]
        assert [e.verdicts for e in await stage.bus.read_events("0-0", 9, 0) if e.hint] == ["ccl"]

    async def test_bad_results_and_channels_do_not_hold_a_row_up(self, stage: Stage) -> None:
        rid = await stage.running(Job(prompt="x", results="res"), reply_to="gw")
        stage.raw.set(stage.key("results:res"), "x")
        stage.raw.hset(stage.key("live"), rid, " \x00odd  ")
        assert await stage.commit(row(rid, 0, END, finish="stop", result=terminal(rid))) == "l"
        assert stage.field(rid, "open") == "0"

    async def test_each_channel_gets_its_rows_in_one_publication(self, stage: Stage) -> None:
        one, both, none = [await stage.running(reply_to=name) for name in ("a", "a", None)]
        await stage.bus.attach(both, "default", "b")
        subscriptions = {name: stage.bus.subscribe(name) for name in "ab"}
        for subscription in subscriptions.values():
            await subscription.start()
        await stage.commit(
            row(one, 0, A, id="me"), row(none, 0, A), row(both, 0, A), row(both, 0, B), row(both, len(A), END)
        )
        got = {name: await anext(aiter(subscription)) for name, subscription in subscriptions.items()}
        assert [(r.rid, r.cursor, r.frames, r.id) for r in got["a"]] == [
            (one, 0, A, "me"), (both, 0, A, None), (both, len(A), END, None),
        ]  # fmt: skip
        assert [(r.rid, r.cursor) for r in got["b"]] == [(both, 0), (both, len(A))]
        for subscription in subscriptions.values():
            await subscription.close()

    async def test_beats_hints_and_trims(self, stage: Stage) -> None:
        rid = await stage.running()
        await stage.place()
        plans = await stage.bus.read_plans("w0", "0-0", 0)
        assert await stage.commit(executed=plans[0][0]) == ""
        assert await stage.commit(row(rid, 0, A)) == "l"
        assert [i for i, _ in await stage.bus.read_plans("w0", "0-0", 0)] == [plans[1][0]]
        hints = [e for e in await stage.bus.read_events("0-0", 9, 0) if e.hint]
        assert [(e.hint.step, len(e.hint.rows), e.verdicts) for e in hints if e.hint] == [(1, 0, ""), (2, 1, "")]
        assert (await stage.bus.list_workers())[0].beat == 2

    async def test_many_rows_go_in_several_calls_with_one_hint(self, stage: Stage) -> None:
        rids = []
        for _ in range(300):
            rids.append(await stage.accept())
        for rid in rids:
            await stage.admit(rid)
        await stage.place(*rids)
        rows = [row(rid, 0, A) for rid in rids]
        rows[10] = row(rids[10], 5, A)
        rows[290] = row(rids[290], 0, A, placement=7)
        hint = Hint("w0", stage.gen, 1, [HintRow(i, b"", len(A)) for i in range(300)])
        verdicts = await stage.bus.commit("w0", stage.epoch, stage.gen, rows, hint)
        assert [i for i, v in enumerate(verdicts) if v != "l"] == [10, 290]
        assert len(verdicts) == 300
        (event,) = [e for e in await stage.bus.read_events("0-0", 9, 0) if e.hint]
        assert event.verdicts == verdicts
        assert (await stage.bus.list_workers())[0].beat == 2


# ---------------------------------------------------------------- finish, cancel, attach


class TestFinish:
    async def test_ends_a_waiting_request_and_one_that_ran(self, stage: Stage) -> None:
        waiting, ran = await stage.accept(Job(prompt="x", results="res")), await stage.running()
        await stage.commit(row(ran, 0, A))
        gone = frame(None, "", "deadline")
        rows = [
            row(waiting, 0, gone, placement=0, finish="deadline", result=terminal(waiting, "deadline")),
            row(ran, len(A), gone, placement=1, finish="deadline"),
        ]
        for _ in range(2):
            assert await stage.bus.finish(stage.epoch, rows) == "ll"
        assert stage.journal(waiting) == gone
        assert stage.journal(ran) == A + gone
        assert len(await stage.bus.read_results("res")) == 1
        assert await stage.bus.scan_live() == {}
        assert leaked_keys(stage.raw) == []
        assert await stage.admit(waiting) == ("gone", waiting)

    async def test_refusals(self, stage: Stage) -> None:
        rid = await stage.running()
        await stage.commit(row(rid, 0, A))
        gone = frame(None, "", "abort")
        assert await fenced(stage.bus.finish(stage.epoch + 1, [row(rid, len(A), gone, finish="abort")])) == "epoch"
        assert await stage.bus.finish(stage.epoch, [row(rid, 0, gone, finish="abort")]) == "s"
        assert await stage.bus.finish(stage.epoch, [row(rid, len(A), gone, placement=0, finish="abort")]) == "s"
        await stage.commit(row(rid, len(A), END, finish="stop"))
        assert await stage.bus.finish(stage.epoch, [row(rid, len(A), gone, finish="abort")]) == "c"
        assert await stage.bus.finish(stage.epoch, [row("0" * 32, 0, gone, finish="abort")]) == "c"
        assert stage.journal(rid) == A + END

    async def test_a_dead_letter_is_written_once(self, stage: Stage) -> None:
        rid = await stage.running()
        ended = row(rid, 0, frame(None, "", "error"), finish="error")
        for _ in range(2):
            await stage.bus.finish(stage.epoch, [ended], dead={"rid": rid, "code": "engine_failed"})
        assert stage.entries("dead") == [{b"rid": rid.encode(), b"code": b"engine_failed"}]

    async def test_publishes_its_rows(self, stage: Stage) -> None:
        rid = await stage.accept(reply_to="gw")
        subscription = stage.bus.subscribe("gw")
        await subscription.start()
        await stage.bus.finish(stage.epoch, [row(rid, 0, END, placement=0, finish="abort")])
        assert [r.frames for r in await anext(aiter(subscription))] == [END]
        await subscription.close()


class TestCancelAndAttach:
    async def test_cancel_marks_once(self, stage: Stage) -> None:
        rid = await stage.running()
        start = await stage.bus.last_event_id()
        assert await stage.bus.cancel(rid, "default", reason="abort")
        assert await stage.bus.cancel(rid, "default", reason="deadline")
        assert stage.field(rid, "cancel") == "abort"
        assert [(e.kind, e.rid) for e in await stage.bus.read_events(start, 9, 0)] == [("cancel", rid)]
        await stage.commit(row(rid, 0, END, finish="stop"))
        assert not await stage.bus.cancel(rid, "default")

    async def test_a_disconnects_cancel_is_void_once_somebody_attached(self, stage: Stage) -> None:
        rid = await stage.running(reply_to="gw")
        record = await stage.bus.attach(rid, "default", "other")
        assert (record.attached, record.rid) == (1, rid)
        assert not await stage.bus.cancel(rid, "default", attached=0)
        assert stage.field(rid, "cancel") is None
        assert await stage.bus.cancel(rid, "default", attached=1)

    async def test_tenants_do_not_see_each_other(self, stage: Stage) -> None:
        rid = await stage.running()
        for call in (
            stage.bus.cancel(rid, "other"),
            stage.bus.attach(rid, "other", "gw"),
            stage.bus.cancel("0" * 32, "default"),
            stage.bus.attach("0" * 32, "default", "gw"),
        ):
            with pytest.raises(NotFound):
                await call
        assert stage.field(rid, "attached") == "0"

    async def test_attach_adds_a_channel_once_and_an_ended_request_needs_none(self, stage: Stage) -> None:
        rid = await stage.running()
        for name in ("a", "b", "a"):
            record = await stage.bus.attach(rid, "default", name)
        assert record.attached == 3
        assert await stage.bus.scan_live() == {rid: ["a", "b"]}
        await stage.commit(row(rid, 0, END, finish="stop"))
        record = await stage.bus.attach(rid, "default", "c")
        assert (record.open, record.ends) == (0, ["stop"])
        assert await stage.bus.scan_live() == {}


# ---------------------------------------------------------------- out of memory


class TestOutOfMemory:
    async def test_new_work_is_refused_and_running_work_ends(self, stage: Stage) -> None:
        """Every script but accept runs on a full server."""
        from protocol.errors import Unavailable

        rids = [
            await stage.accept(Job(prompt="x", results="res"), reply_to="gw", idempotency=f"k{i}") for i in range(4)
        ]
        pushed = await stage.bus.push(messages.encode(Job(prompt="x", id="mine")))
        garbage = await stage.bus.push(b"garbage")
        stage.raw.config_set("maxmemory", 1)

        with pytest.raises(Unavailable):
            await stage.accept()
        with pytest.raises(Unavailable):
            await stage.bus.push(b"more")
        joined = await stage.bus.accept(
            Job(prompt="x", results="res"), rid=messages.new_rid(), idempotency="k0", reply_to="gw2"
        )
        assert (joined.rid, joined.joined) == (rids[0], True)

        await stage.lead("other")
        await stage.bus.renew_lead(stage.epoch, "other")
        await stage.bus.write_depth(stage.epoch, {"requests": 4})
        for rid in rids[:3]:
            assert await stage.admit(rid) == ("new", rid)
        new = messages.new_rid()
        verdict = await stage.bus.admit(
            stage.epoch, pushed, rid=new, prompts=[b""], seed=1, job=Job(prompt="x", id="mine")
        )
        assert verdict == ("new", new)
        await stage.bus.reject(stage.epoch, garbage, payload_hash="h", error={"code": "x"}, tenant="t", results="res")
        await stage.bus.cancel(rids[1], "default")
        await stage.bus.attach(rids[0], "default", "gw3")
        old = stage.gen
        await stage.register()
        await stage.bus.heartbeat("w0", stage.gen, "draining")
        await stage.place(rids[0], rids[1])
        rows = [
            row(rids[0], 0, END, finish="stop", result=terminal(rids[0])),
            row(rids[1], 0, END, finish="abort", result=terminal(rids[1])),
        ]
        assert await stage.commit(*rows) == "ll"
        ended = [row(rid, 0, END, placement=0, finish="abort", result=terminal(rid)) for rid in (rids[2], rids[3], new)]
        assert await stage.bus.finish(stage.epoch, ended, entry_id=stage.names[rids[3]], dead={"a": "b"}) == "lll"
        await stage.bus.retire(stage.epoch, "w0", old, [rids[2]])
        await stage.bus.retire(stage.epoch, "w0", stage.gen)
        await stage.bus.trim_events(await stage.bus.last_event_id(), epoch=stage.epoch)
        assert await stage.bus.claim_jobs("term", 9) == []
        assert await stage.bus.release(stage.epoch, "other")

        assert len(stage.entries("results:res")) == 5
        assert len(stage.entries("dead")) == 2
        assert await stage.bus.scan_live() == {}
        assert await stage.bus.inbox_length() == 0
        assert leaked_keys(stage.raw) == []
        stage.raw.config_set("maxmemory", 0)
        await stage.accept()


class TestForeignKeys:
    async def test_what_is_not_ours_is_passed_over_or_told(self, stage: Stage) -> None:
        good = await stage.running()
        odd, text = "a" * 32, "b" * 32
        stage.raw.hset(stage.bus.keys.request(odd), "body", "garbage")
        stage.raw.set(stage.bus.keys.request(text), "x")
        for rid in (odd, text):
            with pytest.raises(StoreFailed):
                await stage.bus.read_request(rid)
        record = await stage.bus.read_request(good)
        assert record is not None
        assert record.rid == good
        assert await stage.bus.read_request("c" * 32) is None

        stage.raw.sadd(stage.key("workers"), "odd", "text", "gone")
        stage.raw.hset(stage.bus.keys.worker("odd"), mapping={"gen": 1, "capacity": "x"})
        stage.raw.set(stage.bus.keys.worker("text"), "x")
        assert [w.wid for w in await stage.bus.list_workers()] == ["w0"]

        start = await stage.bus.last_event_id()
        for fields in ({"k": "h"}, {"k": "h", "h": "x"}, {"k": "w", "w": "w0", "g": "x"}, {"k": "?"}, {"x": "y"}):
            stage.raw.xadd(stage.key("events"), fields)
        await stage.bus.cancel(good, "default")
        assert [e.rid for e in await stage.bus.read_events(start, 10, 0)] == [good]

        stage.raw.xadd(stage.key("results:res"), {"x": "y"})
        stage.raw.xadd(stage.key("results:res"), {"result": "garbage"})
        assert await stage.bus.read_results("res") == []


def test_terminal_and_rows_decode_what_scripts_carry() -> None:
    head, tail = messages.row_edges("r" * 32, 3, 70_000, len(A), "id")
    (decoded,) = decode_rows(head + A + tail)
    assert (decoded.choice, decoded.cursor, decoded.frames, decoded.id) == (3, 70_000, A, "id")
    assert msgspec.msgpack.decode(terminal("r"), type=Terminal).finish_reason == "stop"
